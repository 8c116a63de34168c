"""Lock files: the kernel gives a lock back when its process ends, whatever ended it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
        path.unlink(missing_ok=True)  # while it is locked, so that no other process locks it
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
