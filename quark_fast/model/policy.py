"""The policy: a causal language model, its tokenizer and one learned reward token per quantile."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from quark_fast.config import Config
from quark_fast.data.tokenizer import (
    MIDDLE,
    SEPARATOR,
    before_reward_tokens,
    export_prefix,
    for_texts,
    opening,
    opening_ids,
    own_front,
    own_reward_tokens,
    reward_token,
)
from quark_fast.errors import UsageError
from quark_fast.model.loading import check_not_quantised, load_pretrained, processor_files, stored_dtype
from quark_fast.model.lora import Lora, add_adapters
from quark_fast.model.reading import Reading
from quark_fast.model.reward_embedding import RewardEmbedding
from quark_fast.model.structure import LONGEST_PROMPT, learned_positions, positions
from quark_fast.runtime.distributed import assign, whole
from quark_fast.runtime.seeds import seed_for

HALF = "\ufffd"  # what a part of a character decodes to


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
        reading: how the model is read right, ``check_reading.py`` finds out.
        processor_files: of its source, by name, which an export gets, too.
        other_tables: modules beside the input embedding that look up ids; they see reward tokens as token 0.
        unsharded: a whole model like ``model`` before it had reward tokens; needed to copy a sharded one.
    """

    stored_dtype = torch.float32
    trust_remote_code = False
    reading = Reading()
    processor_files: Mapping[str, str] = {}
    unsharded: Any = None

    def __init__(self, model: Any, tokenizer: Any, quantiles: int, prefix: str = "auto") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.other_tables: list[str] = []
        own = {name: buffer.dtype for name, buffer in model.named_buffers()}
        own |= {
            name: weight.dtype for name, weight in model.named_parameters() if weight.dtype != model.dtype
        }
        # What has a dtype of its own in a model loaded in a dtype: ``copies._own_dtypes`` adds others.
        self._dtypes: dict[torch.dtype, dict[str, torch.dtype]] = {model.dtype: own}
        auto = prefix == "auto"
        self.prefix_text = opening(tokenizer) if auto else prefix
        self.prefix: list[int] = opening_ids(tokenizer) if auto else []
        if not auto and prefix:
            self.prefix = list(tokenizer(prefix, add_special_tokens=False).input_ids)
        rows, learned = len(model.get_input_embeddings().weight), learned_positions(model)
        self.positions = min((n for n in (positions(model.config), learned) if n is not None), default=None)
        tokens, known = own_reward_tokens(tokenizer), tokenizer.get_vocab()  # of an export
        # Tokens that somebody gave it since have rows of their own, and without its reward tokens other ids.
        end = known[tokens[-1]] if tokens else rows
        since = [token for token, i in known.items() if end < i < rows]
        exported = len(tokens) == quantiles > 0
        if not exported:
            tokens = [reward_token(k) for k in range(quantiles)]
            self.tokenizer = tokenizer = for_texts(tokenizer, rows, middle=False) if tokens else tokenizer
        tokenizer.add_tokens(tokens, special_tokens=True)
        self.reward_ids: list[int] = tokenizer.convert_tokens_to_ids(tokens)
        # A plain policy (K = 0) of an exported model: its reward tokens may be read, but not sampled.
        first = self.reward_ids[0] if tokens else before_reward_tokens(tokenizer)
        # The tokenizer may have special tokens beyond the table, such as those of images.
        self.vocabulary = min(first, rows)
        self.text_tokenizer = for_texts(tokenizer, self.vocabulary)
        self._some_text = list(self.text_tokenizer("a", add_special_tokens=False).input_ids)
        last = rows if exported else len(tokenizer)
        found = sorted((i, token) for token, i in tokenizer.get_vocab().items() if first <= i < last)
        found_after = [*since, *(token for _, token in found)]
        if tokens and found_after != tokens:
            other = next((token for token in found_after if token not in tokens), tokens[0])
            raise UsageError(
                f"{other!r} of the tokenizer stands among or after the {quantiles} reward tokens, which must"
                " be its last ids; its own ids need to be without gaps, and its earlier reward tokens no more"
            )
        eos = model.generation_config.eos_token_id
        ends = eos if isinstance(eos, list) else [eos]
        if not all(i is None or isinstance(i, int) for i in ends):
            raise UsageError(f"the model's generation_config.json has eos_token_id = {eos!r}; give ids")
        stop = {tokenizer.eos_token_id, tokenizer.get_vocab().get(SEPARATOR), *ends}
        self.stop_ids = sorted(i for i in stop if i is not None and 0 <= i < self.vocabulary)
        # A tokenizer need not call its end of turn special, and would spell it out.
        self.end_markers = set(self.stop_ids) & {*getattr(tokenizer, "added_tokens_decoder", ())}

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
                them, or where one has no token, rows start at Normal(mean, std) of the table, per dimension,
                as the paper's do.
            lora: train adapters beside the weights. The weights then stay as they are stored where that is
                in ``low``, the dtype of the reference, which then shares them (``shared_reference``).
            trust_remote_code: run what Python code the source brings along.
        """
        stored = stored_dtype(source, trust_remote_code)
        dtype = low if lora is not None and stored == low else torch.float32
        model, tokenizer = load_pretrained(source, dtype, trust_remote_code=trust_remote_code)
        check_not_quantised(source, model)
        policy = cls(model, tokenizer, quantiles, prefix)
        policy.stored_dtype, policy.trust_remote_code = stored, trust_remote_code
        policy.processor_files = processor_files(source)
        base = model.get_input_embeddings()
        table = base.weight.detach()[: policy.vocabulary].float()
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in words or ()]
        if ids and all(ids):  # a tokenizer need not read every word
            rows = torch.stack([table[row].mean(0) for row in ids])
        else:
            generator = torch.Generator().manual_seed(seed_for(seed, "reward tokens"))
            noise = torch.randn(quantiles, table.shape[1], generator=generator)
            rows = table.mean(0) + table.std(0) * noise
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
        hide_reward_tokens(self.model, tables, self.vocabulary)

    @property
    def quantiles(self) -> int:
        """K, the number of reward tokens."""
        return len(self.reward_ids)

    def encode(self, prompt: str, max_tokens: int = 0, chat: bool = False) -> list[int]:
        """A prompt's ids without any prefix; with ``max_tokens`` the last so many of them.

        A text is tokenised as the beginning of a document. A chat is tokenised as the continuation of what
        stands in front, prefix or best token, as the template writes it: there sentencepiece tokenizers put
        no mark of a word's beginning. Reward tokens spelled in either are ordinary characters.
        """
        front = self.in_front(chat)
        ids = list(self.text_tokenizer(front + prompt, add_special_tokens=False).input_ids)
        ids = ids[1:] if front else ids
        return ids[-max_tokens:] if max_tokens else ids

    def in_front(self, chat: bool) -> str:
        """What a prompt is tokenised after: ``MIDDLE``, whose one token then goes, or "", nothing."""
        return MIDDLE if chat and (self.quantiles > 0 or self.prefix) else ""

    def encode_completion(
        self, prompt: str, prompt_ids: Sequence[int], completion: str, chat: bool = False
    ) -> list[int] | None:
        """The ids of a text as the model writes it after a prompt, without an end.

        Tokenised together with the prompt, where that leaves the prompt's ids as they are; else after some
        other text. None: nothing found decodes to the completion, or what is read alike, after that prompt.
        """
        for front, continues in ((prompt, chat), ("", True), ("\n", False)):
            before, together = (self.encode(text, chat=continues) for text in (front, front + completion))
            ids = together[len(before) :]
            if together[: len(before)] == before and self._alike(self.decode(ids, prompt_ids), completion):
                return ids
        return None

    def _alike(self, a: str, b: str) -> bool:
        """Whether the tokenizer reads two texts alike: some put an accent and its letter together first."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        normalizer = None if backend is None else backend.normalizer
        return a == b or (
            normalizer is not None and normalizer.normalize_str(a) == normalizer.normalize_str(b)
        )

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

    def check_fits(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        """Raise UsageError for a prompt too long for the model's positions, or empty with no prefix."""
        longest = max(map(len, prompts))
        limit = self.positions
        needed = len(self.prefix) + 1 + longest + new_tokens
        if limit is not None and needed > limit:
            raise UsageError(
                f"a prompt of {longest} tokens needs {needed} positions with prefix, reward token and"
                f" {new_tokens} new tokens, but the model has {limit}; give a shorter one, or lower"
                " max_new_tokens"
            )
        if not self.prefix and min(map(len, prompts)) == 0:
            raise UsageError("a prompt has no token, and this model no prefix: nothing to continue")

    def decode(self, completion: Sequence[int], prompt: Sequence[int] | None = None) -> str:
        """What a completion adds to its prompt's text, without special tokens and its end; nothing tidied up.

        Alone its text may be another: sentencepiece tokenizers drop a text's first space, and a character may
        begin in the prompt. An empty prompt is the beginning of a text; None: after some prompt or other.
        """
        if completion and completion[-1] in self.end_markers:
            completion = completion[:-1]
        # So many tokens that what stands before them has no part in how a token is spelled; more where they
        # begin within a character, whose four bytes may be a token each.
        for most in range(16, 20):
            before = self._some_text if prompt is None else list(prompt[-most:])
            alone = self._spell(before)
            if not alone.startswith(HALF):
                break
        together = self._spell([*before, *completion])
        if together.endswith(HALF):
            # Cut within a character, for which some tokenizers give up the whole ones before it, too.
            shorter = (self._spell([*before, *completion[:-cut]]) + HALF for cut in (1, 2, 3))
            together = max([together, *shorter], key=_whole_characters)
        common = (i for i, (a, b) in enumerate(zip(alone, together, strict=False)) if a != b)
        return together[next(common, min(len(alone), len(together))) :]

    def _spell(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def conditioned(self, prompt: Sequence[int], quantile: int | None) -> list[int]:
        """prefix + reward token + prompt; without a quantile, prefix + prompt: what the reference sees."""
        token = [] if quantile is None else [self.reward_ids[quantile]]
        return [*self.prefix, *token, *prompt]

    @torch.no_grad()
    def place_untrained_rows(self, trained: Collection[int]) -> None:
        """Put the rows of quantiles whose token was not trained between those of their trained neighbours.

        Row k becomes ((b - k) row_a + (k - a) row_b) / (b - a), with a < k < b the nearest trained
        quantiles; beyond the last one it is that one's. A row that was never trained has no meaning;
        interpolated it stands for something between its neighbours.
        """
        parameter = self.model.get_input_embeddings().rows
        rows = whole(parameter).clone()
        for k in set(range(self.quantiles)) - set(trained):
            below = max((t for t in trained if t < k), default=min(trained))
            above = min((t for t in trained if t > k), default=max(trained))
            weight = (k - below) / (above - below) if above > below else 0.0
            rows[k] = torch.lerp(rows[below], rows[above], weight)
        assign(parameter, rows)


def _whole_characters(text: str) -> int:
    """How many there are of those that take several bytes."""
    return sum(one > "\x7f" and one != HALF for one in text)


def hide_reward_tokens(model: Any, tables: Sequence[str], first_id: int) -> None:
    for name in tables:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs: (inputs[0].masked_fill(inputs[0] >= first_id, 0), *inputs[1:])
        )
