"""Whether a model is read right: it is, it is repaired by a general means, or it is refused.

The reference for everything is the model itself: its logits for each sequence alone, without padding, cache
or given positions. No architecture is known by name, so one that is invented next year is right or refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quark_fast.errors import UsageError
from quark_fast.model.batch import Batch, completion_hidden, completion_logits, make_batch, shared_logits
from quark_fast.model.fixed_step import FixedSteps, not_for
from quark_fast.model.loading import decoding
from quark_fast.model.lookups import Lookups
from quark_fast.model.policy import Policy
from quark_fast.model.reading import Read, Reading, Sent, next_logits, read
from quark_fast.model.structure import linear_head
from quark_fast.model.wrong_model import blamed, coarsest_dtype, message_of, wrong

# The share of the spread of a position's logits by which two ways to compute them may differ. Another order
# of summation makes 1e-6 to 1e-3 in float32 and up to 5e-2 in bfloat16; what is wrong makes 1e-1 and more.
TOLERANCE = {torch.float64: 5e-3, torch.float32: 5e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
LENGTHS = (9, 2)  # tokens of two of the prompts that are tried; the third is as long as the run's longest
SHORT = 14  # tokens that the third has at least
LONGEST = 128  # tokens that the third has at most on a CPU, where more would take long
NEW = 5  # tokens of each completion
SAMPLES = 2
DROPS_AFTER = 2  # the number of the token after which one sample of each prompt goes on alone


def check_policy(policy: Policy, reference: Any, longest: int = SHORT) -> list[str]:
    """Find out how a policy that is to be trained is read; log lines where that is unusual.

    Sets ``policy.reading`` and keeps the reward tokens out of tables that are not theirs.

    Raises:
        WrongModel: it cannot be read right.
    """
    best = policy.quantiles - 1
    remarks = _keep_reward_tokens_to_their_table(policy)
    remarks += check_reading(policy, policy.model, [best, 0, None], longest)
    check_decoding(policy, reference, [None] * 3)  # in the precision in which it samples
    return remarks


@torch.no_grad()
def check_decoding(policy: Policy, model: Any, quantiles: Sequence[int | None]) -> None:
    """Refuse a model that cannot be sampled in the way that was found for its kind."""
    probe = Trial.of(policy, quantiles)
    own = _own_logits(policy, model, probe)
    _first([policy.reading], lambda reading: _decoding(policy, model, probe, own, reading), model)


@torch.no_grad()
def check_fixed_steps(policy: Policy, model: Any, kind: Literal["static", "graph"]) -> None:
    """Refuse steps of fixed shapes, or a graph of them, for a model that they are not for.

    Raises:
        UsageError: it is not read with padding and a cache, has layers that do not keep every token, reads
            values in a step that is to be recorded, or has other logits so.
    """
    probe = Trial.of(policy, [None] * 3)
    own = _own_logits(policy, model, probe)
    try:
        steps = FixedSteps(model, policy.reading, kind)
        fixed = functools.partial(steps.next_logits, new_tokens=NEW)
        gap = _decoding(policy, model, probe, own, policy.reading, fixed)
    except (torch.OutOfMemoryError, UsageError):
        raise
    except Exception as error:  # foreign code fails in any way
        raise not_for(model, message_of(error)) from error
    if gap > tolerance_of(model):
        raise not_for(model, f"its logits are {gap:.1%} of their spread from those of each text alone")


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
    probe = Trial.of(policy, quantiles, longest)
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
            if policy.reading.cache and not _reads_many(policy, model, probe, own):
                # Only slower, so nothing that is worth a line.
                policy.reading = dataclasses.replace(policy.reading, many=False)
    said += more
    return [f"{type(model).__name__} is read as {policy.reading}, since {'; '.join(said)}"] if said else []


@dataclass(frozen=True)
class Trial:
    """Prompts of ordinary tokens at random, each conditioned on a quantile of its own, and continuations."""

    prompts: list[list[int]]
    quantiles: list[int | None]
    continuations: list[list[list[int]]]  # of each prompt SAMPLES

    @staticmethod
    def of(policy: Policy, quantiles: Sequence[int | None], longest: int = SHORT) -> Trial:
        generator = torch.Generator().manual_seed(0)
        special = {*policy.tokenizer.all_special_ids, *policy.stop_ids, *policy.prefix}
        ordinary = [i for i in range(policy.vocabulary) if i not in special]

        def some(count: int) -> list[int]:
            return [ordinary[i] for i in torch.randint(len(ordinary), (count,), generator=generator).tolist()]

        lengths = (*LENGTHS, max(longest, SHORT))
        room = max(1, policy.room(NEW, max(lengths)))
        prompts = [some(min(length, room)) for length in lengths]
        return Trial(prompts, list(quantiles), [[some(NEW) for _ in range(SAMPLES)] for _ in prompts])

    def contexts(self, policy: Policy) -> list[list[int]]:
        return [policy.conditioned(p, k) for p, k in zip(self.prompts, self.quantiles, strict=True)]


def logits_alone(policy: Policy, model: Any, ids: Sequence[int]) -> Tensor:
    """(L, V) the model's own logits of a sequence."""
    logits: Tensor = read(model, torch.tensor([ids], device=model.device)).logits
    return logits[0, :, : policy.vocabulary].float()


def _own_logits(policy: Policy, model: Any, probe: Trial) -> Tensor:
    """(prompts, SAMPLES, NEW, V) what the tokens of the continuations are predicted with."""
    with blamed(model, "does not read a text"):
        found = [
            [logits_alone(policy, model, context + one[:-1])[-NEW:] for one in continuations]
            for context, continuations in zip(probe.contexts(policy), probe.continuations, strict=True)
        ]
    own = torch.stack([torch.stack(each) for each in found])
    if not bool(own.isfinite().all()):
        raise wrong(
            model, "has logits that are NaN or infinite, already on ordinary text: its weights are broken"
        )
    return own


def _check_causal(policy: Policy, model: Any, probe: Trial, own: Tensor) -> None:
    """What is predicted after a prompt must not depend on what follows, nor on whether anything does."""
    last = torch.stack([logits_alone(policy, model, context)[-1] for context in probe.contexts(policy)])
    gap = max(gap_of(model, last, follows) for follows in own[:, :, 0].unbind(1))
    if gap > tolerance_of(model):
        raise wrong(
            model,
            f"is no causal language model: its logits after a prompt change by {gap:.1%} of their spread"
            " with what follows, or with the length of the text (encoders such as BERT need is_decoder = true"
            " in their config.json)",
        )


def _training(policy: Policy, model: Any, probe: Trial, own: Tensor, reading: Reading) -> float:
    """How far the logits of a training batch are from the model's own, both ways that a step may take."""
    batch, expected = _batch(policy, model, probe, own, reading)
    every = [completion_logits(model, batch)]
    if (head := linear_head(model)) is not None:
        every.append(head(completion_hidden(model, batch)))
    return max(gap_of(model, logits[batch.mask][:, : policy.vocabulary], expected) for logits in every)


def _batch(policy: Policy, model: Any, probe: Trial, own: Tensor, reading: Reading) -> tuple[Batch, Tensor]:
    """(the continuations of all prompts, those of one prompt as neighbours; (N, V) their own logits)."""
    pairs = [(i, s) for i in range(len(probe.prompts)) for s in range(SAMPLES)]
    lengths = [NEW - (i + s) % 3 for i, s in pairs]  # of the completions, which are padded, too
    batch = make_batch(
        policy,
        [probe.prompts[i] for i, _ in pairs],
        [probe.continuations[i][s][:length] for (i, s), length in zip(pairs, lengths, strict=True)],
        [probe.quantiles[i] for i, _ in pairs],
        model.device,
    )
    expected = torch.cat([own[i, s, :length] for (i, s), length in zip(pairs, lengths, strict=True)])
    return dataclasses.replace(batch, reading=reading), expected


def _reads_many(policy: Policy, model: Any, probe: Trial, own: Tensor) -> bool:
    """Whether several tokens may be read at a time after a cache: some models take them for one, or fail."""
    batch, expected = _batch(policy, model, probe, own, policy.reading)
    with contextlib.suppress(Exception):  # foreign code fails in any way
        logits = shared_logits(model, batch)[batch.mask][:, : policy.vocabulary]
        return gap_of(model, logits, expected) <= tolerance_of(model)
    return False


def _decoding(
    policy: Policy, model: Any, probe: Trial, own: Tensor, reading: Reading, read: Read | None = None
) -> float:
    """How far the logits of decoding, by ``next_logits`` or ``read``, are from the model's own.

    Of each prompt one sample ends early, and its row is dropped; ``read`` has all rows to the end.
    """
    drops = read is None
    read = read or functools.partial(next_logits, model, reading=reading)
    contexts = probe.contexts(policy)
    # Where rows of different lengths must not stand together, one by one.
    parts = [list(range(len(contexts)))] if reading.padding else [[i] for i in range(len(contexts))]
    found, expected = [], []
    for part in parts:
        reader = read([contexts[i] for i in part], SAMPLES)
        logits = next(reader)
        of_part = torch.tensor([probe.continuations[i] for i in part], device=model.device).flatten(0, 1)
        rows = torch.arange(len(of_part), device=model.device)
        for step in range(NEW):
            found.append(logits[:, : policy.vocabulary].clone())  # a fixed step writes over its logits
            expected.append(own[part, :, step].flatten(0, 1)[rows])
            kept = None
            if drops and step == DROPS_AFTER:
                kept = torch.arange(1, len(rows), SAMPLES, device=model.device)
                rows = rows[kept]
            if step + 1 < NEW:
                logits = reader.send(Sent(of_part[rows, step], kept))
    return gap_of(model, torch.cat(found), torch.cat(expected))


def gap_of(model: Any, found: Tensor, expected: Tensor) -> float:
    """By how much (N, V) logits differ, as a share of the spread of each row's: the largest.

    In low precision it is the median: in a mixture of experts a rounding may route a token to other experts.
    """
    spread = (expected.amax(-1) - expected.amin(-1)).clamp(min=1e-6)
    shares = (found.float() - expected).abs().amax(-1) / spread
    if not bool(shares.isfinite().all()):
        return math.inf
    return float(shares.max() if coarsest_dtype(model) in (torch.float32, torch.float64) else shares.median())


def tolerance_of(model: Any) -> float:
    return TOLERANCE.get(coarsest_dtype(model), max(TOLERANCE.values()))


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
            said.append(f"{name(way)}: {message_of(error)}")
            continue
        if found <= tolerance_of(model):
            return way, said
        said.append(f"{name(way)}: its logits are {found:.1%} of their spread from those of each text alone")
    raise wrong(model, f"cannot be read right: {'; '.join(said)}")


# --- Other tables ----------------------------------------------------------------------------------


def _keep_reward_tokens_to_their_table(policy: Policy) -> list[str]:
    """Tables beside the input embedding, which some models have in every layer, see an ordinary id instead.

    Raises:
        WrongModel: such a table is no module of its own.
    """
    model = policy.model
    own = torch.tensor(policy.reward_ids, device=model.device)
    # Theirs by right, looked up by the quantile, which of many quantiles may be such an id, too.
    rows = model.get_input_embeddings().rows.data_ptr()
    ids = policy.conditioned([policy.stop_ids[0] if policy.stop_ids else 0], policy.quantiles - 1)
    for _ in range(8):  # a table that has no such row ends the pass before the next table
        failed = False
        with torch.no_grad(), Lookups() as lookups:
            try:
                read(model, torch.tensor([ids], device=model.device))
            except Exception:  # what fails without such tables, too, the check of reading reports
                failed = True
        tables = (one for one in lookups.seen if one.table.data_ptr() != rows)
        seen = [one.table for one in tables if bool(torch.isin(one.numbers, own).any())]
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
            raise wrong(
                model, f"looks up reward tokens in a table of its own, of shape {tuple(seen[0].shape)}"
            )
        policy.keep_from(names)
    if not policy.other_tables:
        return []
    return [
        f"{type(model).__name__} looks tokens up in {', '.join(policy.other_tables)}, too, where reward"
        " tokens share the row of token 0"
    ]
