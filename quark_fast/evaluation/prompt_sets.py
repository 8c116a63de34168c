"""The prompts of a table: one set for all models, each of which reads them as its own token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from quark_fast.config import Config
from quark_fast.data.chat import Row, chat_template, given
from quark_fast.data.prompts import load_prompts
from quark_fast.errors import UsageError
from quark_fast.evaluation.held_out import HeldOut
from quark_fast.evaluation.protocol import EvaluationProtocol
from quark_fast.evaluation.saved_tables import OUT_OF_DOMAIN
from quark_fast.evaluation.subjects import Model, Run
from quark_fast.model.loading import load_tokenizer
from quark_fast.model.policy import Policy
from quark_fast.runtime.run_folder import HELD_OUT

Remark = Callable[[str], None]


@dataclass
class PromptSet:
    """The prompts of one table.

    Attributes:
        key: "" or OUT_OF_DOMAIN.
        held_out: each model's ids of them, by the model's short name.
    """

    key: str
    source: str
    rows: list[Row]
    held_out: dict[str, HeldOut] = field(default_factory=dict)

    def stage(self, name: str) -> str:
        """What a stage of the evaluation on these prompts is called."""
        return f"{name}, out of domain" if self.key else name

    def encode(self, label: str, policy: Policy, config: Config, remark: Remark) -> None:
        """Have a model read the prompts."""
        what = f"texts of {self.source}"
        held_out = HeldOut.encoded(policy, self.rows, config, what=what, tell=remark)
        policy.check_fits(held_out.ids, config.max_new_tokens)
        self.held_out[label] = held_out

    def keep_what_fits_all(self, remark: Remark) -> None:
        """Leave out prompts that are too long for one of the models: all rows have the same ones."""
        fitting = [{given(row) for row in held.rows} for held in self.held_out.values()]
        common = set.intersection(*fitting)
        if not common:
            raise UsageError(f"no text of {self.source} is short enough for all of the models")
        if left_out := max(map(len, fitting)) - len(common):
            remark(f"{left_out:,} texts of {self.source} left out: too long for one of the models")
        for label, held in self.held_out.items():
            kept = [i for i, row in enumerate(held.rows) if given(row) in common]
            rows, ids = [held.rows[i] for i in kept], [held.ids[i] for i in kept]
            self.held_out[label] = dataclasses.replace(held, rows=rows, ids=ids)

    def set_rows(self, rows: Sequence[Row]) -> None:
        """Give all models' prompts other columns."""
        self.held_out = {label: dataclasses.replace(one, rows=rows) for label, one in self.held_out.items()}


def load_prompt_sets(
    models: Sequence[Model],
    protocol: EvaluationProtocol,
    prompts: tuple[str | None, str | None],
    out_of_domain: tuple[str | None, str | None],
    remark: Remark,
) -> list[PromptSet]:
    """One set of prompts for each table; the first model's chat template renders messages.

    Args:
        prompts, out_of_domain: (file or data set, its column).
    """
    trust = protocol.config.trust_remote_code
    chat = chat_template(models[0].given, lambda: load_tokenizer(models[0].tokenizer_at, trust))
    run = next((model for model in models if isinstance(model, Run) and protocol.own_task), None)

    def load(key: str, source: str, column: str | None) -> PromptSet:
        loaded = load_prompts(source, column=column, chat=chat)
        remark(f"{source}: {loaded.counts}")
        return PromptSet(key, source, loaded.rows)

    source, column = prompts
    if source:
        own = load("", source, run.config.prompt_column if run and column is None else column)
    elif run:
        path = str(run.folder / HELD_OUT)
        own = PromptSet("", path, load_prompts(path).rows)
    else:
        own = PromptSet("", f"the task's own ({protocol.task.name})", protocol.task.prompts()[1])
    source, column = out_of_domain
    return [own, load(OUT_OF_DOMAIN, source, column)] if source else [own]
