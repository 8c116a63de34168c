"""Loads the models that are compared, one at a time, with the rows that each is to sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quark_fast.config import Config
from quark_fast.data.chat import writes_opening
from quark_fast.data.row import is_chat
from quark_fast.data.tokenizer import export_prefix, opening_ids
from quark_fast.evaluation.open_run import open_run
from quark_fast.evaluation.protocol import EvaluationProtocol, PromptSet
from quark_fast.evaluation.subjects import Model, Plain, Run, source_of
from quark_fast.evaluation.table_rows import TableRow, table_rows
from quark_fast.model.check_reading import check_reading
from quark_fast.model.loading import frozen, load_tokenizer
from quark_fast.model.policy import Policy
from quark_fast.report.results import BASE


@dataclass(frozen=True)
class OpenModel:
    """A model that is loaded, and the rows that it is to sample."""

    policy: Policy
    reference: Callable[[], Any]
    rows: list[TableRow]

    @property
    def samples_base(self) -> bool:
        return any(row.base for row in self.rows)


class Models:
    """The runs and plain models that are compared.

    Each base model is sampled once for each prefix that stands before its prompts, by the first that has it.

    Args:
        models: by short name.
        asked: ``eval_rows`` and ``eval_guidance`` in place of each run's own; None: its own.
        domains: the prompts of each table.
    Attributes:
        bases: (base model, its prefix; None: what its own tokenizer puts there) of each.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        protocol: EvaluationProtocol,
        asked: Mapping[str, str | None],
        domains: Iterable[PromptSet],
    ) -> None:
        self.models, self.protocol = models, protocol
        rows = (row for domain in domains for row in domain.rows)
        self.chat = next((row["messages"] for row in rows if is_chat(row)), None)
        self.asked: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        self.trust = protocol.config.trust_remote_code
        # A plain model that a run started from gets that run's prefix: it is the run's base model.
        prefixes: dict[str, list[int]] = {}
        of_run: dict[str, list[int]] = {}
        for label, model in models.items():
            if isinstance(model, Run):
                of_run[label] = export_prefix(load_tokenizer(model.tokenizer_at, self.trust))
                prefixes.setdefault(source_of(model.base), of_run[label])
        self.bases = {
            label: (source := source_of(model.base), of_run.get(label, prefixes.get(source)))
            for label, model in models.items()
        }

    def same_base(self, label: str) -> list[str]:
        """Those with the base model and prefix of one of them; the first samples it."""
        return [other for other, base in self.bases.items() if base == self.bases[label]]

    def settings_of(self, run: Run) -> Config:
        """A run's settings with what was asked for in their place: they choose its rows."""
        asked = self.asked
        if asked.get("eval_guidance") and run.config.eval_rows == "best":
            asked = {"eval_rows": "ends"} | asked  # the best token alone would leave out the w asked for
        return dataclasses.replace(run.config, **asked)

    def open(self, label: str) -> OpenModel:
        """Load one of them."""
        model, with_base = self.models[label], self.same_base(label)[0] == label
        if isinstance(model, Plain):
            rows = [TableRow(BASE, base=True)] if with_base else []
            policy = open_plain(model.given, self.protocol, self.bases[label][1], self.chat)
            return OpenModel(policy, lambda: policy.model, rows)
        finished = open_run(model.folder, self.trust)
        config = self.settings_of(model)
        one = config.one_token
        rows = table_rows(finished.policy.quantiles, config.guidances(), config.eval_rows, one_token=one)
        rows = [row for row in rows if with_base or not row.base]
        return OpenModel(finished.policy, lambda: finished.reference, rows)


def open_plain(
    source: str,
    protocol: EvaluationProtocol,
    prefix: Sequence[int] | None = None,
    chat: list[dict[str, Any]] | None = None,
) -> Policy:
    """A model as it is, frozen.

    Args:
        prefix: None: what its own tokenizer puts before a text, or else its template before ``chat``.
    """
    policy = Policy.plain(source, protocol.dtype, prefix, protocol.config.trust_remote_code)
    if prefix is None and not policy.prefix and chat and writes_opening(policy.tokenizer, chat):
        policy.prefix = opening_ids(policy.tokenizer)
    check_reading(policy, frozen(policy.model, protocol.device), [None] * 3)
    return policy
