"""Files and folders that are whole or not there at all, even if the machine stops."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

TRIAL = ".quark_fast-check-"  # begins the name of a folder that is made to see whether it can be written to
# What a folder of VirtualBox's shared folders, SMB and others answers: they flush none, and need not.
_NO_FOLDER_FLUSH = frozenset({errno.EINVAL, errno.EBADF, errno.ENOTSUP})
_DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
)


def disk_error(error: Exception) -> str | None:
    """What is wrong with the disk or with the user's rights to it, in words; None: nothing is."""
    number: int | None = None
    if isinstance(error, OSError):
        number = error.errno
    elif isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])  # safetensors gives it as text
    return os.strerror(number) if number in _DISK_ERRORS else None


def flush(path: Path) -> None:
    """Have the file's or folder's content on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FLUSH or not path.is_dir():
            raise
    finally:
        os.close(handle)


def flush_all(folder: Path) -> None:
    """Have a folder and everything in it on disk."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(path: Path, kind: str = "") -> Path:
    """A hidden name beside the file for this call alone: other threads and machines may write it, too.

    A resume clears what killed processes left by the ending .tmp.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{kind}.tmp")


def give_usual_permissions(path: Path) -> None:
    """Give a file that a library made for the user alone, as safetensors does, those of any other file."""
    if not path.is_file() or stat.S_IMODE(path.stat().st_mode) != 0o600:
        return
    probe = _beside(path, ".mode")
    try:
        probe.touch()  # the umask itself can only be read by changing it, for all threads
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        probe.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name to write the file under, which takes its own name when the block ends without error."""
    scratch = _beside(path)
    try:
        yield scratch
        give_usual_permissions(scratch)
        flush(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    flush(path.parent)  # makes the new name last


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Another folder to fill, which takes the place of ``path`` when the block ends without error."""
    scratch = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed while it filled it
    scratch.mkdir()
    try:
        yield scratch
        for file in list(scratch.rglob("*")):
            give_usual_permissions(file)
        flush_all(scratch)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    flush(path.parent)
