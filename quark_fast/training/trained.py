"""What ``Trainer.train`` returns: the run folder, and what lies in it, read when it is asked for."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from quark_fast.files.safe_text import clean
from quark_fast.report.files import read_run
from quark_fast.report.tables import as_text


@dataclass(frozen=True, repr=False)
class TrainedRun(os.PathLike[str]):
    """A finished run. It is a path, that of its folder; shown, it is its headline and its table.

    Attributes:
        folder: the run folder, by its whole path: a notebook may be elsewhere when it is read.
        trust_remote_code: run what Python code the model brings along; the run's own setting.
    """

    folder: Path
    trust_remote_code: bool = False

    def __fspath__(self) -> str:
        return os.fspath(self.folder)

    @functools.cached_property
    def table(self) -> dict[str, Any]:
        """``evaluation.json``: the rows of the table with metrics and intervals; {} if not evaluated."""
        return dict(read_run(self.folder).evaluation)

    @functools.cached_property
    def model(self) -> Any:
        """The exported model, as transformers loads it; ``tokenizer`` puts the best reward token in front."""
        return AutoModelForCausalLM.from_pretrained(
            self.folder / "model", trust_remote_code=self.trust_remote_code
        )

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of ``model``."""
        return AutoTokenizer.from_pretrained(self.folder / "model", trust_remote_code=self.trust_remote_code)

    def __repr__(self) -> str:
        shown = f"run folder {clean(str(self.folder))}"
        return f"{shown}\n{as_text(self.table)}" if self.table else shown
