"""Tiny models and tokenizers, built on the spot: no test downloads anything."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import environment  # noqa: F401  # first, as others read what it sets
import numpy as np
import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast, Qwen2Tokenizer

    from quark_fast.model.policy import Policy

# transformers and the trainer are imported by what needs them: who only starts the workers does not.

# Imports and models make objects by the million, few of which are garbage: it is looked for less often.
gc.set_threshold(50_000, 20, 50)

WORDS = 60  # w0 ... w59, then the special tokens


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Tests on every core where pytest-xdist is installed, unless said otherwise; benchmarks never.

    A file's tests share a worker, and its fixtures; the order of the files is that of ``LONGEST``.
    """
    option, is_worker = config.option, hasattr(config, "workerinput")
    if not config.pluginmanager.hasplugin("xdist") or is_worker:
        return
    if option.numprocesses is None and option.dist == "no":
        option.numprocesses, option.dist, option.loadscopereorder = "auto", "loadfile", False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    # A worker for each core of this process, not of the machine; each holds some 1 GB, and 8 end the wait.
    return min(len(os.sched_getaffinity(0)), 8)


# Begun first, so that in the end no worker is left alone with one of them; most seconds first.
LONGEST = [
    *("test_models.py", "test_trainer.py", "test_distributed.py", "test_triton.py", "test_best_round.py"),
    *("test_cli.py", "test_kill.py", "test_vllm.py", "test_triton_aot.py", "test_linear.py"),
    *("test_tokens.py", "test_interrupted.py", "test_side_by_side.py", "test_classifier.py"),
    *("test_assets.py", "test_pool.py", "test_report.py", "test_ablate.py", "test_fixed_step.py"),
    *("test_loss.py", "test_docs.py", "test_gpu_benchmark.py", "test_imports.py", "test_token_kernel.py"),
    *("test_policy.py", "test_lora.py", "test_from_run.py"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Seconds of the longest files: those of LONGEST, or it is out of date."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.location[0]] += report.duration  # type: ignore[assignment]
    if seconds.total() > 60:
        longest = ", ".join(f"{Path(name).name} {spent:.0f}" for name, spent in seconds.most_common(12))
        terminalreporter.write_line(f"{seconds.total():.0f} s of tests in {len(seconds)} files: {longest}")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    # Threads that outnumber free cores wait for each other spinning.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_waits_for_the_disk() -> Iterator[None]:
    # What they are for, a machine that stops, no test can see; a tiny run makes a hundred of them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(autouse=True, scope="module")
def small_heap() -> None:
    # A full pass of the garbage collector, as for lack of memory, takes a second over all that was imported.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def models_checked_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs check a tiny model that passed before, with the same settings, by the note of it.

    The check takes longer than such a run learns; it is tested by itself, without notes.
    """
    from quark_fast.training import start

    notes, check = tmp_path_factory.mktemp("checked"), start.check_model

    def check_once(policy: Policy, reference: Any, *given: Any, **how: Any) -> Any:
        digest = hashlib.sha256(repr(policy.tokenizer).encode())
        for model in (policy.model, reference):
            digest.update(f"{type(model)} {model.config}".encode())
            for name, tensor in model.state_dict().items():
                digest.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return check(policy, reference, *given, **how | {"notes": notes / digest.hexdigest()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "check_model", check_once)
        yield


@pytest.fixture(scope="module")
def quick_interpreter() -> Iterator[None]:
    """Triton's interpreter puts its own functions in place of the language's anew at every call of a
    function, which takes it longer than to run that; here it does so once for each. And it makes a table of
    all dtypes to look one up, for every operation.

    Its fused multiply-add rounds the product; here it rounds once, as a GPU's does: in float64 the product of
    two float32 is exact."""
    from triton import language
    from triton.runtime import interpreter

    own, look_up, found = interpreter._patch_lang, interpreter._get_np_dtype, {}

    def patch_lang(function: Any) -> Any:
        own(function)
        return SimpleNamespace(restore=lambda: None)

    def np_dtype(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, language.block_type) else dtype
        kind = "pointer" if isinstance(scalar, language.pointer_type) else scalar.name
        if kind not in found:
            found[kind] = look_up(dtype)
        return found[kind]

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        fused = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(fused.astype(x.data.dtype), x.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
        patch.setattr(interpreter, "_patch_lang", functools.cache(patch_lang))
        patch.setattr(interpreter, "_get_np_dtype", np_dtype)
        yield


def blank_report(folder: Path, run: object = None) -> Path:
    (folder / "report.html").write_text("<!doctype html>")
    return folder / "report.html"


@pytest.fixture(autouse=True, scope="session")
def blank_reports() -> Iterator[None]:
    # A second of plots, longer than the tiny run that it is about; see `reports`.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quark_fast.training.results.write_report", blank_report)
        yield


@contextlib.contextmanager
def whole_reports() -> Iterator[None]:
    """Runs in this block write their reports as users' runs do."""
    from quark_fast.report.page import write_report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quark_fast.training.results.write_report", write_report)
        yield


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test of the words of a report, which takes a second to plot."""
    from markupsafe import Markup

    blank = defaultdict(lambda: Markup("<svg></svg>"))
    monkeypatch.setattr("quark_fast.report.page._plots", lambda *_: blank)


@pytest.fixture
def reports() -> Iterator[None]:
    """For a test that looks at the report of a run."""
    with whole_reports():
        yield


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    # accelerate keeps its precision for the life of a process; here every run has its own.
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def from_benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a program of benchmarks/; it and what it imports from there are forgotten afterwards."""
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "").parent == folder:
            del sys.modules[name]


@pytest.fixture
def step_bytes(from_benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    """The arithmetic of a step's bytes."""
    return from_benchmarks("step_bytes")


def word_tokenizer(*, pad: bool = True) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over 'w0' ... 'w59'; the end of text is also the document separator."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(WORDS)} | {"<|endoftext|>": WORDS, "<unk>": WORDS + 1}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    named = {"pad_token": "<|endoftext|>"} if pad else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="<unk>", **named
    )


def qwen2_tokenizer() -> Qwen2Tokenizer:
    """The same words and ids as tokens added to Qwen2's own class, the only one loaded for its models."""
    from transformers import Qwen2Tokenizer

    vocabulary = {f"w{i}": i for i in range(WORDS)} | {"<|endoftext|>": WORDS, "<unk>": WORDS + 1}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_tokens([f"w{i}" for i in range(WORDS)])
    return tokenizer


def tiny_config(architecture: str, vocab_size: int, width: int = 32) -> PretrainedConfig:
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    shape = {"vocab_size": vocab_size, "eos_token_id": WORDS, "bos_token_id": WORDS}
    if architecture == "gpt2":
        return GPT2Config(n_embd=width, n_layer=2, n_head=2, n_positions=128, **shape)
    body = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **shape,
    }
    if architecture == "llama":
        return LlamaConfig(tie_word_embeddings=False, **body)
    return Qwen2Config(tie_word_embeddings=True, **body)


def save_tiny_model(folder: Path, architecture: str, *, padded_vocabulary: int = 0, width: int = 32) -> Path:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config(architecture, WORDS + 2 + padded_vocabulary, width)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = qwen2_tokenizer() if architecture == "qwen2" else word_tokenizer(pad=architecture != "gpt2")
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_classifier(folder: Path) -> Path:
    """A random classifier of texts into "kind", "plain" and "rude"."""
    from transformers import AutoModelForSequenceClassification, GPT2Config

    torch.manual_seed(0)
    labels = {0: "kind", 1: "plain", 2: "rude"}
    named = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
    config = GPT2Config(
        vocab_size=WORDS + 2, n_embd=32, n_layer=2, n_head=2, n_positions=64, pad_token_id=WORDS, **named
    )
    model = AutoModelForSequenceClassification.from_config(config)
    sharpen(model)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def sharpen(model: torch.nn.Module) -> None:
    """Large random weights: a fresh model ignores its context so nearly that mistakes there hide."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))


def lively_policy(folder: Path) -> Policy:
    """A policy that hears its context; ends, too, often enough."""
    from quark_fast.model.policy import Policy

    policy = Policy.create(folder, quantiles=3)
    policy.model.eval()
    sharpen(policy.model)
    return policy


def heard_policy(folder: Path) -> Policy:
    """A policy whose reward rows are heard, in place of training."""
    from quark_fast.model.policy import Policy

    policy = Policy.create(folder, quantiles=3)
    policy.model.eval()
    with torch.no_grad():
        policy.model.get_input_embeddings().rows.mul_(2.0)
    return policy


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[Path, torch.Tensor]]:
    """The folder of a tiny model, made once, and the state of the random numbers behind its making."""

    @functools.cache
    def made(architecture: str, padded_vocabulary: int) -> tuple[Path, torch.Tensor]:
        folder = tmp_path_factory.mktemp(f"tiny-{architecture}")
        save_tiny_model(folder, architecture, padded_vocabulary=padded_vocabulary)
        return folder, torch.get_rng_state()

    return made


@pytest.fixture
def tiny_model(
    tmp_path: Path, tiny_models: Callable[[str, int], tuple[Path, torch.Tensor]]
) -> Callable[..., Path]:
    """A folder with a random tiny model and tokenizer of an architecture: gpt2, llama or qwen2."""

    def make(architecture: str = "llama", *, padded_vocabulary: int = 0) -> Path:
        folder, state = tiny_models(architecture, padded_vocabulary)
        torch.set_rng_state(state)
        return shutil.copytree(folder, tmp_path / f"tiny-{architecture}", dirs_exist_ok=True)

    return make


def export(
    policy: Policy, folder: Path, dtype: torch.dtype, sampling: Mapping[str, Any] | None = None
) -> None:
    """Write the policy as a run does in the end."""
    from quark_fast.model.copies import whole_copy
    from quark_fast.model.export import write_export

    write_export(policy, folder, whole_copy(policy, dtype), sampling)


def assert_drawn_from(counts: Tensor, shares: Tensor) -> None:
    """Pearson's statistic within 5 standard deviations of its mean, for fixed seeds; never a share of 0."""
    assert (counts[shares == 0] == 0).all()
    counts, shares = counts[shares > 0].double(), shares[shares > 0].double()
    expected = shares / shares.sum() * counts.sum()
    # Cells that expect few draws are put together: the statistic needs about 5 in each.
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum(0, keepdim=True)])
        expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)])
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 1, (statistic, freedom)
