"""What the package raises when something cannot be done, and why not."""

from __future__ import annotations

from quark_fast.files.safe_text import clean


class UsageError(ValueError):
    """What the user asked for cannot be done. The message is one line: the value and the fix."""

    def __str__(self) -> str:
        # What it quotes (a value, the error of a reward) may have many lines, no end, and steer the terminal.
        text = clean(" ".join(super().__str__().split("\n")))
        return text if len(text) <= 2000 else f"{text[:1000]} [...] {text[-900:]}"


class NotUploaded(UsageError):
    """The run is finished, but its model could not be uploaded to the hub."""


class OtherProcessFailed(Exception):
    """Another process failed and has reported it; this one only stops."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; ``--resume`` goes on with what is in the run folder."""
