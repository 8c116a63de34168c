"""The policy: a causal language model, its tokenizer and one learned reward token per quantile."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig

from quark_fast.config import Config
from quark_fast.data.row import Row, is_chat
from quark_fast.data.tokenizer import (
    MIDDLE,
    SEPARATOR,
    before_reward_tokens,
    conditioned_template,
    export_prefix,
    for_texts,
    opening,
    opening_ids,
    own_front,
    own_reward_tokens,
    reward_token,
    save_tokenizer,
)
from quark_fast.errors import UsageError
from quark_fast.model.export import as_token_0, never_win
from quark_fast.model.loading import decode_fast, frozen, load_pretrained, stored_dtype
from quark_fast.model.lora import Lora, add_adapters, drop_adapters, has_adapters, merge_adapters
from quark_fast.model.reading import Reading
from quark_fast.model.reward_embedding import RewardEmbedding
from quark_fast.model.rounding import conversion
from quark_fast.model.structure import LONGEST_PROMPT, learned_positions, positions
from quark_fast.runtime.distributed import assign, whole
from quark_fast.runtime.seeds import seed_for


class Policy:
    """A model with its tokenizer, reward tokens and the prefix that stands before them.

    Attributes:
        model: a transformers causal LM.
        tokenizer: its tokenizer, which knows the reward tokens.
        reward_ids: id of each quantile's reward token, lowest reward first.
        vocabulary: base vocabulary V, the tokenizer's before the reward tokens; logits at and beyond V
            (padding of the table, reward tokens) never count.
        positions: how many tokens the model can read; None: no limit is known.
        prefix: ids before the reward token. The first position of a causal transformer is an attention
            sink whose content is hardly read, so the token that opens a document stands there.
        prefix_text: what spells the prefix where a text has to.
        stop_ids: the ids that end a completion: end of text, end of turn, document separator.
        stored_dtype: of the weights at the model's source.
        trust_remote_code: whether what Python code the source brings along may run.
        reading: how the model is read right, ``checks.py`` finds out.
        other_tables: modules beside the input embedding that look up ids; they see reward tokens as token 0.
        unsharded: a whole model like ``model`` before it had reward tokens; needed to copy a sharded one.
    """

    stored_dtype = torch.float32
    trust_remote_code = False
    reading = Reading()
    unsharded: Any = None

    def __init__(self, model: Any, tokenizer: Any, quantiles: int, prefix: str = "auto") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.other_tables: list[str] = []
        self._buffers: dict[torch.dtype, dict[str, torch.dtype]] = {}
        auto = prefix == "auto"
        self.prefix_text = opening(tokenizer) if auto else prefix
        self.prefix: list[int] = opening_ids(tokenizer) if auto else []
        if not auto and prefix:
            self.prefix = list(tokenizer(prefix, add_special_tokens=False).input_ids)
        rows, found = len(model.get_input_embeddings().weight), learned_positions(model)
        self.positions = min((n for n in (positions(model.config), found) if n is not None), default=None)
        tokens = own_reward_tokens(tokenizer)  # of an export
        exported = len(tokens) == quantiles > 0
        if not exported:
            tokens = [reward_token(k) for k in range(quantiles)]
            self.tokenizer = tokenizer = for_texts(tokenizer, rows, middle=False) if tokens else tokenizer
        tokenizer.add_tokens(tokens, special_tokens=True)
        self.reward_ids: list[int] = tokenizer.convert_tokens_to_ids(tokens)
        # Without reward tokens of its own a policy reads those of an export, but writes none, either.
        first = self.reward_ids[0] if tokens else before_reward_tokens(tokenizer)
        # Special tokens behind the table, of images say, are none of the model's.
        self.vocabulary = min(first, rows)
        self.text_tokenizer = for_texts(tokenizer, self.vocabulary)
        self._some_text = list(self.text_tokenizer("a", add_special_tokens=False).input_ids)
        last = rows if exported else len(tokenizer)
        behind = sorted((i, token) for token, i in tokenizer.get_vocab().items() if first <= i < last)
        if tokens and [token for _, token in behind] != tokens:
            other = next((token for _, token in behind if token not in tokens), tokens[0])
            raise UsageError(
                f"{other!r} of the tokenizer stands among or behind the {quantiles} reward tokens, which must"
                " be its last ids; its own ids need to be without gaps, and its earlier reward tokens no more"
            )
        eos = model.generation_config.eos_token_id
        ends = eos if isinstance(eos, list) else [eos]
        if not all(i is None or isinstance(i, int) for i in ends):
            raise UsageError(f"the model's generation_config.json has eos_token_id = {eos!r}; give ids")
        stop = {tokenizer.eos_token_id, tokenizer.get_vocab().get(SEPARATOR), *ends}
        self.stop_ids = sorted(i for i in stop if i is not None and 0 <= i < self.vocabulary)

    @classmethod
    def create(
        cls,
        source: str | Path,
        *,
        quantiles: int,
        prefix: str = "auto",
        words: Sequence[str] | None = None,
        seed: int = 0,
        lora: Lora | None = None,
        low: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> Self:
        """A policy ready to train: the model at ``source`` plus reward rows, all float32.

        Args:
            source: a transformers folder or hub name.
            words: a text naming each quantile, worst first, whose mean embedding starts its row; without
                them rows start at Normal(mean, std) of the table, per dimension, as the paper's do.
            lora: train adapters beside the weights. The weights then stay as they are stored where that is
                in ``low``, the dtype of the reference, which then shares them (``shared_reference``).
            trust_remote_code: run what Python code the source brings along.
        """
        stored = stored_dtype(source, trust_remote_code)
        dtype = low if lora is not None and stored == low else torch.float32
        model, tokenizer = load_pretrained(source, dtype, trust_remote_code=trust_remote_code)
        policy = cls(model, tokenizer, quantiles, prefix)
        policy.stored_dtype, policy.trust_remote_code = stored, trust_remote_code
        base = model.get_input_embeddings()
        table = base.weight.detach()[: policy.vocabulary].float()
        if words is None:
            generator = torch.Generator().manual_seed(seed_for(seed, "reward tokens"))
            noise = torch.randn(quantiles, table.shape[1], generator=generator)
            rows = table.mean(0) + table.std(0) * noise
        else:
            ids = [tokenizer(text, add_special_tokens=False).input_ids for text in words]
            rows = torch.stack([table[row].mean(0) for row in ids])
        if lora is not None:
            add_adapters(model, lora, seed_for(seed, "adapters"))
        model.set_input_embeddings(RewardEmbedding(base, policy.reward_ids[0], rows))
        return policy

    @classmethod
    def from_export(cls, folder: str | Path, dtype: torch.dtype, trust_remote_code: bool = False) -> Self:
        """The policy of an exported model, for sampling."""
        model, tokenizer = load_pretrained(folder, dtype, trust_remote_code=trust_remote_code)
        quantiles = len(own_reward_tokens(tokenizer))
        if quantiles < 1:
            raise UsageError(f"{folder} holds no reward tokens; give the folder of a finished run")
        policy = cls(model, tokenizer, quantiles, prefix="")
        policy.prefix = export_prefix(tokenizer)
        return policy

    @classmethod
    def plain(
        cls,
        source: str | Path,
        dtype: torch.dtype,
        prefix: Sequence[int] | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Any model as it is, for sampling: no reward tokens, K = 0.

        Args:
            prefix: ids before every prompt; default: what the tokenizer itself puts before a text, which for
                an exported model is its best reward token, too, and for many models nothing.
        """
        model, tokenizer = load_pretrained(source, dtype, trust_remote_code=trust_remote_code)
        policy = cls(model, tokenizer, 0, prefix="")
        policy.prefix = own_front(tokenizer) if prefix is None else list(prefix)
        return policy

    def keep_from(self, tables: Sequence[str]) -> None:
        """Show reward tokens to these modules as token 0."""
        self.other_tables += tables
        _hide_reward_tokens(self.model, tables, self.vocabulary)

    @property
    def quantiles(self) -> int:
        """K, the number of reward tokens."""
        return len(self.reward_ids)

    def encode(self, prompt: str, max_tokens: int = 0, chat: bool = False) -> list[int]:
        """A prompt's ids without any prefix; with ``max_tokens`` the last so many of them.

        A plain text is one by itself. A chat is a text that the exported template writes behind the best
        token, where sentencepiece tokenizers put no mark of a word's beginning. Reward tokens that are
        spelled in either are ordinary characters.
        """
        chat = chat and self.quantiles > 0  # a plain model's texts all begin alike
        front = MIDDLE if chat else ""
        ids = list(self.text_tokenizer(front + prompt, add_special_tokens=False).input_ids)
        return ids[chat:][-max_tokens:]

    def room_of(self, config: Config) -> int:
        """The longest prompt of a run, tokens; with ``prefix_tokens`` the longest text, read as it is."""
        return self.room(0 if config.prefix_tokens else config.max_new_tokens, config.max_prompt_tokens)

    def room(self, new_tokens: int, most: int = 0) -> int:
        """The longest prompt, tokens: what the positions leave beside prefix, reward token and new tokens.

        At most ``most``, of which 0 is ``LONGEST_PROMPT``.
        """
        limit = self.positions
        most = most or LONGEST_PROMPT
        return most if limit is None else min(most, limit - len(self.prefix) - 1 - new_tokens)

    def encode_rows(
        self,
        rows: Sequence[Row],
        max_tokens: int,
        prefix_tokens: int,
        *,
        cut: bool = False,
        what: str = "prompts",
        tell: Callable[[str], None] = lambda _: None,
    ) -> tuple[list[Row], list[list[int]], list[list[int]]]:
        """The rows with what is asked of the model, that as ids, and the ids of the rows' held-out texts.

        With ``prefix_tokens`` a row's text is held-out text, cut behind its first ``max_tokens`` tokens, and
        its first ``prefix_tokens`` are the prompt; rows without any token more are left out. With 0 a row's
        text is the prompt, and there are no held-out texts; rows of more than ``max_tokens`` are left out. A
        cut row keeps its whole text under ``text``.

        Args:
            cut: prompts that are too long are cut to their last tokens, but for chats.
            what: what the rows are called in the line that ``tell`` gets for those left out or cut.
        Raises:
            UsageError: no row is left.
        """
        if prefix_tokens == 0:
            return *self._encode_prompts(rows, max_tokens, cut, what, tell), []
        if prefix_tokens >= max_tokens:
            raise UsageError(
                f"prefix_tokens = {prefix_tokens} leaves no held-out text within the {max_tokens} tokens that"
                " a text may have; give fewer"
            )
        every = [self.text_tokenizer(row["prompt"], add_special_tokens=False).input_ids for row in rows]
        kept = [i for i, ids in enumerate(every) if len(ids) > prefix_tokens]
        if not kept:
            raise UsageError(
                f"none of {len(rows)} texts has more than prefix_tokens = {prefix_tokens} tokens; give longer"
                " texts, or another prefix_tokens"
            )
        texts = [list(every[i])[:max_tokens] for i in kept]
        prompts = [ids[:prefix_tokens] for ids in texts]
        asked = [
            {**rows[i], "prompt": self.decode(ids, prompt=[]), "text": rows[i]["prompt"]}
            for i, ids in zip(kept, prompts, strict=True)
        ]
        if len(kept) < len(rows):
            count = f"{len(rows) - len(kept):,} of {len(rows):,}"
            tell(f"{count} {what} left out: no longer than prefix_tokens = {prefix_tokens}")
        return asked, prompts, texts

    def _encode_prompts(
        self, rows: Sequence[Row], most: int, cut: bool, what: str, tell: Callable[[str], None]
    ) -> tuple[list[Row], list[list[int]]]:
        """Those of the rows that are not too long, and their ids."""
        if most < 1:
            raise UsageError(
                f"the model's {self.positions} positions leave no room for a prompt beside"
                " prefix, reward token and the new tokens; lower max_new_tokens"
            )
        every = [self.encode(row["prompt"], chat=is_chat(row)) for row in rows]
        long = [i for i, ids in enumerate(every) if len(ids) > most]
        shortened = {i for i in long if cut and not is_chat(rows[i])}
        kept = [i for i, ids in enumerate(every) if len(ids) <= most or i in shortened]
        if not kept:
            raise UsageError(
                f"none of {len(rows):,} {what} fits: the shortest has {min(map(len, every))} tokens, and"
                f" {most} is the limit (the model's positions: {self.positions or 'any'}); give"
                " shorter ones, lower max_new_tokens, raise max_prompt_tokens, or give --long-prompts cut"
            )
        if shortened:
            tell(f"{len(shortened):,} of {len(rows):,} {what} cut to their last {most:,} tokens")
        if len(kept) < len(rows):
            count = f"{len(rows) - len(kept):,} of {len(rows):,}"
            tell(
                f"{count} {what} left out: longer than {most:,} tokens (the longest {max(map(len, every)):,})"
            )
        return [rows[i] for i in kept], [every[i][-most:] for i in kept]

    def check_fits(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        """Raise UsageError for a prompt too long for the model's positions, or empty with no prefix."""
        longest = max(map(len, prompts))
        limit = self.positions
        needed = len(self.prefix) + 1 + longest + new_tokens
        if limit is not None and needed > limit:
            raise UsageError(
                f"a prompt of {longest} tokens needs {needed} positions with prefix, reward token and"
                f" {new_tokens} new tokens, but the model has {limit}; give a shorter one, or lower"
                " max_prompt_tokens or max_new_tokens"
            )
        if not self.prefix and min(map(len, prompts)) == 0:
            raise UsageError("a prompt has no token, and this model no prefix: nothing to continue")

    def decode(self, completion: Sequence[int], prompt: Sequence[int] | None = None) -> str:
        """What a completion adds to its prompt's text, special tokens left out, nothing tidied up.

        Alone its text may be another: sentencepiece tokenizers drop a text's first space, and a character may
        begin in the prompt. An empty prompt is the beginning of a text; None: behind some prompt or other.
        """
        # So many tokens that what stands before them has no part in how a token is spelled.
        before = self._some_text if prompt is None else list(prompt[-16:])
        alone, together = (
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (before, [*before, *completion])
        )
        common = (i for i, (a, b) in enumerate(zip(alone, together, strict=False)) if a != b)
        return str(together[next(common, min(len(alone), len(together))) :])

    def conditioned(self, prompt: Sequence[int], quantile: int | None) -> list[int]:
        """prefix + reward token + prompt; without a quantile, prefix + prompt: what the reference sees."""
        token = [] if quantile is None else [self.reward_ids[quantile]]
        return [*self.prefix, *token, *prompt]

    @torch.no_grad()
    def place_untrained_rows(self, shares: Sequence[float]) -> None:
        """Put the rows of quantiles that training drew nothing from between their trained neighbours.

        Row k becomes ((b - k) row_a + (k - a) row_b) / (b - a), with a < k < b the nearest quantiles of a
        share above 0; beyond the last such quantile it is that one's. A token that was never trained means
        nothing; on the line it means something between what its neighbours do.

        Args:
            shares: each quantile's share of the training draws, worst first.
        """
        parameter = self.model.get_input_embeddings().rows
        rows = whole(parameter).clone()
        trained = [k for k, share in enumerate(shares) if share > 0]
        for k in set(range(len(shares))) - set(trained):
            below = max((t for t in trained if t < k), default=min(trained))
            above = min((t for t in trained if t > k), default=max(trained))
            place = (k - below) / (above - below) if above > below else 0.0
            rows[k] = torch.lerp(rows[below], rows[above], place)
        assign(parameter, rows)

    def whole_copy(self, dtype: torch.dtype) -> Any:
        """A copy whose adapters, if any, are added to its weights.

        Of a sharded model it is a whole one on each process, all of which have to ask for it.
        """
        own = dict(self.model.named_parameters())
        sharded = any(isinstance(parameter, DTensor) for parameter in own.values())
        _forget_graphs(self.model)
        model = copy.deepcopy(self.unsharded if sharded else self.model)
        converted = conversion(dtype, self.stored_dtype)
        if sharded:
            embedding: RewardEmbedding = self.model.get_input_embeddings()
            rows = torch.empty(embedding.rows.shape, device=model.device)
            base = model.get_input_embeddings()
            model.set_input_embeddings(RewardEmbedding(base, embedding.first_id, rows))
            _hide_reward_tokens(model, self.other_tables, self.vocabulary)
        elif has_adapters(model):
            merge_adapters(model, converted)
        # Not model.to(dtype), which would round the rotary frequencies, too.
        self._cast_buffers(model, dtype)
        for name, parameter in model.named_parameters():
            if sharded:
                parameter.data = converted(whole(own[name].detach())).to(parameter.device)
            else:
                parameter.data = converted(parameter.data)
        model.config.dtype = dtype
        return model

    def freeze(self, device: torch.device) -> Any:
        """The model itself, for sampling alone from here on."""
        return frozen(self.model, device)

    def frozen_copy(self, dtype: torch.dtype) -> Any:
        """The model as it is now, for sampling: low precision, no gradients or adapters, fast decoding."""
        model = self.whole_copy(dtype).eval().requires_grad_(False)
        decode_fast(model)
        return model

    def exported_copy(self, dtype: torch.dtype) -> Any:
        """``frozen_copy`` of what an export holds, which is in the dtype that the model came in."""
        model = self.frozen_copy(self.stored_dtype)
        self._cast_buffers(model, dtype)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
        return model

    def _cast_buffers(self, model: Any, dtype: torch.dtype) -> None:
        """Give a copy's buffers the dtypes that they have in a model loaded in ``dtype``.

        Rotary frequencies are float32 in any; masks, decays or positions may not be.
        """
        if dtype not in self._buffers:
            self._buffers[dtype] = _buffer_dtypes(model, dtype)
        for name, buffer in model.named_buffers():
            wanted = self._buffers[dtype].get(name.replace(".base.", "."), buffer.dtype)
            if buffer.is_floating_point() and wanted.is_floating_point:
                buffer.data = buffer.data.to(wanted)

    def shared_reference(self, dtype: torch.dtype) -> Any | None:
        """The untouched model on the very weights that adapters stand beside; None where they have another
        dtype, or are trained themselves."""
        if not has_adapters(self.model) or self.model.get_input_embeddings().weight.dtype != dtype:
            return None
        _forget_graphs(self.model)
        # deepcopy takes what is in its memo for copied.
        model = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
        drop_adapters(model)
        model.set_input_embeddings(model.get_input_embeddings().base)
        model.eval()
        decode_fast(model)
        return model

    def export(self, folder: Path, dtype: torch.dtype, sampling: Mapping[str, Any] | None = None) -> None:
        """Write an ordinary transformers folder conditioned on the best reward token.

        Its tokenizer puts prefix + best token before every text, its chat template before every chat; nothing
        in it needs this package. Reward tokens are suppressed by its generation config, which not every
        engine reads, and have rows in the head that do not win: the mean of those of the least probable
        tokens, so that their probability is the geometric mean of these tokens'. A head that was tied to the
        embeddings is therefore a table of its own.

        Args:
            sampling: of the generation config, in transformers' words.
        """
        self.write_export(folder, self.whole_copy(dtype), sampling)

    def write_export(
        self,
        folder: Path,
        model: Any,
        sampling: Mapping[str, Any] | None = None,
        *,
        padding: bool = True,
        untie: bool = True,
    ) -> None:
        """``export`` of a ``whole_copy``, which is changed: one process may write what all had to make.

        Without ``padding``, for vLLM, the table ends with the last reward token, those are all that is to be
        suppressed, and the head stays as it is; so does a tied one without ``untie``.
        """
        embedding: RewardEmbedding = model.get_input_embeddings()
        rare = self._least_probable(model) if padding else None
        model.set_input_embeddings(embedding.base)
        size = max(embedding.weight.shape[0] if padding else 0, self.reward_ids[-1] + 1)
        mean = embedding.weight.detach()[: self.vocabulary].float().mean(0)
        model.resize_token_embeddings(size, mean_resizing=False)
        with torch.no_grad():
            table = model.get_input_embeddings().weight
            table[len(embedding.weight) :] = mean.to(table.dtype)  # not at random
            table[self.reward_ids] = embedding.rows
            for name in self.other_tables:
                as_token_0(model, name, self.reward_ids, size)
            if rare is not None:
                never_win(model, range(self.vocabulary, size), rare, untie)
        model.generation_config = self._generation_config(model.generation_config, size, sampling or {})
        model.save_pretrained(folder)
        mark = hashlib.sha256(embedding.rows.detach().float().cpu().numpy().tobytes()).hexdigest()[:12]
        # vLLM is told by their text which tokens not to sample.
        made = self._best_token_first(mark if padding else "")
        save_tokenizer(made, folder, self.trust_remote_code)

    def _generation_config(self, base: Any, size: int, sampling: Mapping[str, Any]) -> GenerationConfig:
        """How the export is to be sampled: as it was evaluated, whatever taste the base model came with.

        Reward tokens and the padding of the table are suppressed, with what the base model suppresses.
        """
        kept = {"cache_implementation": base.cache_implementation} if base.cache_implementation else {}
        return GenerationConfig(  # type: ignore[no-untyped-call]
            bos_token_id=base.bos_token_id,
            eos_token_id=self.stop_ids or base.eos_token_id,
            pad_token_id=(self.stop_ids or [0])[0] if base.pad_token_id is None else base.pad_token_id,
            suppress_tokens=sorted({*(base.suppress_tokens or ()), *range(self.vocabulary, size)}),
            **kept,
            **{"do_sample": True, **sampling},
        )

    @torch.no_grad()
    def _least_probable(self, model: Any) -> Tensor:
        """Base ids that ``model`` finds least probable all over random texts, with and without the front."""
        generator = torch.Generator().manual_seed(0)
        front = torch.tensor(self.conditioned([], self.quantiles - 1)).expand(8, -1)
        length = min(32, max(1, (self.positions or 32) - front.shape[1]))
        texts = torch.randint(self.vocabulary, (8, length), generator=generator)
        highest = torch.full((self.vocabulary,), -torch.inf)
        for ids in (texts, torch.cat([front, texts], dim=1)):
            logits = model(ids.to(model.device), use_cache=False).logits[..., : self.vocabulary]
            highest = torch.maximum(highest, logits.float().log_softmax(-1).amax((0, 1)).cpu())
        return highest.argsort()[: max(1, min(64, self.vocabulary // 64))]

    def _best_token_first(self, mark: str = "") -> Any:
        """A copy of the tokenizer that puts prefix + best reward token before every text and chat."""
        tokenizer = for_texts(self.tokenizer, middle=False)
        tokens = [reward_token(k, mark) for k in range(self.quantiles)]
        tokenizer.add_tokens(tokens, special_tokens=True)
        assert tokenizer.convert_tokens_to_ids(tokens) == self.reward_ids
        front = self.conditioned([], self.quantiles - 1)
        front_text = self.prefix_text + tokens[-1]
        own = self.tokenizer.chat_template
        if isinstance(own, dict):  # several, by name
            tokenizer.chat_template = {
                name: conditioned_template(each, self.tokenizer, front_text) for name, each in own.items()
            }
        elif own:
            tokenizer.chat_template = conditioned_template(own, self.tokenizer, front_text)
        backend: Tokenizer = tokenizer.backend_tokenizer
        # One name for the whole front: a template cannot spell tokens with a colon or a dollar sign.
        backend.post_processor = TemplateProcessing(
            single="front $A",
            pair="front $A $B",
            special_tokens=[
                {"id": "front", "ids": front, "tokens": tokenizer.convert_ids_to_tokens(front)},
            ],
        )
        # What batches need: some tokenizers (GPT-2's) name no padding, or pad where generation starts.
        # Saving writes the settings that the tokenizer was made with, not its attributes.
        tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side = "left"
        if tokenizer.pad_token is None and self.stop_ids:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self.stop_ids[0])
        return tokenizer


def _forget_graphs(model: Any) -> None:
    """Detach what modules keep of their last forward pass, such as a state: it could not be copied."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())


def _buffer_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Of a model of this kind when it is made in ``dtype``; nothing where it cannot be made without data."""
    try:
        with torch.device("meta"):
            made = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    except Exception:  # foreign code fails in any way; what does not fit then, checks.py tells
        return {}
    return {name: buffer.dtype for name, buffer in made.named_buffers()}


def _hide_reward_tokens(model: Any, tables: Sequence[str], first_id: int) -> None:
    for name in tables:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs: (inputs[0].masked_fill(inputs[0] >= first_id, 0), *inputs[1:])
        )
