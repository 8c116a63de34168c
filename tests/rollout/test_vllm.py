"""Sampling by vLLM: a stand-in server over loopback against the local loop; its faults; a run through it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import ssl
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, lively_policy, sharpen
from tiny_runs import even_words, rows
from vllm_server import SAMPLING, Vllm, VllmServer

from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.model.copies import SharedCopy, whole_copy
from quark_fast.model.export import write_export
from quark_fast.model.lora import Lora, has_adapters
from quark_fast.model.policy import Policy
from quark_fast.rollout.sampling import Conditioning, Draw, SampleRequest, Sampling
from quark_fast.rollout.transformers import TransformersRollout
from quark_fast.rollout.vllm import InProcess, VllmRollout, check_vllm, launch_folder, prompt_seed
from quark_fast.rollout.vllm_server import Server, in_order
from quark_fast.training.progress import Progress
from quark_fast.training.trainer import Trainer

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1], [9, 9]]
GREEDY = Sampling(max_new_tokens=8, min_new_tokens=3, temperature=0.0)
BEST = Conditioning(2)

Make = Callable[..., Path]


CERTIFICATES = ssl.create_default_context()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "first_wait", 0.01)
    monkeypatch.setattr(ssl, "create_default_context", lambda: CERTIFICATES)  # reading them takes longest


class Served:
    """A policy, its rollout by a server that has been started from its first folder, and that server."""

    def __init__(self, policy: Policy, folder: Path, **settings: Any) -> None:
        self.policy = policy
        launch = launch_folder(folder)
        write_export(policy, folder / "weights-first", whole_copy(policy, torch.float32), padding=False)
        launch.symlink_to("weights-first")
        self.server = VllmServer(launch)
        limits: dict[str, Any] = {"timeout": 20.0, "retries": 2}
        self.engine = Server(policy, self.server.url, launch, torch.float32, 64, **(limits | settings))
        self.rollout = VllmRollout(policy, folder, torch.float32, self.engine)

    def drawn(self, conditioning: Conditioning, sampling: Sampling, samples: int = 1, seed: int = 0) -> Any:
        with self.rollout.synchronised(from_base=False) as draw:
            return by_prompt(draw, conditioning, sampling, samples, seed)

    def local(self, conditioning: Conditioning, sampling: Sampling, samples: int = 1, seed: int = 0) -> Any:
        local = TransformersRollout(SharedCopy(self.policy, torch.float32), None)
        with local.synchronised(from_base=False) as draw:
            return by_prompt(draw, conditioning, sampling, samples, seed)


def by_prompt(
    draw: Draw, conditioning: Conditioning, sampling: Sampling, samples: int, seed: int
) -> list[list[list[int]]]:
    found = {}
    for indices, groups, *_ in draw(SampleRequest(PROMPTS, conditioning, sampling, samples, seed)):
        found.update(zip(indices, groups, strict=True))
    return [found[i] for i in range(len(PROMPTS))]


@pytest.fixture
def serve(tmp_path: Path, tiny_model: Make) -> Iterator[Callable[..., Served]]:
    with contextlib.ExitStack() as stack:

        def make(architecture: str = "llama", *, padded_vocabulary: int = 0, **settings: Any) -> Served:
            policy = lively_policy(tiny_model(architecture, padded_vocabulary=padded_vocabulary))
            served = Served(policy, tmp_path / "rollout", **settings)
            stack.callback(served.server.close)
            return served

        yield make


# --- The same completions as the local loop's -----------------------------------------------------


@pytest.mark.parametrize("quantile", [None, 0, 2])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2"])
def test_greedy_completions_are_those_of_the_local_loop(
    serve: Callable[..., Served], architecture: str, quantile: int | None
) -> None:
    served = serve(architecture, padded_vocabulary=10)
    conditioning = Conditioning(quantile)
    drawn = served.drawn(conditioning, GREEDY)
    assert drawn == served.local(conditioning, GREEDY)
    assert drawn != served.local(Conditioning(1), GREEDY), "the reward token is heard"


def test_link_that_a_killed_process_left_costs_no_weights(serve: Callable[..., Served]) -> None:
    served = serve()
    before = served.drawn(BEST, GREEDY)
    launch = launch_folder(served.rollout.folder)
    (launch.parent / "unfinished").symlink_to(launch.resolve().name)  # killed before it took its last name
    with torch.no_grad():
        served.policy.model.get_input_embeddings().rows.neg_()
    assert served.drawn(BEST, GREEDY) != before
    assert (launch / "model.safetensors").exists() and not launch.resolve().is_symlink()


def test_stop_ids_are_blocked_at_first_and_then_kept(serve: Callable[..., Served]) -> None:
    served = serve()
    stops = served.policy.stop_ids = list(range(40, WORDS + 1))  # a third of all words
    for least in (0, 3):
        for samples in (1, 3):
            sampling = Sampling(max_new_tokens=12, min_new_tokens=least, top_p=1.0)
            drawn = [c for group in served.drawn(BEST, sampling, samples) for c in group]
            ends = [[place for place, i in enumerate(c) if i in stops] for c in drawn]
            assert all(at == [len(c) - 1] or not at for c, at in zip(drawn, ends, strict=True))
            assert all(at[0] >= least if at else len(c) == 12 for c, at in zip(drawn, ends, strict=True))
            assert any(at == [least] for at in ends)


def exact_first_token(policy: Policy, prompt: list[int], sampling: Sampling) -> torch.Tensor:
    """(V,) the distribution of a first token, by the definition of the nucleus."""
    ids = torch.tensor([policy.conditioned(prompt, 2)])
    with torch.no_grad():
        logits = policy.model(ids).logits[0, -1, : policy.vocabulary].double()
    logits[policy.stop_ids] = -torch.inf
    probs = (logits / sampling.temperature).softmax(-1)
    above = torch.stack([probs[probs > p].sum() for p in probs])
    kept = probs * (above < sampling.top_p)
    return kept / kept.sum()


def test_tokens_are_drawn_from_the_nucleus_at_the_temperature(serve: Callable[..., Served]) -> None:
    served = serve("qwen2", padded_vocabulary=10)
    with torch.no_grad():
        for p in served.policy.model.parameters():
            p.mul_(0.7)  # flatter: many words within the nucleus
    count = 1000
    sampling = Sampling(max_new_tokens=1, min_new_tokens=1, temperature=1.4, top_p=0.8, rows=count)
    for draw in (served.drawn, served.local):
        groups = draw(BEST, sampling, samples=count, seed=5)
        for prompt, group in zip(PROMPTS, groups, strict=True):
            expected = exact_first_token(served.policy, prompt, sampling) * count
            found = Counter(token for (token,) in group)
            assert set(found) <= set(expected.nonzero().flatten().tolist())
            cells = [i for i, e in enumerate(expected.tolist()) if e >= 5]
            assert len(cells) > 5
            chi = sum((found[i] - float(expected[i])) ** 2 / float(expected[i]) for i in cells)
            # Mean k, standard deviation sqrt(2k); the seeds are fixed.
            assert chi < len(cells) + 4 * math.sqrt(2 * len(cells))


@pytest.mark.parametrize("ignored", [set(), {"bad_words"}], ids=["0.33", "0.16"])
def test_reward_tokens_are_never_generated_however_probable(
    serve: Callable[..., Served], ignored: set[str]
) -> None:
    served = serve("qwen2")  # its head is tied: the reward rows have logits once exported
    embedding = served.policy.model.get_input_embeddings()
    with torch.no_grad():
        embedding.rows.mul_(8)
    served.server.ignores = ignored
    sampling = Sampling(max_new_tokens=6, min_new_tokens=0, top_p=1.0)
    assert served.drawn(BEST, GREEDY) == served.local(BEST, GREEDY)
    drawn = served.drawn(BEST, sampling, samples=4)
    assert max(i for group in drawn for c in group for i in c) < served.policy.vocabulary
    # And it takes the means for it: without them the engine does generate them, and that is refused.
    served.server.ignores = {"bad_words", "logit_bias"}
    with pytest.raises(UsageError, match="does not suppress the reward tokens"):
        served.drawn(BEST, sampling, samples=4)


def test_samples_follow_from_seed_and_prompt_alone(serve: Callable[..., Served]) -> None:
    served = serve()
    first = served.drawn(BEST, Sampling(6, rows=128), samples=3, seed=1)
    assert served.drawn(BEST, Sampling(6, rows=4), samples=3, seed=1) == first, "in whatever batches"
    other = served.drawn(BEST, Sampling(6), samples=3, seed=2)
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert all(len({tuple(c) for c in group}) == 3 for group in first), "samples of a prompt differ"
    seeds = [prompt_seed(seed, i) for seed in range(40) for i in range(40)]
    assert len({s + k for s in seeds for k in range(25)}) == 25 * len(seeds)
    assert max(seeds) + 16384 < 2**63


# --- Weights ----------------------------------------------------------------------------------------


def test_server_samples_from_the_weights_of_the_last_learning_phase(serve: Callable[..., Served]) -> None:
    served = serve()
    before = served.drawn(BEST, GREEDY)
    with torch.no_grad():
        for p in served.policy.model.parameters():
            if p.dim() > 1:
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    # The prompts are the same: what a prefix cache holds of them is stale.
    after = served.drawn(BEST, GREEDY)
    assert after == served.local(BEST, GREEDY)
    assert after != before
    assert served.server.reloads == 2


def test_adapters_are_merged_into_what_the_server_loads(
    serve: Callable[..., Served], tiny_model: Make
) -> None:
    served = serve()
    policy = Policy.create(tiny_model(), quantiles=3, lora=Lora(rank=2, alpha=8.0))
    policy.model.eval()
    sharpen(policy.model)
    before = served.drawn(BEST, GREEDY)
    served.policy = served.rollout.policy = policy
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    assert served.drawn(BEST, GREEDY) == served.local(BEST, GREEDY) != before
    assert has_adapters(policy.model), "the policy keeps its own"


def test_weights_of_earlier_rounds_go_and_all_go_at_the_end(serve: Callable[..., Served]) -> None:
    served = serve()
    for _ in range(3):
        served.drawn(BEST, GREEDY)
    folder = served.rollout.folder
    assert len(list(folder.glob("weights-*"))) == 1
    assert {path.name.split("-")[0] for path in folder.iterdir()} == {"model", "weights"}
    served.rollout.close()
    assert not folder.exists()


@pytest.mark.parametrize("noticed", [True, False])
def test_server_started_anew_has_the_weights_that_it_is_asked_for(
    serve: Callable[..., Served], noticed: bool
) -> None:
    served = serve(retries=3)
    with torch.no_grad():
        served.policy.model.lm_head.weight.mul_(-1)  # the weights it was started with say otherwise
    expected = served.local(BEST, GREEDY)
    one_by_one = dataclasses.replace(GREEDY, rows=1)
    if noticed:
        served.server.faults = [None, None, "restart"]
    with served.rollout.synchronised(from_base=False) as draw:
        found = {}
        for indices, groups, *_ in draw(SampleRequest(PROMPTS, BEST, one_by_one, 1, 0)):
            found.update(zip(indices, groups, strict=True))
            if not noticed:  # while nobody asks
                served.server.restart()
    assert [found[i] for i in range(len(PROMPTS))] == expected
    assert served.server.reloads == 1


# --- Several processes ------------------------------------------------------------------------------


def test_processes_share_the_prompts_and_only_one_writes_and_loads_weights(
    serve: Callable[..., Served],
) -> None:
    served = serve()
    sampling = Sampling(6, rows=3)
    expected = served.drawn(BEST, sampling, samples=3)
    loaded: list[Path] = []

    def first(work: Callable[[], Path]) -> Path:
        loaded.append(work())
        return loaded[-1]

    main, other = (
        VllmRollout(served.policy, served.rollout.folder, torch.float32, served.engine, once)
        for once in (first, lambda _: loaded[-1])
    )
    found = {}
    with main.synchronised(from_base=False) as here, other.synchronised(from_base=False) as there:
        for draw, shard in ((here, (0, 2)), (there, (1, 2))):
            for indices, groups, *_ in draw(SampleRequest(PROMPTS, BEST, sampling, 3, 0, shard)):
                assert not found.keys() & set(indices)
                found.update(zip(indices, groups, strict=True))
    assert [found[i] for i in range(len(PROMPTS))] == expected
    assert served.server.reloads == 2 and len(loaded) == 1
    salts = {asked["cache_salt"] for asked in served.server.asked}
    assert len(salts) == 2, "one for each of the two synchronisations"


# --- Faults -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [500, 503, 429, "reset", "cut", "abort", "text"])
def test_passing_fault_changes_nothing(serve: Callable[..., Served], fault: Any) -> None:
    served = serve()
    sampling = Sampling(6, rows=2)
    expected = served.drawn(BEST, sampling, samples=2)
    served.server.faults = [None, fault, fault, None, fault]
    assert served.drawn(BEST, sampling, samples=2) == expected


def test_request_without_an_answer_is_asked_again(serve: Callable[..., Served]) -> None:
    served = serve(timeout=1.0)
    expected = served.drawn(BEST, GREEDY)
    served.server.faults = ["hang"]
    assert served.drawn(BEST, GREEDY) == expected


def test_server_that_asks_for_patience_is_left_alone_so_long(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    expected = served.drawn(BEST, GREEDY)
    served.server.faults, served.server.retry_after = [429], 7
    slept: list[float] = []
    monkeypatch.setattr("tenacity.nap.time", types.SimpleNamespace(sleep=slept.append))
    assert served.drawn(BEST, GREEDY) == expected
    assert slept == [7.0]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (500, r"failed at 3 attempts of /v1/completions, at last with: HTTP 500: as the test has it"),
        ("hang", r"at last with: no answer in 0.2 s"),
        ("text", r"at last with: an answer that is not JSON: b'<html>'"),
        ("abort", r"at last with: a completion that ended by 'abort'"),
        ("reset", r"failed at 3 attempts of .*, at last with: .*(reset|closed|without)"),
        ("no places", r"at last with: completions without their indices"),
        (400, r"refused /v1/completions, HTTP 400: as the test has it"),
        ("no ids", r"returns no token ids"),
    ],
)
def test_lasting_fault_is_one_clear_line(serve: Callable[..., Served], fault: Any, words: str) -> None:
    served = serve(timeout=0.2 if fault == "hang" else 1.0)
    served.server.faults = [fault] * 50
    with pytest.raises(UsageError, match=words):
        served.drawn(BEST, GREEDY)


def test_server_that_is_not_there_is_waited_for_and_then_named(serve: Callable[..., Served]) -> None:
    served = serve(timeout=0.3)
    served.server.close()
    said: list[str] = []
    served.engine.log = said.append
    line = "VLLM_SERVER_DEV_MODE=1 vllm serve .*rollout/model --dtype float32 --max-model-len 64"
    with pytest.raises(UsageError, match=f"no vLLM server at .* refused; start it by `{line} .*--resume"):
        served.drawn(BEST, GREEDY)
    assert len(said) == 1 and "waiting for the vLLM server" in said[0]


def test_server_that_comes_up_late_is_used(serve: Callable[..., Served]) -> None:
    served = serve()
    port = served.server.http.server_address[1]
    served.server.close()
    late: list[VllmServer] = []

    def start() -> None:
        time.sleep(0.3)
        late.append(VllmServer(launch_folder(served.rollout.folder), port=port))

    starting = threading.Thread(target=start)
    starting.start()
    try:
        assert served.drawn(BEST, GREEDY) == served.local(BEST, GREEDY)
    finally:
        starting.join()
        late[0].close()


def test_server_of_another_model_is_refused(serve: Callable[..., Served], tiny_model: Make) -> None:
    served = serve()
    real, served.server.engine = served.server.engine, Vllm(tiny_model("gpt2"))
    with pytest.raises(UsageError, match=r"reads the reward tokens as .* not as ids .* start it anew by"):
        served.drawn(BEST, GREEDY)
    served.server.engine, served.server.name = real, "/another/run/rollout/model"
    with pytest.raises(UsageError, match=r"serves /another/run/.*, not the model of this run; start it by"):
        served.drawn(BEST, GREEDY)


def test_folder_that_the_server_does_not_see_is_named(serve: Callable[..., Served]) -> None:
    served = serve()
    served.server.sees = False
    with pytest.raises(UsageError, match=r"collective_rpc, at last with: HTTP 500.* sees the run folder"):
        served.drawn(BEST, GREEDY)


def test_server_without_development_mode_is_refused(serve: Callable[..., Served]) -> None:
    served = serve()
    served.server.dev_mode = False
    with pytest.raises(UsageError, match="it takes no weights; start it with VLLM_SERVER_DEV_MODE=1"):
        served.drawn(BEST, GREEDY)


def test_prompt_that_was_cut_is_refused(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    real = served.server.completions
    monkeypatch.setattr(
        served.server, "completions", lambda body: real(body | {"prompt": body["prompt"][1:]})
    )
    with pytest.raises(UsageError, match="did not read the prompt as it was sent"):
        served.drawn(BEST, GREEDY)


@pytest.mark.parametrize("length", [2, 30])
def test_completions_of_another_length_are_refused(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    served = serve()
    real = served.server.completions
    wanted = {"max_tokens": length, "min_tokens": 0, "stop_token_ids": []}
    monkeypatch.setattr(served.server, "completions", lambda body: real(body | wanted))
    with pytest.raises(UsageError, match=f"a completion of {length} tokens"):
        served.drawn(BEST, GREEDY)


def test_guided_conditioning_is_refused(serve: Callable[..., Served]) -> None:
    with pytest.raises(UsageError, match=r"guidance = 1.5 mixes two streams, which vLLM does not"):
        serve().drawn(Conditioning(2, 0, 1.5), GREEDY)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"guidance": 1.5}, r"guidance = 1.5 mixes two streams .*--guidance 1"),
        ({"vllm_server": "localhost:8000"}, r"give http://host:port"),
        ({"vllm_server": "http://localhost:8000/v1"}, r"give http://host:port"),
        ({"vllm_server": "http://localhost:port"}, r"give http://host:port"),
        ({"temperature": 2.5}, r"vLLM takes 0, and 0.01 to 2"),
        ({"temperature": 0.001}, r"vLLM takes 0, and 0.01 to 2"),
        ({"explore_temperature": 2.5}, r"explore_temperature = 2.5; vLLM takes 0, and 0.01 to 2"),
        ({"quantiles": 200}, r"suppresses 128"),
        ({"vllm_memory": 1.5}, r"vllm_memory = 1.5"),
        ({"vllm_timeout": 0.0}, r"vllm_timeout = 0.0; give at least 1"),
        ({"rollout": "transformers", "vllm_server": "http://x:1"}, r"is for rollout = vllm"),
    ],
)
def test_setting_that_vllm_cannot_do_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Config(**({"rollout": "vllm", "guidance": 1.0} | settings)).check()
    Config(rollout="vllm", guidance=1.0, vllm_server="https://node7:8000/").check()


def test_vllm_that_cannot_be_in_this_process_is_refused_at_once() -> None:
    config = Config(rollout="vllm", guidance=1.0)
    with pytest.raises(UsageError, match=r"not installed here: pip install 'vllm>=0\.22', or .*server"):
        check_vllm(config, 1)
    with pytest.raises(UsageError, match=r"in each of 8 processes is not supported; start one server"):
        check_vllm(config, 8)
    check_vllm(Config(rollout="vllm", guidance=1.0, vllm_server="http://x:1"), 8)
    check_vllm(Config(), 1)


# --- Requests side by side --------------------------------------------------------------------------


def test_answers_come_in_order_and_few_are_made_ahead() -> None:
    made: list[int] = []
    before = threading.enumerate()

    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        made.append(item)
        return -item

    answers = in_order(work, range(100), workers=3)
    assert [next(answers) for _ in range(10)] == [-i for i in range(10)]
    answers.close()  # type: ignore[attr-defined]
    time.sleep(0.05)
    assert len(made) <= 10 + 4 * 3
    assert list(in_order(work, range(100), workers=7)) == [-i for i in range(100)]
    assert not [t for t in threading.enumerate() if t not in before and _lives(t)]


def _lives(thread: threading.Thread) -> bool:
    thread.join(1.0)
    return thread.is_alive()


def test_error_of_one_answer_is_raised_in_its_turn() -> None:
    def work(item: int) -> int:
        if item == 4:
            raise UsageError("the fourth")
        return item

    answers = in_order(work, range(9), workers=2)
    assert [next(answers) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="the fourth"):
        next(answers)


# --- In this process --------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """vLLM's module, its engine the stand-in's; what it was asked to do."""
    asked: list[Any] = []

    class SamplingParams:
        def __init__(self, *, detokenize: bool, **parameters: Any) -> None:
            assert parameters.keys() <= SAMPLING.keys()
            assert all(SAMPLING[name](value) for name, value in parameters.items())
            self.parameters = parameters

    class LLM:
        def __init__(self, *, model: str, **settings: Any) -> None:
            asked.append(settings)
            self.engine = Vllm(Path(model))

        def generate(self, prompts: Any, wanted: Any, *, use_tqdm: bool) -> list[Any]:
            asked.append(("generate", len(prompts)))
            return [
                self._one(p["prompt_token_ids"], p["cache_salt"], w.parameters)
                for p, w in zip(prompts, wanted, strict=True)
            ]

        def _one(self, prompt: list[int], salt: str, wanted: dict[str, Any]) -> Any:
            found = [self.engine.complete(prompt, wanted, k, salt) for k in range(wanted["n"])]
            made = [types.SimpleNamespace(index=k, token_ids=f["token_ids"]) for k, f in enumerate(found)]
            return types.SimpleNamespace(outputs=made[::-1])

        def collective_rpc(self, method: str, *, kwargs: dict[str, str]) -> None:
            assert method == "reload_weights"
            asked.append(method)
            self.engine.load(Path(kwargs["weights_path"]))

        def sleep(self, level: int) -> None:
            asked.append(("sleep", level))

        def wake_up(self, tags: list[str]) -> None:
            asked.append(("wake", *tags))

    module = types.SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return asked


def test_engine_in_this_process_samples_as_the_local_loop(
    serve: Callable[..., Served], installed: list[Any]
) -> None:
    served = serve()
    launch = launch_folder(served.rollout.folder)
    served.rollout.engine = InProcess(launch, torch.float32, torch.device("cuda"), 64, 0.25)
    for _ in range(2):
        assert served.drawn(BEST, GREEDY) == served.local(BEST, GREEDY)
        with torch.no_grad():
            served.policy.model.lm_head.weight.mul_(-1)
    settings, *rest = installed
    assert settings == {
        "dtype": "float32",
        "max_model_len": 64,
        "generation_config": "vllm",
        "gpu_memory_utilization": 0.25,
        "enable_sleep_mode": True,
    }
    # Asleep, weights and all, while the policy learns.
    woken = [("wake", "weights"), "reload_weights", ("wake", "kv_cache")]
    assert rest == [("generate", 4), ("sleep", 2), *woken, ("generate", 4), ("sleep", 2)]


# --- A run ------------------------------------------------------------------------------------------


def test_run_learns_by_a_server_and_a_round_half_sampled_is_repeated(
    tmp_path: Path, tiny_model: Make
) -> None:
    model = tiny_model()
    prompts = [f"w{i} w{j}" for i in range(4) for j in (12, 13)]

    def run(name: str, die_at: int | None = None, resume: bool = False) -> None:
        events, server = iter(range(10**9)), None

        def listen(progress: Progress) -> None:
            nonlocal server
            if "waiting for the vLLM server" in progress.stage:
                assert server is None
                server = VllmServer(tmp_path / name / "rollout" / "model", port=port)
            if "sampling" in progress.stage and next(events) == die_at:
                raise SystemError("killed")

        with VllmServer.free_port() as port:
            config = Config(
                model=str(model),
                output=str(tmp_path / name),
                quantiles=3,
                initial_samples=4,
                explore_samples=4,
                guidance=1.0,
                sample_batch=16,
                rounds=2,
                steps=20,
                warmup_steps=2,
                kl_coef=0.1,
                batch_size=32,
                micro_batch=32,
                max_new_tokens=6,
                lora_rank=0,
                learning_rate=1e-2,
                eval_samples=2,
                eval_rows="best",
                precision="fp32",
                threads=1,
                rollout="vllm",
                vllm_server=f"http://127.0.0.1:{port}",
                vllm_timeout=20.0,
                resume=resume,
            )
            trainer = Trainer(config, reward=even_words, prompts=prompts, held_out=prompts[:2], listen=listen)
            try:
                trainer.train()
            finally:
                if server is not None:
                    server.close()

    run("whole")
    with pytest.raises(SystemError, match="killed"):
        run("cut", die_at=2)  # in the middle of the second round's sampling
    assert len(rows(tmp_path / "cut" / "completions.jsonl")) == 32, "the first round's, not one of the second"
    run("cut", resume=True)
    whole, cut = (rows(tmp_path / name / "completions.jsonl") for name in ("whole", "cut"))
    assert whole == cut
    first, second = (
        [r["reward"] for r in whole if r["round"] == k and r["reward"] is not None] for k in (0, 1)
    )
    assert sum(second) / len(second) > sum(first) / len(first) + 0.1
    assert not (tmp_path / "whole" / "rollout").exists()
