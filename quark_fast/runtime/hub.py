"""The repository of the Hugging Face hub that a finished model is uploaded to."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from quark_fast.errors import Interrupted, NotUploaded, UsageError


def check_repository(repo: str, private: bool) -> None:
    """Make the repository unless it is there, and check that this machine's token may write to it.

    Args:
        repo: USER/NAME, or NAME of the token's own user.
        private: of a repository that is made; False: public, unless the organisation's default is private.
    Raises:
        UsageError: it cannot be made or written to, in one line.
    """
    try:
        HfApi().auth_check(_make(repo, private), write=True)
    except Exception as error:  # the hub's, httpx's, the system's: whatever it is, better now than at the end
        raise UsageError(f"push_to_hub = {repo!r}: {_why(error)}") from error


def upload(folder: Path, repo: str, private: bool) -> str:
    """Upload a finished run's model as one commit; the address of the repository.

    Raises:
        NotUploaded: it failed, which costs the run nothing; the message has the command that does it later.
        Interrupted: Ctrl-C, likewise.
    """
    later = f"`hf upload {shlex.quote(repo)} {shlex.quote(str(folder))}` uploads it"
    try:
        with _without_bars():
            name = _make(repo, private)
            HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Model by quark_fast")
    except KeyboardInterrupt as stop:
        raise Interrupted(f"stopped while uploading; the run is finished, and {later}") from stop
    except Exception as error:  # as above; the run is finished, so nothing of it may be lost by this
        raise NotUploaded(
            f"the run is finished, but its model is not uploaded ({_why(error)}); {later}"
        ) from error
    return f"{constants.ENDPOINT}/{name}"


def _make(repo: str, private: bool) -> str:
    """USER/NAME of the repository, which is there from now on."""
    # As transformers does: without a word on it the hub's own default holds.
    return HfApi().create_repo(repo, private=private or None, exist_ok=True).repo_id


def _why(error: Exception) -> str:
    """An error of the hub's client in a line, with the fix where that is known."""
    while type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client's own words say no more than that it failed
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if status == 401:
        return "the hub knows no such token; log in by `hf auth login`, or set HF_TOKEN"
    if status == 403:
        said = lines[-1] if len(lines) > 1 else "403 Forbidden"
        return f"the token may not write there ({said:.200}); give one that may, or a repository of your own"
    return f"{constants.ENDPOINT} says {type(error).__name__}: {lines[0]:.200}"


@contextmanager
def _without_bars() -> Iterator[None]:
    """The client's own progress bars would be drawn over the run's."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
