"""What the package raises when something cannot be done, and why not."""

from __future__ import annotations

from pathlib import Path

from quark_fast.files.safe_text import clean

EXIT_STATUS = (
    "exit status: 0 done; 1 a bug, with its traceback; 2 what was asked for cannot be done; 3 the run\n"
    "diverged and stopped itself; 4 out of memory or disk; 5 finished, but the model is not on the hub;\n"
    "130 stopped by Ctrl-C or SIGTERM"
)


class UsageError(ValueError):
    """What the user asked for cannot be done. The message is one line: the value and the fix."""

    exit_status = 2

    def __str__(self) -> str:
        # What it quotes (a value, the error of a reward) may have many lines, no end, and steer the terminal.
        text = clean(" ".join(super().__str__().split("\n")))
        return text if len(text) <= 2000 else f"{text[:1000]} [...] {text[-900:]}"


class Diverged(UsageError):
    """The run stopped itself; its checkpoint holds the weights of before."""

    exit_status = 3


class OutOfResources(UsageError):
    """Memory or disk did not suffice; what was done is kept, and ``--resume`` goes on where there is more."""

    exit_status = 4


class NotUploaded(UsageError):
    """The run is finished, but its model could not be uploaded to the hub."""

    exit_status = 5


class OtherProcessFailed(Exception):
    """Another process failed and has reported it; this one only stops."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; ``--resume`` goes on with what is in the run folder."""


def other_weights(model: str | None, began: str, anew: str) -> UsageError:
    """That a base model is not the one that something, such as "the run in runs/a", began with."""
    return UsageError(
        f"{model or 'the embedded model'} has other weights than when {began} began: it was saved anew, or"
        f" another version of it is on the hub by now; put that one back, or {anew} another --output"
    )


def nor_folder(source: str | Path) -> str:
    """What an error adds where the hub was asked for what may be the misspelt name of a folder."""
    return "" if Path(source).is_dir() else f"; nor is there a folder {str(source)!r} here"
