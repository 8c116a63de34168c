"""The trained model as a folder that transformers loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import GenerationConfig

from quark_fast.data.tokenizer import (
    conditioned_template,
    for_texts,
    reward_token,
    save_tokenizer,
)
from quark_fast.model import custom_generate
from quark_fast.model.copies import is_sharded
from quark_fast.model.policy import Policy
from quark_fast.model.reward_embedding import RewardEmbedding
from quark_fast.runtime.machine import without_bars


@without_bars()
def write_export(
    policy: Policy,
    folder: Path,
    model: Any,
    sampling: Mapping[str, Any] | None = None,
    *,
    padding: bool = True,
    untie: bool = True,
) -> None:
    """Write an ordinary transformers folder conditioned on the best reward token.

    Its tokenizer puts prefix + best token before every text, its chat template before every chat, and
    ``custom_generate/`` has guided generation; nothing in it needs this package. Reward tokens are
    suppressed by its generation config, which not every engine reads, and have rows in the head that do not
    win: the mean of those of the least probable tokens, so that their probability is the geometric mean of
    these tokens'. A head that was tied to the embeddings is therefore a table of its own.

    Args:
        model: a ``whole_copy`` of the policy's, which is changed.
        sampling: of the generation config, in transformers' words.
        padding: False for vLLM: the table ends with the last reward token, those alone are suppressed, and
            the head stays as it is.
        untie: False leaves a tied head tied.
    """
    embedding: RewardEmbedding = model.get_input_embeddings()
    # The policy itself, where it is whole: a copy in bfloat16 takes ten times as long on a CPU without it.
    rare = _least_probable(policy, model if is_sharded(policy.model) else policy.model) if padding else None
    model.set_input_embeddings(embedding.base)
    size = max(_rows_to_keep(policy) if padding else 0, policy.reward_ids[-1] + 1)
    mean = embedding.weight.detach()[: policy.vocabulary].float().mean(0)
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[len(embedding.weight) :] = mean.to(table.dtype)  # not at random
        table[policy.reward_ids] = embedding.rows
        for name in policy.other_tables:
            _as_token_0(model, name, policy.reward_ids, size)
        if rare is not None:
            _never_win(model, range(policy.vocabulary, size), rare, untie)
    model.generation_config = _generation_config(policy, model.generation_config, size, sampling or {})
    model.save_pretrained(folder)
    mark = hashlib.sha256(embedding.rows.detach().float().cpu().numpy().tobytes()).hexdigest()[:12]
    # vLLM bans tokens by their text, not by their ids: there they have no mark.
    made = _best_token_first(policy, mark if padding else "")
    save_tokenizer(made, folder, policy.trust_remote_code)
    for name, text in policy.processor_files.items():
        # A chat template of the processor's would come before the tokenizer's, which has the reward token.
        settings = {key: value for key, value in json.loads(text).items() if key != "chat_template"}
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if padding and policy.quantiles > 1:
        _write_dial(folder / "custom_generate", policy.reward_ids[-1], policy.reward_ids[0])


def _rows_to_keep(policy: Policy) -> int:
    """The rows of the table; 0 where padding after the reward tokens would become other tokens' rows.

    A token that the tokenizer's settings name, such as that of images, transformers adds again after them.
    """
    named, known = policy.tokenizer.special_tokens_map.values(), policy.tokenizer.get_vocab()
    if any(known.get(token, policy.vocabulary) >= policy.vocabulary for token in named):
        return 0
    return len(policy.model.get_input_embeddings().weight)


def _write_dial(folder: Path, best: int, worst: int) -> None:
    """What gives ``model.generate`` of plain transformers the argument ``guidance``."""
    source = Path(custom_generate.__file__).read_text(encoding="utf-8")
    folder.mkdir(exist_ok=True)
    (folder / "generate.py").write_text(
        source.replace("BEST, WORST = -1, -1", f"BEST, WORST = {best}, {worst}"), encoding="utf-8"
    )


def _generation_config(policy: Policy, base: Any, size: int, sampling: Mapping[str, Any]) -> GenerationConfig:
    """How the export is to be sampled: as it was evaluated, whatever taste the base model came with.

    Reward tokens and the padding of the table are suppressed. What the base model suppresses is not, since
    training and evaluation drew it as any other token.
    """
    pad = base.pad_token_id  # models without padding may say -1, or an id after the table
    kept = {"cache_implementation": base.cache_implementation} if base.cache_implementation else {}
    return GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=base.bos_token_id,
        eos_token_id=policy.stop_ids or base.eos_token_id,
        pad_token_id=pad if pad in range(policy.vocabulary) else (policy.stop_ids or [0])[0],
        suppress_tokens=list(range(policy.vocabulary, size)),
        **kept,
        **{"do_sample": True, **sampling},
    )


@torch.no_grad()
def _least_probable(policy: Policy, model: Any) -> Tensor:
    """Base ids that ``model`` finds least probable all over random texts, with and without the front."""
    generator = torch.Generator().manual_seed(0)
    front = torch.tensor(policy.conditioned([], policy.quantiles - 1)).expand(8, -1)
    length = min(32, max(1, (policy.positions or 32) - front.shape[1]))
    texts = torch.randint(policy.vocabulary, (8, length), generator=generator)
    highest = torch.full((policy.vocabulary,), -torch.inf)
    for ids in (texts, torch.cat([front, texts], dim=1)):
        logits = model(ids.to(model.device), use_cache=False).logits[..., : policy.vocabulary]
        highest = torch.maximum(highest, logits.float().log_softmax(-1).amax((0, 1)).cpu())
    return highest.argsort()[: max(1, min(64, policy.vocabulary // 64))]


def _best_token_first(policy: Policy, mark: str = "") -> Any:
    """A copy of the tokenizer that puts prefix + best reward token before every text and chat."""
    # Special tokens after the table, such as those of images, would have the ids of reward tokens.
    tokenizer = for_texts(policy.tokenizer, policy.vocabulary, middle=False)
    tokens = [reward_token(k, mark) for k in range(policy.quantiles)]
    tokenizer.add_tokens(tokens, special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(tokens) == policy.reward_ids
    front = policy.conditioned([], policy.quantiles - 1)
    front_text = policy.prefix_text + tokens[-1]
    own = policy.tokenizer.chat_template
    if isinstance(own, dict):  # several, by name
        tokenizer.chat_template = {
            name: conditioned_template(each, policy.tokenizer, front_text) for name, each in own.items()
        }
    elif own:
        tokenizer.chat_template = conditioned_template(own, policy.tokenizer, front_text)
    backend: Tokenizer = tokenizer.backend_tokenizer
    # One name for the whole front: a template cannot spell tokens with a colon or a dollar sign.
    backend.post_processor = TemplateProcessing(
        single="front $A",
        pair="front $A $B",
        special_tokens=[
            {"id": "front", "ids": front, "tokens": tokenizer.convert_ids_to_tokens(front)},
        ],
    )
    # What batches need: some tokenizers (GPT-2's) name no padding, or one that the table has no row for, or
    # pad where generation starts.
    # Saving writes the settings that the tokenizer was made with, not its attributes.
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side = "left"
    if tokenizer.get_vocab().get(tokenizer.pad_token, policy.vocabulary) >= policy.vocabulary:
        stop = policy.stop_ids
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(stop[0]) if stop else None
    return tokenizer


def _never_win(model: Any, ids: range, rare: Tensor, untie: bool) -> None:
    """Give these ids the mean of the rare tokens' rows in the head, which is untied from the embeddings.

    Their logit is the mean of the rare ones, so it is below the highest whatever the hidden state, and their
    probability the geometric mean of the rare ones'.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings().weight
    if head is None or not ids or (head.weight is table and not untie):
        return
    if head.weight is table:
        head.weight = nn.Parameter(table.detach().clone(), requires_grad=False)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    wanted = torch.tensor(list(ids), device=head.weight.device)
    for parameter in (head.weight, getattr(head, "bias", None)):
        if parameter is not None:
            mean = parameter.data[rare.to(wanted.device)].float().mean(0)
            parameter.data[wanted] = mean.to(parameter.dtype)


def _as_token_0(model: Any, name: str, ids: Sequence[int], size: int) -> None:
    """Give these ids token 0's row in a table, which gets ``size`` rows if it has fewer."""
    module = model.get_submodule(name)
    table, before = module.weight, len(module.weight)
    if before < size:
        more = table.data[:1].expand(size - before, -1)
        module.weight = nn.Parameter(torch.cat([table.data, more]), requires_grad=False)
        module.num_embeddings = size
        # Some setting has the number of rows; what else it may be called, an export that is loaded shows.
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            for key, value in config.to_dict().items():
                if "vocab" in key and value == before:
                    setattr(config, key, size)
    module.weight.data[list(ids)] = module.weight.data[0].clone()
