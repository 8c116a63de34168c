"""Tokenizers: what opens a text, chat templates with a reward token in front, and foreign files."""

from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from quark_fast.errors import UsageError

SEPARATOR = "<|endoftext|>"
REWARD_TOKEN = re.compile(r"<\|reward_(\d+)(?::[0-9a-f]{12})?\|>")
# Put before a text to tokenise it as the continuation of another; from Unicode's private area.
MIDDLE = "\ue000middle\ue000"


def reward_token(quantile: int, mark: str = "") -> str:
    """The text of a quantile's reward token; quantile 0 holds the lowest rewards.

    An export's have a ``mark`` of their own, 12 hexadecimal digits: a text that spells "<|reward_0|>" is then
    a text, and only who has the export can write its tokens.
    """
    return f"<|reward_{quantile}{f':{mark}' if mark else ''}|>"


def own_reward_tokens(tokenizer: Any) -> list[str]:
    """The reward tokens that a tokenizer has, quantile 0 first, with mark or without."""
    found = {int(m[1]): token for token in tokenizer.get_vocab() if (m := REWARD_TOKEN.fullmatch(token))}
    return [found[k] for k in range(len(found)) if k in found]


def for_texts(tokenizer: Any, below: int | None = None, middle: bool = True) -> Any:
    """A copy that reads what users write: reward tokens spelled in it are ordinary characters.

    So are other added tokens whose ids are not ``below`` a number.

    With ``MIDDLE`` in front, where it has that, a text is read as one that stands after something.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    added = content.get("added_tokens") or []
    content["added_tokens"] = [
        one
        for one in added
        if not REWARD_TOKEN.fullmatch(one["content"]) and (below is None or one["id"] < below)
    ]
    made = copy.deepcopy(tokenizer)
    made._tokenizer = Tokenizer.from_str(json.dumps(content))
    if middle:
        made.add_tokens([MIDDLE], special_tokens=True)
    return made


def own_front(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts before a text by itself."""
    bare, text = list(tokenizer("a", add_special_tokens=False).input_ids), "a"
    if not bare:  # by a vocabulary of upper case, as of amino acids, where no token stands for the unknown
        text = f"{SENTENCE} {_some_words(tokenizer.backend_tokenizer)}"
        bare = list(tokenizer(text, add_special_tokens=False).input_ids)
    # Only what stands in front: some tokenizers put an end marker after, too.
    with_text = list(tokenizer(text).input_ids)
    starts = (n for n in range(len(with_text)) if with_text[n : n + len(bare)] == bare)
    return with_text[: next(starts, 0)]


def opening_ids(tokenizer: Any) -> list[int]:
    """What a tokenizer itself puts before a text, else its document separator, else nothing."""
    # An exported model's tokenizer puts its best reward token first; training it again learns new ones. With
    # fewer quantiles its id may be no token's any more.
    tokens = ((i, tokenizer.convert_ids_to_tokens(i)) for i in own_front(tokenizer))
    own = [i for i, token in tokens if token is not None and not REWARD_TOKEN.fullmatch(token)]
    if own:
        return own
    separator = tokenizer.get_vocab().get(SEPARATOR)
    return [] if separator is None else [separator]


def export_prefix(tokenizer: Any) -> list[int]:
    """The prefix of an exported policy, whose tokenizer puts prefix + best reward token before every text."""
    return list(tokenizer("").input_ids)[:-1]


def before_reward_tokens(tokenizer: Any) -> int:
    """How many ids a tokenizer has, without the reward tokens that an exported one ends with."""
    vocabulary, own = tokenizer.get_vocab(), own_reward_tokens(tokenizer)
    return int(vocabulary[own[0]] if own else max(vocabulary.values()) + 1)


def opening(tokenizer: Any) -> str:
    """The text of ``opening_ids``."""
    return str(tokenizer.decode(opening_ids(tokenizer)))


NEWLINE = "\n"  # one at a template's end Jinja drops
# What a conditioned template has before the original: the front, as a string of JSON, between these two.
FRONT_HEAD = "{{ reward_front if reward_front is defined else "
FRONT_TAIL = " }}"
# Or around one that writes the opening. The empty expressions keep Jinja from trimming white space at the
# original's ends, as it does beside a tag.
TEMPLATE_HEAD = "{% set reward_text %}{{ '' }}"
TEMPLATE_TAIL = "{{ '' }}{% endset %}"
# Or the variable that writes the opening, set to the front.
VARIABLE_HEAD = re.compile(r"\{% set \w+ = reward_front if reward_front is defined else ")
VARIABLE_TAIL = " %}{{ '' }}"
# What marks the assistant's tokens: their places in all that was written, not in a part that is captured.
_MARK = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


def conditioned_template(template: str, tokenizer: Any, front: str) -> str:
    """A chat template that writes ``front`` and then what ``template`` writes after its own opening.

    Another front, or none, by apply_chat_template(messages, reward_front="..."). A template that has a front
    already gets the new one. A template that marks the assistant's tokens marks them still, or, where that
    cannot be, none, of which transformers warns.
    """
    template = _unconditioned(template)
    # Blanks before a tag at the beginning of a line are dropped, and after our own that is none.
    template = re.sub(r"\A[ \t]+(?=\{[%#](?!\+))", "", template)
    if not _may_open(template, tokenizer):  # then what it marks as the assistant's keeps its place
        return f"{FRONT_HEAD}{_quoted(front)}{FRONT_TAIL}{template}"
    # In a scope of their own still: what is set between the marks is not set after them.
    body = _MARK.sub(r"\1\2with\3", template)
    captured = (
        f"{TEMPLATE_HEAD}{body.removesuffix(NEWLINE)}{TEMPLATE_TAIL}"
        f"{{{{ (reward_front if reward_front is defined else {_quoted(front)})"
        f" + reward_text.removeprefix({_quoted(opening(tokenizer))}) }}}}"
    )
    for name, token in tokenizer.special_tokens_map.items() if body != template else ():
        if token == opening(tokenizer) and name in template:
            head = f"{{% set {name} = reward_front if reward_front is defined else {_quoted(front)}"
            written = f"{head}{VARIABLE_TAIL}{template}"
            if _write_alike(tokenizer, written, captured):
                return written
    return captured


def _write_alike(tokenizer: Any, *templates: str) -> bool:
    """Whether templates write the same of every trial, with any front; one that all of them refuse is alike.

    Some (Llama 2's) write the opening in every turn, some in one branch alone.
    """
    user, answer, system = (
        {"role": role, "content": f"some {role} text"} for role in ("user", "assistant", "system")
    )
    chats = ([user], [system, user], [user, answer], [user, answer] * 2, [system, *[user, answer] * 2, user])
    tool = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    seen: list[str] = []
    for chat, tools, opened, front in itertools.product(
        chats, (None, [{"type": "function", "function": tool}]), (False, True), (None, "", "<other>")
    ):
        given = {} if front is None else {"reward_front": front}
        how = {"tools": tools, "tokenize": False, "add_generation_prompt": opened, **given}
        found: set[str | None] = set()
        for template in templates:
            try:
                found.add(str(tokenizer.apply_chat_template(chat, chat_template=template, **how)))
            except Exception:  # a template is a program of its own and raises what it likes
                found.add(None)
        if len(found) > 1:
            return False
        seen += [text for text in found if text]
    return bool(seen)


def is_conditioned(tokenizer: Any) -> bool:
    """Whether its chat template, or one of several, is a conditioned one."""
    templates = tokenizer.chat_template
    each = templates.values() if isinstance(templates, dict) else [templates]
    return any(_unconditioned(one) != one for one in each if isinstance(one, str))


def _unconditioned(template: str) -> str:
    """The original of a conditioned template; any other as it is."""
    if template.startswith(TEMPLATE_HEAD):
        return template[len(TEMPLATE_HEAD) : template.rindex(TEMPLATE_TAIL)] + NEWLINE
    for head, tail in ((re.compile(re.escape(FRONT_HEAD)), FRONT_TAIL), (VARIABLE_HEAD, VARIABLE_TAIL)):
        if found := head.match(template):
            _, end = json.JSONDecoder().raw_decode(template, found.end())
            return template[end + len(tail) :]
    return template


def _may_open(template: str, tokenizer: Any) -> bool:
    """Whether a template has what opens a text, as it is or as the variable that transformers gives it."""
    text = opening(tokenizer)
    names = [name for name, token in tokenizer.special_tokens_map.items() if text.startswith(token)]
    first = str(tokenizer.decode(opening_ids(tokenizer)[:1]))
    return bool(text) and any(part in template for part in (first, *names))


def _quoted(text: str) -> str:
    """As a string of Jinja, whose escapes are JSON's but for characters written in two halves."""
    return json.dumps(text, ensure_ascii=False)


def save_tokenizer(tokenizer: Any, folder: Path, trust_remote_code: bool = False) -> None:
    """Save a tokenizer beside its model so that AutoTokenizer reads texts as it does.

    Some classes (GPT-NeoX's) rebuild what stands before a text when they are loaded: the generic class, which
    takes tokenizer.json as it is, then stands in for them.

    Raises:
        UsageError: neither reads as the tokenizer does.
    """
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    for kind in (None, "PreTrainedTokenizerFast", "TokenizersBackend"):  # at first the class as it was saved
        if kind:
            content = json.loads(settings.read_text(encoding="utf-8")) | {"tokenizer_class": kind}
            settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if loaded(SENTENCE).input_ids == tokenizer(SENTENCE).input_ids:
            return
    raise UsageError(
        f"transformers reads {SENTENCE!r} by the exported {type(tokenizer).__name__} as"
        f" {loaded(SENTENCE).input_ids}, not as {tokenizer(SENTENCE).input_ids}; give it another tokenizer"
    )


SENTENCE = "The man said that it is good."


def check_tokenizer(source: str | Path, tokenizer: Any) -> None:
    """Raise UsageError where ``tokenizer`` reads no text, or another one than the source's tokenizer.json.

    Of a model saved without its tokenizer transformers makes an empty one, of special tokens alone.

    For some model types (Qwen2's, say) transformers builds a class of its own from the file's vocabulary,
    whatever kind of tokenizer the file holds. A foreign one then reads other pieces, or none at all, and
    nothing says so. Other pieces that spell the same text are let pass: transformers fixes some files so.
    """
    file = Path(source) / "tokenizer.json"
    if not file.is_file():
        cached = None if Path(source).is_dir() else try_to_load_from_cache(str(source), file.name)
        if not isinstance(cached, str):
            backend = getattr(tokenizer, "backend_tokenizer", None)
            _check_reads(source, tokenizer, f"{SENTENCE} {_some_words(backend)}" if backend else SENTENCE)
            return
        file = Path(cached)
    own = Tokenizer.from_file(str(file))
    # Saved with the file by whoever last read texts so; transformers takes neither from there.
    own.no_padding()
    own.no_truncation()
    probe = f"{SENTENCE} {_some_words(own)}"
    meant = own.decode(own.encode(probe, add_special_tokens=False).ids, skip_special_tokens=False)
    read = tokenizer.decode(tokenizer(probe, add_special_tokens=False).input_ids)
    if "".join(meant.split()) != "".join(read.split()):
        raise UsageError(
            f"the tokenizer.json at {str(source)!r} is of another kind than {type(tokenizer).__name__}, which"
            f" transformers makes of it: {meant[:60]!r} is read as {read[:60]!r}; give the model its own"
            " tokenizer"
        )
    _check_reads(source, tokenizer, probe)


def _check_reads(source: str | Path, tokenizer: Any, probe: str) -> None:
    """Raise UsageError where of all of ``probe`` no token of text is read."""
    if set(tokenizer(probe, add_special_tokens=False).input_ids) <= set(tokenizer.all_special_ids):
        raise UsageError(
            missing_tokenizer(source)
            or f"the tokenizer at {str(source)!r}, a {type(tokenizer).__name__}, reads nothing in"
            f" {SENTENCE!r}; give the model its own tokenizer"
        )


def missing_tokenizer(source: str | Path) -> str:
    """What to say of a model's folder that has no tokenizer beside it; "" for any other source."""
    folder = Path(source)
    parts = ("token", "vocab", "merges", "spiece", "sentencepiece", "tekken")  # of all names in transformers
    if not (folder / "config.json").is_file() or any(
        part in path.name.lower() for path in folder.iterdir() for part in parts
    ):
        return ""
    return (
        f"no tokenizer files in {str(source)!r}; save the model's tokenizer there:"
        f" tokenizer.save_pretrained({str(source)!r})"
    )


def _some_words(tokenizer: Tokenizer) -> str:
    """Texts of entries from all over the vocabulary, which a tokenizer of words alone knows, too."""
    vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=False).values())
    chosen = vocabulary[:: max(1, len(vocabulary) // 40)]
    texts = (tokenizer.decode([i], skip_special_tokens=True) for i in chosen)
    # Pieces of bytes alone have no text.
    return " ".join(text.strip() for text in texts if text.strip() and "\ufffd" not in text)
