"""A model is checked when it is loaded: it is read right, repaired by a general means, or refused.

The judge of everything is the model itself: its logits for each sequence alone, without padding, cache or
given positions. No architecture is known by name, so one that is invented next year is right or refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor, nn

from quark_fast.data.tokenizer import SENTENCE
from quark_fast.errors import UsageError
from quark_fast.model.batch import completion_hidden, completion_logits, make_batch
from quark_fast.model.copies import frozen_copy, whole_copy
from quark_fast.model.export import write_export
from quark_fast.model.loading import decoding, first_line, load_pretrained
from quark_fast.model.lookups import Lookups
from quark_fast.model.lora import has_adapters
from quark_fast.model.policy import Policy
from quark_fast.model.reading import Reading, next_logits, read
from quark_fast.model.structure import linear_head
from quark_fast.runtime.memory import OutOfMemory, within_memory

# (prompts, completions, quantiles, tokens, samples) -> the loss of a training step, and its terms.
Loss = Callable[
    [Sequence[Sequence[int]], Sequence[Sequence[int]], Sequence[int], float, float],
    tuple[Tensor, dict[str, float]],
]

# The share of the spread of a position's logits by which two ways to compute them may differ. Another order
# of summation makes 1e-6 to 1e-3 in float32 and up to 5e-2 in bfloat16; what is wrong makes 1e-1 and more.
TOLERANCE = {torch.float64: 5e-3, torch.float32: 5e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
LENGTHS = (9, 2)  # tokens of two of the prompts that are tried; the third is as long as the run's longest
SHORT = 14  # tokens that the third has at least
LONGEST = 128  # tokens that the third has at most on a CPU, where more would take long
NEW = 5  # tokens of each completion
SAMPLES = 2


class WrongModel(UsageError):
    """A model that cannot be read right in any way that there is; ``what`` is wrong with it."""

    def __init__(self, who: str, what: str, fix: str) -> None:
        super().__init__(f"{who} {what}; {fix}")
        self.what = what


@dataclass(frozen=True)
class Checked:
    """The outcome of a check: whether an export's head is to be untied, and lines for the user."""

    untie: bool
    lines: list[str]


def check_model(
    policy: Policy,
    reference: Any,
    near: Path,
    sampling: Mapping[str, Any],
    *,
    untie: bool,
    longest: int = SHORT,
    objective: Callable[[], Loss] | None = None,
    export: bool = True,
    notes: Path | None = None,
) -> Checked:
    """Check a policy that is to be trained, and what will be exported of it.

    Args:
        near, sampling, untie: as of ``check_export``.
        longest: of the prompts, tokens; on a CPU no more than ``LONGEST`` are tried.
        objective: makes that by which the policy is trained: a step is tried out.
        export: whether the export is checked, too.
        notes: a folder where it is noted that this very model is as usual, which then is not checked again.
    Raises:
        WrongModel: it cannot be read right, trained or exported.
        OutOfMemory: not even that fits.
    """
    begun = time.monotonic()
    if policy.model.device.type == "cpu":
        longest = min(longest, LONGEST)
    made_of = (sorted(sampling.items()), untie, longest)
    note = None if notes is None else notes / f"model-{_fingerprint(policy, reference, made_of)}"
    if note is not None and note.exists():
        return Checked(untie, ["model checked before, with the same versions"])
    try:
        remarks = check_policy(policy, reference, longest)
        if objective is not None:
            _check_step(policy, reference, objective)
        if export:
            untie, more = check_export(policy, near, sampling, untie)
            remarks += more
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the memory does not hold a few short texts ({first_line(error)}); give a smaller --model, or"
            " --lora-rank"
        ) from error
    if note is not None and export and not remarks:
        with contextlib.suppress(OSError):  # a cache that cannot be written: it is checked each time
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
    seconds = f"model checked in {time.monotonic() - begun:.1f} s"
    return Checked(untie, [f"{seconds}: {policy.reading}", *remarks] if not remarks else [seconds, *remarks])


def _fingerprint(policy: Policy, reference: Any, more: Any) -> str:
    """Of all that a check depends on but the model's files: the package's sources, versions, settings."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    versions = (torch.__version__, transformers.__version__, tokenizers.__version__)
    kind = [
        (model.dtype, model.device.type, model.config._attn_implementation, has_adapters(model))
        for model in (policy.model, reference)
    ]
    made = (policy.prefix, policy.reward_ids, policy.stored_dtype, more)
    digest.update(repr((versions, kind, made)).encode())
    return digest.hexdigest()[:16]


def check_policy(policy: Policy, reference: Any, longest: int = SHORT) -> list[str]:
    """Find out how a policy that is to be trained is read; log lines where that is unusual.

    Sets ``policy.reading`` and keeps the reward tokens out of tables that are not theirs.

    Raises:
        WrongModel: it cannot be read right.
    """
    best = policy.quantiles - 1
    remarks = _keep_reward_tokens_to_their_table(policy)
    remarks += check_reading(policy, policy.model, [best, 0, None], longest)
    _check_decoding(policy, reference, [None] * 3)  # in the precision in which it samples
    return remarks


@torch.no_grad()
def _check_decoding(policy: Policy, model: Any, quantiles: Sequence[int | None]) -> None:
    """Refuse a model that cannot be sampled in the way that was found for its kind."""
    probe = _Trial.of(policy, quantiles)
    own = _own_logits(policy, model, probe)
    _first([policy.reading], lambda reading: _decoding(policy, model, probe, own, reading), model)


def _check_step(policy: Policy, reference: Any, objective: Callable[[], Loss]) -> None:
    """Try out a training step in its precision, and a copy for sampling behind it, as every round has."""
    best = policy.quantiles - 1
    probe = _Trial.of(policy, [best, 0, best // 2])
    completions = [first for first, *_ in probe.continuations]
    quantiles = [k for k in probe.quantiles if k is not None]

    def step(size: int) -> Tensor:
        some = slice(0, size)
        tokens = float(NEW * size)
        loss, _ = objective()(probe.prompts[some], completions[some], quantiles[some], tokens, float(size))
        # Through all layers, but with no gradient kept of any weight but the reward tokens'.
        torch.autograd.grad(loss, [policy.model.get_input_embeddings().rows])
        return loss.detach()

    with _blamed(reference, "cannot be trained"):
        loss, _ = within_memory(step, len(quantiles), lambda _: None)
        copied = frozen_copy(policy, reference.dtype)
    if not bool(loss.isfinite()):
        raise _wrong(reference, "cannot be trained: the loss of a step is NaN or infinite")
    _check_decoding(policy, copied, [best, 0, None])


def check_reading(
    policy: Policy, model: Any, quantiles: Sequence[int | None], longest: int = SHORT
) -> list[str]:
    """Set ``policy.reading`` to the first way that gives the model's own logits, in training and decoding.

    Args:
        model: the policy's, or one of its kind.
        quantiles: three, on which prompts are conditioned; None where the model has no reward tokens.
    Returns:
        log lines where it is not the usual one.
    Raises:
        WrongModel: there is none.
    """
    probe = _Trial.of(policy, quantiles, longest)
    with torch.no_grad():
        own = _own_logits(policy, model, probe)
        _check_causal(policy, model, probe, own)
        trained, said = _first(
            [Reading(), Reading(padding=False)],
            lambda reading: _training(policy, model, probe, own, reading),
            model,
            lambda reading: f"in training, {reading.rows}",
        )
        paddings = [True, False] if trained.padding else [False]
        ways = [Reading(padding, cache) for cache in (True, False) for padding in paddings]
        with decoding(model):
            policy.reading, more = _first(
                ways, lambda reading: _decoding(policy, model, probe, own, reading), model
            )
    said += more
    return [f"{type(model).__name__} is read as {policy.reading}, since {'; '.join(said)}"] if said else []


@dataclass(frozen=True)
class _Trial:
    """Prompts of ordinary tokens at random, each conditioned on a quantile of its own, and continuations."""

    prompts: list[list[int]]
    quantiles: list[int | None]
    continuations: list[list[list[int]]]  # of each prompt SAMPLES

    @staticmethod
    def of(policy: Policy, quantiles: Sequence[int | None], longest: int = SHORT) -> _Trial:
        generator = torch.Generator().manual_seed(0)
        special = {*policy.tokenizer.all_special_ids, *policy.stop_ids, *policy.prefix}
        ordinary = [i for i in range(policy.vocabulary) if i not in special]

        def some(count: int) -> list[int]:
            return [ordinary[i] for i in torch.randint(len(ordinary), (count,), generator=generator).tolist()]

        lengths = (*LENGTHS, max(longest, SHORT))
        room = max(1, policy.room(NEW, max(lengths)))
        prompts = [some(min(length, room)) for length in lengths]
        return _Trial(prompts, list(quantiles), [[some(NEW) for _ in range(SAMPLES)] for _ in prompts])

    def contexts(self, policy: Policy) -> list[list[int]]:
        return [policy.conditioned(p, k) for p, k in zip(self.prompts, self.quantiles, strict=True)]


def _alone(policy: Policy, model: Any, ids: Sequence[int]) -> Tensor:
    """(L, V) the model's own logits of a sequence."""
    logits: Tensor = read(model, torch.tensor([ids], device=model.device)).logits
    return logits[0, :, : policy.vocabulary].float()


def _own_logits(policy: Policy, model: Any, probe: _Trial) -> Tensor:
    """(prompts, SAMPLES, NEW, V) what the tokens of the continuations are predicted with."""
    with _blamed(model, "does not read a text"):
        found = [
            [_alone(policy, model, context + one[:-1])[-NEW:] for one in continuations]
            for context, continuations in zip(probe.contexts(policy), probe.continuations, strict=True)
        ]
    own = torch.stack([torch.stack(each) for each in found])
    if not bool(own.isfinite().all()):
        raise _wrong(
            model, "has logits that are NaN or infinite, already on ordinary text: its weights are broken"
        )
    return own


def _check_causal(policy: Policy, model: Any, probe: _Trial, own: Tensor) -> None:
    """What is predicted behind a prompt must not depend on what follows, nor on whether anything does."""
    last = torch.stack([_alone(policy, model, context)[-1] for context in probe.contexts(policy)])
    gap = max(_gap(model, last, follows) for follows in own[:, :, 0].unbind(1))
    if gap > _tolerance(model):
        raise _wrong(
            model,
            f"is no causal language model: its logits behind a prompt change by {gap:.1%} of their spread"
            " with what follows, or with the length of the text (encoders such as BERT need is_decoder = true"
            " in their config.json)",
        )


def _training(policy: Policy, model: Any, probe: _Trial, own: Tensor, reading: Reading) -> float:
    """How far the logits of a training batch are from the model's own, both ways that a step may take."""
    before, policy.reading = policy.reading, reading
    pairs = [(i, s) for s in range(SAMPLES) for i in range(len(probe.prompts))]
    lengths = [NEW - (i + s) % 3 for i, s in pairs]  # of the completions, which are padded, too
    batch = make_batch(
        policy,
        [probe.prompts[i] for i, _ in pairs],
        [probe.continuations[i][s][:length] for (i, s), length in zip(pairs, lengths, strict=True)],
        [probe.quantiles[i] for i, _ in pairs],
        model.device,
    )
    policy.reading = before
    expected = torch.cat([own[i, s, :length] for (i, s), length in zip(pairs, lengths, strict=True)])
    every = [completion_logits(model, batch)]
    if (head := linear_head(model)) is not None:
        every.append(head(completion_hidden(model, batch)))
    return max(_gap(model, logits[batch.mask][:, : policy.vocabulary], expected) for logits in every)


def _decoding(policy: Policy, model: Any, probe: _Trial, own: Tensor, reading: Reading) -> float:
    """How far the logits of decoding are from the model's own."""
    contexts = probe.contexts(policy)
    # Where rows of different lengths must not stand together, one by one.
    parts = [list(range(len(contexts)))] if reading.padding else [[i] for i in range(len(contexts))]
    found, expected = [], []
    for part in parts:
        reader = next_logits(model, [contexts[i] for i in part], SAMPLES, reading)
        logits = next(reader)
        for step in range(NEW):
            found.append(logits[:, : policy.vocabulary])
            expected.append(own[part, :, step].flatten(0, 1))
            if step + 1 < NEW:
                tokens = [one[step] for i in part for one in probe.continuations[i]]
                logits = reader.send(torch.tensor(tokens, device=model.device))
    return _gap(model, torch.cat(found), torch.cat(expected))


def _gap(model: Any, found: Tensor, expected: Tensor) -> float:
    """By how much (N, V) logits differ, as a share of the spread of each row's: the largest.

    In low precision it is the median: in a mixture of experts a rounding may route a token to other experts.
    """
    spread = (expected.amax(-1) - expected.amin(-1)).clamp(min=1e-6)
    shares = (found.float() - expected).abs().amax(-1) / spread
    if not bool(shares.isfinite().all()):
        return math.inf
    return float(shares.max() if model.dtype in (torch.float32, torch.float64) else shares.median())


def _tolerance(model: Any) -> float:
    return TOLERANCE.get(model.dtype, max(TOLERANCE.values()))


def _first(
    ways: Iterable[Reading],
    gap: Callable[[Reading], float],
    model: Any,
    name: Callable[[Reading], str] = str,
) -> tuple[Reading, list[str]]:
    """The first way whose gap is small, and what is wrong with those before it."""
    said: list[str] = []
    for way in ways:
        try:
            found = gap(way)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # foreign code fails in any way
            said.append(f"{name(way)}: {_said(error)}")
            continue
        if found <= _tolerance(model):
            return way, said
        said.append(f"{name(way)}: its logits are {found:.1%} of their spread from those of each text alone")
    raise _wrong(model, f"cannot be read right: {'; '.join(said)}")


def _said(error: Exception) -> str:
    kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
    return kind + first_line(error)


@contextlib.contextmanager
def _blamed(model: Any, what: str, export: str | None = None) -> Iterator[None]:
    """Whatever fails here, but for a lack of memory, is the model's: foreign code fails in any way."""
    try:
        yield
    except (torch.OutOfMemoryError, OutOfMemory):
        raise
    except Exception as error:
        # Our loader's message names the scratch folder; transformers' own, its cause, does not.
        loader = isinstance(error, UsageError) and isinstance(error.__cause__, Exception)
        said = _said(error.__cause__ if loader else error)  # type: ignore[arg-type]
        if export is not None:
            said = said.replace(repr(export), "the export")
        raise _wrong(model, f"{what}: {said}") from error


def _wrong(model: Any, what: str) -> WrongModel:
    low = model.dtype != torch.float32
    fix = "give --precision fp32, or another --model" if low else "give another --model"
    dtype = str(model.dtype).removeprefix("torch.")
    return WrongModel(f"{type(model).__name__} ({model.config.model_type}, {dtype})", what, fix)


# --- The export ------------------------------------------------------------------------------------

TEXTS = (SENTENCE, "a", " 1 2")


def check_export(
    policy: Policy, near: Path, sampling: Mapping[str, Any], untie: bool
) -> tuple[bool, list[str]]:
    """Export into a scratch folder and have plain transformers read it: the same ids, the same logits.

    Args:
        near: an existing folder, where there will have to be room for the export anyway.
        sampling, untie: as of ``write_export``. Some models share more than a head by the setting
            that ties it; theirs then stays tied.
    Returns:
        (whether the head is to be untied, log lines where that is not as asked).
    Raises:
        WrongModel: it cannot be written or loaded, or reads a text otherwise than the policy does.
    """
    try:
        _check_export(policy, near, sampling, untie)
    except WrongModel as error:
        if not untie:
            raise
        try:
            _check_export(policy, near, sampling, untie=False)
        except WrongModel:
            raise error from None
        line = f"the export's head stays tied (--export-head tied), since otherwise the model {error.what}"
        return False, [line]
    return untie, []


def _check_export(policy: Policy, near: Path, sampling: Mapping[str, Any], untie: bool) -> None:
    trust = policy.trust_remote_code
    texts = [policy.conditioned(policy.encode(text), policy.quantiles - 1) for text in TEXTS]
    with (
        torch.no_grad(),
        tempfile.TemporaryDirectory(prefix=".quark_fast-check-", dir=near) as scratch,
        _blamed(policy.model, "cannot be exported", scratch),
    ):
        model = whole_copy(policy, policy.stored_dtype)
        own = torch.cat([_alone(policy, model, ids) for ids in texts])
        write_export(policy, Path(scratch), model, sampling, untie=untie)
        del model  # not both in memory
        again, tokenizer = load_pretrained(scratch, policy.stored_dtype, trust_remote_code=trust)
        again.to(policy.model.device)
        read_as = [list(tokenizer(text).input_ids) for text in TEXTS]
        logits = torch.cat([_alone(policy, again, ids) for ids in texts])
    for text, found, expected in zip(TEXTS, read_as, texts, strict=True):
        if found != expected:
            kind = type(tokenizer).__name__
            raise _wrong(
                policy.model,
                f"has a tokenizer whose export ({kind}) reads {text!r} as {found}, the policy as {expected}",
            )
    if (gap := _gap(again, logits, own)) > _tolerance(again) / 2:
        what = f"is another model when its export is loaded: its logits differ by {gap:.1%} of their spread"
        raise _wrong(policy.model, what)


# --- Other tables ----------------------------------------------------------------------------------


def _keep_reward_tokens_to_their_table(policy: Policy) -> list[str]:
    """Tables beside the input embedding, which some models have in every layer, see an ordinary id instead.

    Raises:
        WrongModel: such a table is no module of its own.
    """
    model = policy.model
    own = torch.tensor(policy.reward_ids, device=model.device)
    ids = policy.conditioned([policy.stop_ids[0] if policy.stop_ids else 0], policy.quantiles - 1)
    for _ in range(8):  # a table that has no such row ends the pass before the next table
        failed = False
        with torch.no_grad(), Lookups() as lookups:
            try:
                read(model, torch.tensor([ids], device=model.device))
            except Exception:  # what fails without such tables, too, the check of reading reports
                failed = True
        seen = [one.table for one in lookups.seen if bool(torch.isin(one.numbers, own).any())]
        if not seen:
            if failed:
                return []
            break
        pointers = {table.data_ptr() for table in seen}
        names = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and module.weight.data_ptr() in pointers
        ]
        if not names:
            raise _wrong(
                model, f"looks up reward tokens in a table of its own, of shape {tuple(seen[0].shape)}"
            )
        policy.keep_from(names)
    if not policy.other_tables:
        return []
    return [
        f"{type(model).__name__} looks tokens up in {', '.join(policy.other_tables)}, too, where reward"
        " tokens share the row of token 0"
    ]
