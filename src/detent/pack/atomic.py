"""Replace a file in one go: whatever happens meanwhile, its name stands for the old file or for the new one."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["Replacement", "destination", "lock", "replace_file"]

_LONGEST_NAME = 255  # bytes of a name in a folder, on every common file system
_SURROUND = len("..0123456789ab.tmp")  # what a temporary name has around the name of its file
_ABANDONED_S = 3600.0  # seconds after which an empty temporary file is nobody's


def destination(path: str | os.PathLike[str]) -> Path:
    """Where the bytes go: links are followed, so that a link stays one."""
    where = Path(os.path.realpath(path))
    try:
        is_folder, has_folder = where.is_dir(), where.parent.is_dir()
    except OSError as error:
        raise type(error)(f"cannot save to {path}: {error.strerror}") from error
    if is_folder:
        raise IsADirectoryError(f"cannot save to {path}: it is a folder; name a file in it")
    if where.exists() and not where.is_file():
        raise OSError(f"cannot save to {path}: it is a device, a pipe or a socket, no regular file")
    if not has_folder:
        raise FileNotFoundError(f"cannot save to {path}: there is no folder {where.parent}; make it first")
    return where


class Replacement:
    """A file that grows next to the old one; leaving the block without an error flushes it to the disk and swaps.

    A file that is replaced keeps its permission bits, which the new one has from its first byte on.

    Args:
        where: from `destination`.

    Raises:
        OSError: the file cannot be written; the old one is untouched.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     where = destination(f"{folder}/file")
        ...     with Replacement(where) as file:
        ...         file.write(b"all of it")
        ...         before = where.exists()
        ...     before, where.read_bytes()
        (False, b'all of it')
    """

    def __init__(self, where: Path) -> None:
        self.where = where
        self.size = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Replacement:
        _sweep(self.where)
        try:
            self._temporary, self._file = self._stack.enter_context(_temporary(self.where))
        except OSError as error:
            self._refuse(error)
        return self

    def write(self, data: Any) -> None:
        """Append the bytes of a buffer."""
        try:
            self._file.write(data)
        except OSError as error:
            self._refuse(error)
        self.size += memoryview(data).nbytes

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:  # whatever happens below, the temporary file goes
            if kind is not None:
                return
            try:
                self._file.truncate()
                os.fsync(self._file.fileno())
                if os.name != "posix":
                    self._file.close()  # Windows renames no open file, and has no lock to lose
                os.replace(self._temporary, self.where)
            except OSError as error:
                self._refuse(error)
        # The new file is in place; where a folder cannot be flushed, a power cut may bring the old one back, whole.
        if os.name == "posix":
            with contextlib.suppress(OSError):
                folder = os.open(self.where.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)

    def _refuse(self, error: OSError) -> NoReturn:
        why = error.strerror or str(error)
        raise type(error)(f"cannot save to {self.where}: {why}; what was there before is untouched") from error


def replace_file(where: Path, data: bytes) -> None:
    """Write a whole file in one go."""
    with Replacement(where) as file:
        file.write(data)


@contextlib.contextmanager
def _temporary(where: Path) -> Iterator[tuple[Path, Any]]:
    """A locked file beside the destination, which is gone afterwards whatever happens but `kill -9`."""
    temporary = where.with_name(f"{_begin(where)}{secrets.token_hex(6)}.tmp")
    mode = _mode(where)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
    is_ours = True
    try:  # from before there is a file: an interrupt may come between any two lines
        try:
            # Not tempfile: it makes files that only their owner can read, whatever the umask says.
            descriptor = os.open(temporary, flags, 0o666 if mode is None else mode & 0o700)
        except FileExistsError:
            is_ours = False
            raise
        # Closing flushes, which may find the disk full once more after that has been said.
        file = os.fdopen(descriptor, "wb")
        try:
            if mode is not None and hasattr(os, "fchmod"):  # the umask has no say in what was so before
                os.fchmod(descriptor, mode)
            lock(file.fileno())
            os.ftruncate(file.fileno(), 1)  # no longer empty: from here on it is either locked or abandoned
            yield temporary, file
        finally:
            with contextlib.suppress(OSError):
                file.close()
    finally:
        if is_ours:
            _remove(temporary)


def _remove(temporary: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)


def _mode(where: Path) -> int | None:
    """The permission bits of the file that is to be replaced, if there is one."""
    try:
        return stat.S_IMODE(where.stat().st_mode) & 0o777
    except OSError:
        return None


def _begin(where: Path) -> str:
    """How the temporary files of this file begin: with its name, or with its checksum where that would be too long."""
    name = os.fsencode(where.name)
    if len(name) + _SURROUND <= _LONGEST_NAME:
        return f".{where.name}."
    return f".detent-{zlib.crc32(name):08x}."


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

    An empty one may have just been made, and not be locked yet: it is let be for an hour.
    """
    prefix, suffix = _begin(where), ".tmp"
    with contextlib.suppress(OSError):  # a folder may be writable and not readable
        for name in os.listdir(where.parent):
            if name.startswith(prefix) and name.endswith(suffix) and len(name) == len(prefix + suffix) + 12:
                _remove_abandoned(where.with_name(name))


def _remove_abandoned(temporary: Path) -> None:
    with contextlib.suppress(OSError), open(temporary, "rb") as file:
        status = os.fstat(file.fileno())
        is_old = time.time() - status.st_mtime > _ABANDONED_S
        if lock(file.fileno()) and (os.fstat(file.fileno()).st_size or is_old):
            os.unlink(temporary)
