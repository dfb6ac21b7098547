"""State dicts on disk: one safetensors file, or a folder of shards with an index; read tensor by tensor."""

from __future__ import annotations

import json
import mmap
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from detent.contents import DTYPES
from detent.pack.bits import tensor_of
from detent.pack.frames import MAGIC, of_torch, read_safetensors_header
from detent.pack.header import first_line

__all__ = ["INDEX", "Checkpoint", "shard_name"]

INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_LONGEST_INDEX = 100_000_000


def shard_name(stem: str, number: int, count: int) -> str:
    """The name of a shard, counted from 1, as transformers and accelerate read it.

    Example:
        >>> shard_name("model", 1, 3)
        'model-00001-of-00003.safetensors'
    """
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


class Checkpoint:
    """A safetensors state dict, open: names, shapes and dtypes at once, a tensor when it is asked for.

    Every file is opened once and mapped; memory is for one tensor at a time, however large the shards are.

    Args:
        path: a safetensors file, an index (`model.safetensors.index.json`), or a folder with one of them.

    Attributes:
        path: as given.
        files: what was opened, the index included.
        shapes: of every tensor, in alphabetical order of the names, as the library writes them.
        dtypes: by name, as safetensors calls them.

    Raises:
        ValueError: anything else: a Detent file, a pickle, one shard alone, shards that contradict their index.
        OSError: a file cannot be opened.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"a": torch.ones(2)}, f"{folder}/model.safetensors")
        ...     with Checkpoint(folder) as weights:
        ...         weights.shapes, weights.tensor("a")
        ({'a': (2,)}, tensor([1., 1.]))
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._shards: list[_Shard] = []
        self._place: dict[str, _Shard] = {}
        try:
            self._open(_entry(self.path))
        except BaseException:
            self.close()
            raise
        names = sorted(self._place)
        self.shapes = {name: tuple(self._place[name].entries[name]["shape"]) for name in names}
        self.dtypes = {name: str(self._place[name].entries[name]["dtype"]) for name in names}

    def _open(self, entry: Path) -> None:
        self.files = [entry]
        if entry.name.endswith(".bin.index.json"):
            raise ValueError(
                f"{entry}: is the index of pickles (.bin), which are never opened here; load the model and write it as "
                "safetensors, as transformers' save_pretrained does"
            )
        if not entry.name.endswith(INDEX):
            _refuse_one_shard(entry)
            self._add(entry)
            return
        told = _index(entry)
        for file in dict.fromkeys(told.values()):
            shard = self._add(entry.parent / file)
            for name in shard.entries:
                if told.get(name) != file:
                    raise ValueError(f"{entry.parent / file}: holds {name!r}, which {entry.name} does not say")
        if gone := next((name for name in told if name not in self._place), None):
            raise ValueError(f"{entry.parent / told[gone]}: does not hold {gone!r}, which {entry.name} says")

    def _add(self, path: Path) -> _Shard:
        shard = _Shard(path)
        self._shards.append(shard)
        self._place |= dict.fromkeys(shard.entries, shard)
        self.files = list(dict.fromkeys([*self.files, path]))
        return shard

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def close(self) -> None:
        """Let go of the files."""
        for shard in self._shards:
            shard.close()

    def tensor(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self._place[name].tensor(name)


class _Shard:
    """One safetensors file, mapped."""

    def __init__(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise type(error)(f"cannot open {path}: {error.strerror}") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or not status.st_size:
                raise ValueError(
                    f"{path}: not a safetensors state dict: {'empty' if not status.st_size else 'no file'}"
                )
            self._mapped = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        ours = f"{path}: is a Detent file, not a state dict; detent unpack makes a state dict of it"
        try:
            if self._mapped[: len(MAGIC)] == MAGIC:
                raise ValueError(ours)
            try:
                metadata, self.entries = read_safetensors_header(self._mapped)
            except (ValueError, RecursionError) as error:
                why = of_torch(self._mapped[:4]) or f": {first_line(error)}"
                raise ValueError(f"{path}: not a safetensors state dict{why}") from None
            if "detent" in metadata:
                raise ValueError(ours)
        except BaseException:
            self._mapped.close()
            raise
        self._start = 8 + int.from_bytes(self._mapped[:8], "little")

    def tensor(self, name: str) -> Tensor:
        entry = self.entries[name]
        first, past = (self._start + at for at in entry["data_offsets"])
        view = memoryview(self._mapped)[first:past]
        found = tensor_of(np.frombuffer(view, dtype=np.uint8), DTYPES[entry["dtype"]], entry["shape"])
        if hasattr(mmap, "MADV_DONTNEED") and past > first:  # mapped pages count as memory
            page = first // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapped.madvise(mmap.MADV_DONTNEED, page, past - page)
        return found

    def close(self) -> None:
        try:
            self._mapped.close()
        except BufferError:  # somebody still looks into it; the map goes with the last one
            del self._mapped


def _entry(path: Path) -> Path:
    """The file that a path means: of a folder its index, or its only state dict."""
    if not path.is_dir():
        return path
    for pattern, own in ((f"*{INDEX}", f"model{INDEX}"), ("*.safetensors", "model.safetensors")):
        found = sorted(path.glob(pattern))
        if pattern == "*.safetensors" and any(_SHARD.search(file.name) for file in found):
            raise ValueError(f"{path}: holds shards and no index (model{INDEX}), which says what is in which")
        if len(found) == 1 or path / own in found:
            return path / own if path / own in found else found[0]
        if found:
            raise ValueError(f"{path}: holds {', '.join(file.name for file in found[:4])}; name one of them")
    pickles = sorted(file.name for end in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(end))
    why = f"; {pickles[0]} is a pickle, which is never opened here" if pickles else ""
    raise ValueError(f"{path}: holds no .safetensors state dict and no index of one{why}")


def _refuse_one_shard(path: Path) -> None:
    """Refuse a file that is a part of a state dict.

    Raises:
        ValueError: naming the folder.
    """
    found = _SHARD.search(path.name)
    if found and int(found[2]) > 1:
        raise ValueError(f"{path}: is one shard of {int(found[2])}; give the folder, {path.parent}, or its index")


def _index(path: Path) -> dict[str, str]:
    """File of every tensor, by name."""
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST_INDEX + 1)
    except OSError as error:
        raise type(error)(f"cannot open {path}: {error.strerror}") from None
    try:
        told: Any = json.loads(text)["weight_map"] if len(text) <= _LONGEST_INDEX else None
    except (ValueError, KeyError, TypeError, RecursionError):
        told = None
    if not isinstance(told, dict) or not told or not all(isinstance(file, str) for file in told.values()):
        raise ValueError(f"{path}: is no index of shards: it has no weight_map from names to files")
    for file in told.values():
        if Path(file).name != file or file in ("", ".", ".."):
            raise ValueError(f"{path}: names {file!r}, which is no file beside it")
    return told
