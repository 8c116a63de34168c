"""Files that are whole or not there at all, even if the machine stops, and locks that no death leaves."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# What is wrong with the disk or with the user's rights to it, not with the program.
DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
)


def flush(path: Path) -> None:
    """Have the file's or folder's content on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_all(folder: Path) -> None:
    """Have a folder and everything in it on disk."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def share(path: Path) -> None:
    """Give a file that a library made for the user alone, as safetensors does, the rights of any other."""
    if not path.is_file() or stat.S_IMODE(path.stat().st_mode) != 0o600:
        return
    probe = path.with_name(f".{path.name}.{os.getpid()}.mode.tmp")
    try:
        probe.touch()  # the umask itself can only be read by changing it, for all threads
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        probe.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name to write the file under, which takes its own name when the block ends without error."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        share(scratch)
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
            share(file)
        flush_all(scratch)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    flush(path.parent)


# Record locks of POSIX are the process's: the kernel drops them at its death, whatever that is, and no child
# that outlives it keeps them, as it would a lock of flock(). The price: a process that closes any descriptor
# of the file loses its lock, so nothing else may open it here.
_held: dict[Path, tuple[int, int]] = {}  # path -> (process, descriptor)


def try_lock(path: Path) -> bool:
    """Hold the lock file ``path`` for the life of this process; False: another process does.

    A process that holds it already may take it again. Where the file system has no locks a warning says so.
    """
    path = path.resolve()
    process, handle = _held.get(path, (0, -1))
    if process == os.getpid() and _is_at(handle, path):
        return True
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(handle)
                return False
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                os.close(handle)
                raise
            logging.getLogger(__name__).warning("%s: no locks here; start no second process", path)
        if _is_at(handle, path):
            break
        os.close(handle)  # its holder finished and removed the file in between
    os.truncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {os.uname().nodename}\n".encode())
    _held[path] = os.getpid(), handle
    return True


def unlock(path: Path) -> None:
    """Give up the lock, if this process holds it, and remove its file."""
    process, handle = _held.pop(path.resolve(), (0, -1))
    if process == os.getpid():
        path.unlink(missing_ok=True)  # before it is free: nobody locks a file that is about to go
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def one_at_a_time(path: Path, waits: Callable[[], None]) -> Iterator[None]:
    """Until no other process is in such a block with the lock file ``path``, call ``waits`` and wait."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            waits()
            fcntl.lockf(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
