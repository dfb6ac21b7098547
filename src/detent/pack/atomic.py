"""Replace a file in one go: whatever happens meanwhile, its name stands for the old file or for the new one."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["destination", "lock", "replace_file"]


def destination(path: str | os.PathLike[str]) -> Path:
    """Where the bytes go: links are followed, so that a link stays one."""
    where = Path(os.path.realpath(path))
    try:
        is_folder, has_folder = where.is_dir(), where.parent.is_dir()
    except OSError as error:
        raise type(error)(f"cannot save to {path}: {error.strerror}") from error
    if is_folder:
        raise IsADirectoryError(f"cannot save to {path}: it is a folder; name a file in it")
    if not has_folder:
        raise FileNotFoundError(f"cannot save to {path}: there is no folder {where.parent}; make it first")
    return where


def replace_file(where: Path, data: bytes) -> None:
    """Write next to the old file, flush to the disk, then swap.

    Args:
        where: from `destination`.
        data: the whole file.

    Raises:
        OSError: the file cannot be written; the old one is untouched.
    """
    _sweep(where)
    try:
        with _temporary(where) as (temporary, file):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if os.name != "posix":
                file.close()  # Windows renames no open file, and has no lock to lose
            os.replace(temporary, where)
    except OSError as error:
        why = error.strerror or str(error)
        raise type(error)(f"cannot save to {where}: {why}; what was there before is untouched") from error
    # The new file is in place; where a folder cannot be flushed, a power cut may bring the old one back, whole.
    if os.name == "posix":
        with contextlib.suppress(OSError):
            folder = os.open(where.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextlib.contextmanager
def _temporary(where: Path) -> Iterator[tuple[Path, Any]]:
    """A locked file beside the destination, which is gone afterwards whatever happens but `kill -9`."""
    temporary = where.with_name(f".{where.name}.{secrets.token_hex(6)}.tmp")
    # Not tempfile: it makes files that only their owner can read, whatever the umask says.
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            lock(file.fileno())
            yield temporary, file
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def lock(descriptor: int) -> bool:
    """Whether this process now holds the file, as far as this system can tell."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        return False
    return True


def _sweep(where: Path) -> None:
    """Remove what a killed save of the same file left behind: temporary files that no process holds any more.

    Empty ones are let be: a save writes only once it holds the lock, so an empty file may be one just begun.
    """
    prefix, suffix = f".{where.name}.", ".tmp"
    with contextlib.suppress(OSError):  # a folder may be writable and not readable
        for name in os.listdir(where.parent):
            if name.startswith(prefix) and name.endswith(suffix) and len(name) == len(prefix + suffix) + 12:
                _remove_abandoned(where.with_name(name))


def _remove_abandoned(temporary: Path) -> None:
    with contextlib.suppress(OSError), open(temporary, "rb") as file:
        if lock(file.fileno()) and os.fstat(file.fileno()).st_size:
            os.unlink(temporary)
