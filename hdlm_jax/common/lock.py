"""One job at a time changes a folder: a lock held by the operating system, so that it is free once a job is gone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import socket
import time
from collections.abc import Iterator

from hdlm_jax.common import processes
from hdlm_jax.common.console import say
from hdlm_jax.config import ConfigError

# what file systems without locks say (some of Lustre's, FUSE's and NFS's)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def held(path: str, mode: str) -> Iterator[None]:
    """Holds the lock file `path`, made with its folder; of many processes the first does. `mode`: for who comes next.

    The file stays, and says who holds it. Whoever only reads needs no lock.

    Raises:
      ConfigError: another job holds it. OSError: it cannot be made.
    """
    found: list[int] = []
    processes.on_main_process(lambda: found.append(_take(path, mode)))
    try:
        yield
    finally:
        for file in found:
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)
            os.close(file)


def _take(path: str, mode: str) -> int:
    """An open file that holds the lock."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            _say_once(os.path.dirname(path) or ".", error.strerror or "")
            return file
        holder = os.pread(file, 1000, 0).decode("utf-8", "replace").strip() or "another job"
        os.close(file)
        if not isinstance(error, BlockingIOError):
            raise
        raise ConfigError(f"{path} is held by {holder}; wait for its end, stop it, or use another folder") from None
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(file, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        os.pwrite(file, f"pid {os.getpid()} on {socket.gethostname()} since {since}, --mode={mode}\n".encode(), 0)
    return file


@functools.cache
def _say_once(folder: str, reason: str) -> None:
    say(f"lock: {folder} lies on a file system without locks ({reason}); see to it that one job at a time is there")
