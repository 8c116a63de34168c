"""Sampling by vLLM: by a server, over its HTTP API, or by an engine in this process.

Both get the weights as files: the policy is exported to a folder, its adapters merged, and vLLM reads that in
place of what it holds. Quark synchronises once a round, not once a step, so that a file's few seconds do not
count, and nothing but vLLM's own ``reload_weights`` is needed on the other side.

vLLM samples one token after another of a single stream: guided conditioning mixes two, and is refused.

Written after the sources of vLLM 0.33 and its documentation since 0.16, the first to reload from a path (its
pull request 32133); the tests have a stand-in for it, which speaks that API.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.util
import itertools
import shutil
import uuid
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from quark_fast.config import Config
from quark_fast.data.tokenizer import reward_token
from quark_fast.errors import UsageError
from quark_fast.model.copies import whole_copy
from quark_fast.model.export import write_export
from quark_fast.model.policy import Policy
from quark_fast.rollout.sampling import Draw, DrawnBatch, SampleRequest, Sampling
from quark_fast.rollout.vllm_server import CompletionRequest, Completions, Server, check_answer, dtype_name


class Engine(Protocol):
    """Where vLLM runs."""

    def load(self, weights: Path) -> None:
        """Hold the weights in this folder from now on; the launch folder leads to the same."""

    def answers(
        self, requests: Sequence[CompletionRequest], side_by_side: int
    ) -> Generator[Completions, None, None]:
        """The completions of each request, in order; ``side_by_side`` requests are under way at once."""

    def rest(self) -> None:
        """Give the memory away until the next ``load``."""

    def close(self) -> None:
        """Give everything away: there is no next ``load``."""


class VllmRollout:
    """``Rollout`` by vLLM.

    In ``folder`` each round's weights have a name of their own, and a link, the launch folder, leads to the
    last: an engine that is started, or started anew at any time, finds those that it is asked for.

    Args:
        folder: of the run, for the weights; a server has to see it under the same path.
        dtype: of the weights that vLLM gets.
        once: does work on one of the run's processes, the result for all.
    """

    def __init__(
        self,
        policy: Policy,
        folder: Path,
        dtype: torch.dtype,
        engine: Engine,
        once: Callable[[Callable[[], Path]], Path] = lambda work: work(),
    ) -> None:
        self.policy, self.folder, self.dtype, self.engine, self.once = policy, folder, dtype, engine, once

    @contextlib.contextmanager
    def synchronised(self, from_base: bool) -> Iterator[Draw]:
        """As ``Rollout.synchronised``. The reference is the policy that did not learn yet."""
        weights = self._synchronise()
        try:
            yield functools.partial(self._sample, weights.name)
        finally:
            self.engine.rest()

    def close(self) -> None:
        self.engine.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _synchronise(self) -> Path:
        """Have vLLM hold the policy as it is now; the folder of its weights."""
        copies = [whole_copy(self.policy, self.dtype)]  # of a sharded policy all processes have to make one

        def load() -> Path:
            weights = self.folder / f"weights-{uuid.uuid4().hex[:12]}"
            scratch = self.folder / "unfinished"
            if scratch.is_symlink():  # of a process that was killed at the last moment
                scratch.unlink()
            shutil.rmtree(scratch, ignore_errors=True)
            # Gone when vLLM loads: in this process the memory is to be its.
            write_export(self.policy, scratch, copies.pop(), padding=False)
            scratch.rename(weights)
            scratch.symlink_to(weights.name)
            scratch.replace(launch_folder(self.folder))
            self.engine.load(weights)
            for old in self.folder.glob("weights-*"):
                if old != weights:
                    shutil.rmtree(old)
            return weights

        return self.once(load)

    def _sample(self, salt: str, request: SampleRequest, done: Container[int] = ()) -> Iterator[DrawnBatch]:
        """As ``sample``: the same distribution and batches of prompts, other random numbers."""
        conditioning, sampling, samples = request.conditioning, request.sampling, request.samples
        if len(conditioning.streams()) > 1:
            raise UsageError(
                f"guidance = {conditioning.guidance:g} mixes two streams, which vLLM does not; give 1"
            )
        batches = [indices for _, indices in request.batches(done)]
        asked = [
            CompletionRequest(
                self.policy.conditioned(request.prompts[i], conditioning.quantile),
                salt,
                parameters(self.policy, sampling, samples, prompt_seed(request.seed, i)),
            )
            for indices in batches
            for i in indices
        ]
        side_by_side = max(1, sampling.rows // samples)
        with contextlib.closing(self.engine.answers(asked, side_by_side)) as answers:
            checked = (
                check_answer(self.policy, one.parameters, found)
                for one, found in zip(asked, answers, strict=True)
            )
            for indices in batches:
                yield DrawnBatch(indices, list(itertools.islice(checked, len(indices))))


def launch_folder(folder: Path) -> Path:
    """The folder that vLLM is started from: a link to the weights of the last round."""
    return folder.resolve() / "model"


def parameters(policy: Policy, sampling: Sampling, samples: int, seed: int) -> dict[str, Any]:
    """What ``sample`` does, in the words of vLLM's SamplingParams and of its HTTP API alike.

    All that a served model's generation config could set is spelled out. ``bad_words`` takes the reward
    tokens' logits for minus infinity: an exported model without padding has no others beyond V.
    """
    return {
        "n": samples,
        "seed": seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": sampling.min_new_tokens,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": policy.stop_ids,
        "ignore_eos": True,  # it is among the stop ids, if it is one
        "bad_words": [reward_token(k) for k in range(policy.quantiles)],
    }


def prompt_seed(seed: int, index: int) -> int:
    """A prompt's own seed, the same whenever its round is sampled; vLLM adds the index among its samples."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2  # room for the sum in 63 bits


# ---------------------------------------------------------------- in this process


class InProcess:
    """vLLM's engine beside the training, on the same GPU, asleep while there is nothing to sample.

    Args:
        launch: the folder that it is started from.
        positions: that the longest prompt takes, completion included.
        memory: share of the GPU's memory that it may use.
    """

    def __init__(
        self, launch: Path, dtype: torch.dtype, device: torch.device, positions: int, memory: float
    ) -> None:
        self.launch, self.dtype, self.positions, self.memory = launch, dtype, positions, memory
        self.sleeps = device.type == "cuda"  # vLLM gives memory away on GPUs alone
        self.llm: Any = None

    def load(self, weights: Path) -> None:
        try:
            if self.sleeps:
                torch.cuda.empty_cache()  # vLLM's memory is not torch's of this process
            if self.llm is None:
                self._start()
                return
            if self.sleeps:
                self.llm.wake_up(tags=["weights"])
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights.resolve())})
            if self.sleeps:
                self.llm.wake_up(tags=["kv_cache"])
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise UsageError(f"vLLM does not load {weights}: {error}") from error

    def _start(self) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=str(self.launch),
            dtype=dtype_name(self.dtype),
            max_model_len=self.positions,
            generation_config="vllm",
            gpu_memory_utilization=self.memory,
            enable_sleep_mode=self.sleeps,
        )

    def answers(
        self, requests: Sequence[CompletionRequest], side_by_side: int
    ) -> Generator[Completions, None, None]:
        from vllm import SamplingParams

        for start in range(0, len(requests), side_by_side):
            part = requests[start : start + side_by_side]
            prompts = [{"prompt_token_ids": one.prompt, "cache_salt": one.salt} for one in part]
            wanted = [SamplingParams(detokenize=False, **one.parameters) for one in part]
            for output in self.llm.generate(prompts, wanted, use_tqdm=False):
                yield [list(one.token_ids) for one in sorted(output.outputs, key=lambda one: one.index)]

    def rest(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=2)

    def close(self) -> None:
        self.llm = None
        gc.collect()


def check_vllm(config: Config, processes: int) -> None:
    """Raise UsageError if the settings want vLLM in this process, and it cannot be there."""
    if config.rollout != "vllm" or config.vllm_server is not None:
        return
    if processes > 1:
        raise UsageError(
            f"rollout = vllm in each of {processes} processes is not supported; start one server for all, and"
            " give its address by --vllm-server"
        )
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "rollout = vllm, but vLLM is not installed here: pip install 'vllm>=0.22', or give the"
            " address of a server by --vllm-server"
        )


def vllm_rollout(
    config: Config,
    policy: Policy,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    longest: int,
    log: Callable[[str], None],
    once: Callable[[Callable[[], Path]], Path],
) -> VllmRollout:
    """The rollout that the settings name.

    Args:
        longest: prompt that is sampled from, tokens.
    """
    launch = launch_folder(folder)
    positions = len(policy.prefix) + 1 + longest + config.max_new_tokens
    engine: Engine
    if config.vllm_server is None:
        engine = InProcess(launch, dtype, device, positions, config.vllm_memory)
    else:
        limits: dict[str, Any] = {"timeout": config.vllm_timeout, "retries": config.vllm_retries}
        engine = Server(policy, config.vllm_server, launch, dtype, positions, **limits, log=log)
    return VllmRollout(policy, folder, dtype, engine, once)
