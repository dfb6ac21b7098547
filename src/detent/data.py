"""Image sets as tensors: Parquet in the Hugging Face layout, scikit-learn's digits, exact and resumable batches.

A set that fits in memory is one uint8 tensor (:func:`load_images`) cut into augmented batches by :class:`Batches`;
one that does not is read row group by row group (:func:`stream_images`). Every random choice is a function of
(seed, epoch, batch), never of what ran before, so a run that was cut off continues bit for bit.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["Batches", "ImageSet", "count_images", "digits", "load_images", "split_holdout", "stream_images"]


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images, labels and class names.

    Args:
        images: uint8 tensor of shape (N, C, H, W), C is 1 or 3.
        labels: int64 tensor of shape (N,) on the same device.
        classes: name of each label, at least ``labels.max() + 1`` of them.

    Raises:
        ValueError: if shapes, dtypes or lengths disagree.

    Example:
        >>> train = digits("train", seed=0)
        >>> tuple(train.images.shape[1:]), len(train.classes)
        ((1, 8, 8), 10)
    """

    images: Tensor
    labels: Tensor
    classes: list[str]

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise ValueError(
                f"ImageSet(images=...): need uint8 (N, C, H, W), got {self.images.dtype} {tuple(self.images.shape)}"
            )
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise ValueError(
                f"ImageSet(labels=...): need int64 ({len(self.images)},), got {self.labels.dtype} "
                f"{tuple(self.labels.shape)}"
            )
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise ValueError(
                f"ImageSet(labels=...): labels run from {int(self.labels.min())} to "
                f"{int(self.labels.max())}, allowed 0 to {len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> ImageSet:
        """The rows of ``index`` (int64, in that order), as a new set.

        Example:
            >>> len(digits("test", seed=0).subset(torch.arange(5)))
            5
        """
        index = index.to(self.images.device)
        return ImageSet(images=self.images[index], labels=self.labels[index], classes=self.classes)

    def to(self, device: str | torch.device) -> ImageSet:
        """The same set on another device.

        Example:
            >>> digits("test", seed=0).to("cpu").images.device.type
            'cpu'
        """
        return ImageSet(images=self.images.to(device), labels=self.labels.to(device), classes=self.classes)


def load_images(
    path: str | os.PathLike[str],
    split: str,
    label: str | None = None,
    grey: bool | None = None,
    device: str | torch.device = "cpu",
    *,
    cache: str | os.PathLike[str] | None = None,
    threads: int | None = None,
) -> ImageSet:
    """Reads one split of an image set in the Hugging Face Parquet layout into one uint8 tensor.

    Columns come from the ``huggingface`` schema metadata (features ``Image`` and ``ClassLabel``) or, without it, by
    type: the first ``struct{bytes, path}`` and the int64 columns. Row order is the order of the files.

    Args:
        path: folder that holds ``*<split>*.parquet`` (searched recursively), or, if no such folder exists, the name
            of a data set on the Hugging Face hub.
        split: part of the file name, usually ``"train"`` or ``"test"``.
        label: label column. None takes ``label``, else ``fine_label``, else the only candidate.
        grey: True converts to one channel, False keeps three, None makes one channel if in *every* image of this
            split R == G == B everywhere (WebP has no grey mode, so MNIST decodes as RGB). Give it explicitly where
            train and test could disagree.
        device: where the tensors end up.
        cache: path of a ``.safetensors`` file for the decoded split; written if absent or made from other files.
        threads: decoding threads, None for one a core.

    Raises:
        ValueError: for an unknown split or label, images of several sizes, or images stored by path only.
        ImportError: if pyarrow, Pillow or huggingface_hub is needed and missing.

    Example:
        >>> import tempfile
        >>> load_images(tempfile.mkdtemp(), "train")
        Traceback (most recent call last):
        ValueError: split='train': no file *train*.parquet in ...; there are no Parquet files
    """
    files = _split_files(path, split)
    if cache is not None and Path(cache).suffix != ".safetensors":
        raise ValueError(f"load_images(cache={str(cache)!r}): need a file name that ends in .safetensors")
    source = json.dumps([[[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files], label, grey])
    cached = None if cache is None else _read_cache(Path(cache), source)
    if cached is not None:
        return cached.to(device)

    parquet = _extra("pyarrow.parquet")
    image_column, label_column, names = _columns(parquet.read_schema(files[0]), label, str(path))
    blobs: list[bytes | None] = []
    labels: list[np.ndarray[Any, Any]] = []
    for file in files:
        table = parquet.read_table(file, columns=[image_column, label_column])
        blobs += [row["bytes"] for row in table[image_column].to_pylist()]
        labels.append(table[label_column].to_numpy())
    pixels = _decode(blobs, "L" if grey else "RGB", threads, str(path))
    if grey is None and bool((pixels == pixels[..., :1]).all()):
        pixels = np.ascontiguousarray(pixels[..., :1])
    y = torch.from_numpy(np.concatenate(labels).astype(np.int64))
    classes = names or [str(i) for i in range(int(y.max()) + 1)]
    out = ImageSet(images=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels=y, classes=classes)
    if cache is not None:
        _write_cache(Path(cache), out, source)
    return out.to(device)


def digits(split: Literal["train", "test"], seed: int = 0, device: str | torch.device = "cpu") -> ImageSet:
    """The 1,797 digits of 8x8 pixels that scikit-learn carries, as 1,437 train and 360 test images.

    Grey values 0..16 become ``round(16 * v)`` capped at 255. The split is stratified and a function of ``seed``.

    Args:
        split: ``"train"`` or ``"test"``.
        seed: of the split, >= 0.
        device: where the tensors end up.

    Raises:
        ValueError: for another split.
        ImportError: if scikit-learn is missing.

    Example:
        >>> len(digits("train")), len(digits("test"))
        (1437, 360)
    """
    if split not in ("train", "test"):
        raise ValueError(f"digits(split={split!r}): need 'train' or 'test'")
    bunch = _extra("sklearn.datasets").load_digits()
    rows = np.arange(len(bunch.target))
    train, test = _extra("sklearn.model_selection").train_test_split(
        rows, test_size=360, random_state=seed, stratify=bunch.target
    )
    index = train if split == "train" else test
    images = np.minimum(bunch.images[index] * 16, 255).astype(np.uint8)[:, None]
    labels = torch.from_numpy(bunch.target[index].astype(np.int64))
    return ImageSet(images=torch.from_numpy(images), labels=labels, classes=[str(i) for i in range(10)]).to(device)


def split_holdout(images: ImageSet, n: int, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Parts a set in two disjoint ones: everything but ``n`` images drawn at random, and those ``n``.

    Args:
        images: the set, usually the train split.
        n: size of the held-out part, 0 <= n < len(images).
        seed: of the draw.

    Returns:
        (the rest, the held-out part), both in the order of ``images``.

    Raises:
        ValueError: for n out of range.

    Example:
        >>> rest, held_out = split_holdout(digits("train"), 200, seed=1)
        >>> len(rest), len(held_out)
        (1237, 200)
    """
    if not 0 <= n < len(images):
        raise ValueError(f"split_holdout(n={n}): need 0 <= n < {len(images)}, the size of the set")
    order = torch.randperm(len(images), generator=_generator("holdout", seed))
    return images.subset(order[n:].sort().values), images.subset(order[:n].sort().values)


class Batches:
    """Normalised, augmented batches of an image set that lies in memory; an iterable with a length.

    Augmentation (pad, random crop to the old size, random flip) is one gather for the whole batch. Order and
    augmentation are functions of (seed, epoch, batch): :meth:`set_epoch` with ``skip=k`` continues an epoch exactly.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), same device.
        batch_size: >= 1.
        shuffle: a new order each epoch.
        mean: per channel, in units of 0..1 (pixel / 255); None for 0.
        std: per channel, in units of 0..1; None for 1. ``std=[1 / 255]`` gives raw pixels.
        crop: pixels of padding on each side before the random crop, 0 for no crop.
        padding: what the padding holds: mirrored pixels or raw 0 (black).
        flip: mirror each image left-right with probability 1/2.
        warp: (degrees, scale, pixels): each image is turned by up to so many degrees (0 to 180), its axes sheared by up
            to as many again, its height and width multiplied by 1 - scale to 1 + scale (scale in [0, 1)) and moved by
            up to so many pixels, bilinearly and with black beyond its edges; all uniform and independent. After crop
            and flip. None for no warp.
        seed: of order and augmentation.
        drop_last: leave out a last batch that is not full.
        dtype: floating dtype of the batches.
        channels_last: memory format of the batches.

    Raises:
        ValueError: for a length, size, crop or channel count out of range.

    Example:
        >>> test = digits("test")
        >>> batches = Batches(test.images, test.labels, 100, mean=[0.3], std=[0.35])
        >>> len(batches), next(iter(batches))[0].shape
        (4, torch.Size([100, 1, 8, 8]))
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        shuffle: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        *,
        crop: int = 0,
        padding: Literal["reflect", "zero"] = "reflect",
        flip: bool = False,
        warp: tuple[float, float, float] | None = None,
        seed: int = 0,
        drop_last: bool = False,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        num, channels, height, width = images.shape
        if len(labels) != num or num == 0:
            raise ValueError(
                f"Batches(labels=...): need one label an image and one image at least, got {len(labels)} "
                f"labels for {num} images"
            )
        if batch_size < 1:
            raise ValueError(f"Batches(batch_size={batch_size}): need >= 1")
        if padding not in ("reflect", "zero"):
            raise ValueError(f"Batches(padding={padding!r}): need 'reflect' or 'zero'")
        if not 0 <= crop < min(height, width):
            raise ValueError(f"Batches(crop={crop}): need 0 <= crop < {min(height, width)}, the smaller image side")
        degrees, scale, pixels = warp or (0.0, 0.0, 0.0)
        if not (0 <= degrees <= 180 and 0 <= scale < 1 and 0 <= pixels < min(height, width)):
            raise ValueError(
                f"Batches(warp={warp}): need 0 to 180 degrees, a scale in [0, 1) and pixels in [0, "
                f"{min(height, width)}), the smaller image side"
            )
        self.warp = warp
        self.images, self.labels, self.batch_size, self.shuffle = images, labels, batch_size, shuffle
        self.crop, self.padding, self.flip, self.seed, self.drop_last = crop, padding, flip, seed, drop_last
        self.dtype, self.channels_last = dtype, channels_last
        self._mean = _per_channel("mean", mean, 0.0, channels, images.device)
        self._std = _per_channel("std", std, 1.0, channels, images.device)
        self._epoch = 0
        self._skip = 0
        if len(self) == 0:
            raise ValueError(f"Batches(drop_last=True): {num} images do not fill one batch of {batch_size}")

    def __len__(self) -> int:
        """Batches in a whole epoch, whatever ``skip`` is."""
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole if self.drop_last or rest == 0 else whole + 1

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Chooses the epoch the next iterations yield, without its first ``skip`` batches.

        Raises:
            ValueError: for a negative epoch or skip beyond the epoch.
        """
        if epoch < 0 or not 0 <= skip <= len(self):
            raise ValueError(f"set_epoch(epoch={epoch}, skip={skip}): need epoch >= 0 and 0 <= skip <= {len(self)}")
        self._epoch, self._skip = epoch, skip

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, num, device = self._epoch, len(self.labels), self.images.device
        if self.shuffle:
            order = torch.randperm(num, generator=_generator("order", self.seed, epoch))
        else:
            order = torch.arange(num)
        for batch in range(self._skip, len(self)):
            index = order[batch * self.batch_size : (batch + 1) * self.batch_size].to(device)
            x = self._augmented(index, epoch, batch) if self.crop or self.flip else self.images[index]
            x = x.to(torch.float32)
            if self.warp is not None:
                x = _warped(x, self.warp, _generator("warp", self.seed, epoch, batch))
            x = x.sub_(self._mean).div_(self._std).to(self.dtype)
            if self.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            yield x, self.labels[index]

    def _augmented(self, index: Tensor, epoch: int, batch: int) -> Tensor:
        _, channels, height, width = self.images.shape
        num, device = len(index), index.device
        generator = _generator("augment", self.seed, epoch, batch)
        shift = torch.randint(-self.crop, self.crop + 1, (2, num, 1), generator=generator)
        mirror = torch.randint(0, 2, (num, 1), generator=generator).bool() & self.flip
        column = torch.arange(width)[None]
        rows = torch.arange(height)[None] + shift[0]
        columns = torch.where(mirror, width - 1 - column, column) + shift[1]
        at_row, at_column = _mirrored(rows, height), _mirrored(columns, width)
        out = self.images[
            index[:, None, None, None],
            torch.arange(channels, device=device)[None, :, None, None],
            at_row.to(device)[:, None, :, None],
            at_column.to(device)[:, None, None, :],
        ]
        if self.padding == "zero":
            inside = (at_row == rows)[:, :, None] & (at_column == columns)[:, None, :]
            out = out * inside.to(device)[:, None]
        return out


def _warped(x: Tensor, warp: tuple[float, float, float], generator: torch.Generator) -> Tensor:
    """Each image (of raw pixels, so that 0 is black) through an affine map of its own."""
    num, _, height, width = x.shape
    degrees, scale, pixels = warp
    turn, shear, tall, wide, down, right = torch.rand(6, num, generator=generator).mul_(2).sub_(1)
    turn, shear = turn * math.radians(degrees), shear * math.radians(degrees)
    tall, wide = 1 + scale * tall, 1 + scale * wide
    # From places in the output to places in the input, in halves of its sides.
    ratio = height / width
    first = torch.stack([wide * turn.cos(), -(turn + shear).sin() * ratio, right * 2 * pixels / width], 1)
    second = torch.stack([turn.sin() / ratio, tall * (turn + shear).cos(), down * 2 * pixels / height], 1)
    grid = F.affine_grid(torch.stack([first, second], 1).to(x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def stream_images(
    path: str | os.PathLike[str],
    split: str,
    size: int,
    batch_size: int,
    *,
    label: str | None = None,
    train: bool = False,
    epoch: int = 0,
    seed: int = 0,
    buffer: int = 4096,
    scale: tuple[float, float] = (0.08, 1.0),
    resize: float = 1.143,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    drop_last: bool = False,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    skip: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches (float32 (B, 3, size, size), int64 (B,)) of a set too large for memory, one row group at a time.

    With ``train`` the row groups come in random order through a shuffle buffer, each image is cropped at random
    (area ``scale``, aspect 3/4 to 4/3), resized and flipped; else the shorter side is resized to ``resize * size``
    and the centre is cut out. All of it is a function of (seed, epoch).

    Args:
        path: as in :func:`load_images`, like ``split`` and ``label``.
        split: part of the file name.
        size: side of the images that come out, in pixels, >= 1.
        batch_size: >= 1.
        label: label column.
        train: shuffle and augment.
        epoch: which of the random passes, >= 0.
        seed: of order and augmentation.
        buffer: encoded images held for shuffling, >= 1.
        scale: smallest and largest share of the image's area in a random crop, in (0, 1].
        resize: ratio of the resized shorter side to ``size`` in evaluation, >= 1.
        mean: per channel, in units of 0..1; None for 0.
        std: per channel, in units of 0..1; None for 1.
        drop_last: leave out a last batch that is not full.
        device: where the batches end up.
        threads: decoding threads, None for one a core.
        skip: batches at the start to pass over without decoding them: how an epoch that was cut off goes on exactly.

    Raises:
        ValueError: for a size, scale or column out of range.
        ImportError: if pyarrow or Pillow is missing.

    Example:
        >>> next(stream_images(".", "train", size=0, batch_size=8))
        Traceback (most recent call last):
        ValueError: stream_images(size=0, batch_size=8, buffer=4096): need all >= 1
    """
    if min(size, batch_size, buffer) < 1:
        raise ValueError(f"stream_images(size={size}, batch_size={batch_size}, buffer={buffer}): need all >= 1")
    if not 0 < scale[0] <= scale[1] <= 1 or resize < 1:
        raise ValueError(f"stream_images(scale={scale}, resize={resize}): need 0 < scale <= 1 and resize >= 1")
    pillow = _extra("PIL.Image")
    middle = _per_channel("mean", mean, 0.0, 3, torch.device(device))
    spread = _per_channel("std", std, 1.0, 3, torch.device(device))
    rows = _stream_rows(path, split, label, buffer if train else 0, np.random.default_rng([seed, epoch, 0]))

    def prepare(job: tuple[int, bytes]) -> np.ndarray[Any, Any]:
        number, blob = job
        image = pillow.open(io.BytesIO(blob)).convert("RGB")
        if train:
            image = _random_crop(image, size, scale, np.random.default_rng([seed, epoch, 1, number]), pillow)
        else:
            image = _centre_crop(image, size, resize, pillow)
        return np.asarray(image)

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        done = sum(1 for _ in zip(range(skip * batch_size), rows, strict=False))
        while chunk := [row for _, row in zip(range(batch_size), rows, strict=False)]:
            if len(chunk) < batch_size and drop_last:
                return
            jobs = [(done + i, blob) for i, (blob, _) in enumerate(chunk)]
            pixels = torch.from_numpy(np.stack(list(pool.map(prepare, jobs)))).to(device).permute(0, 3, 1, 2)
            done += len(chunk)
            x = pixels.to(torch.float32).sub_(middle).div_(spread).contiguous()
            yield x, torch.tensor([y for _, y in chunk], dtype=torch.int64, device=device)


def count_images(path: str | os.PathLike[str], split: str) -> int:
    """Rows of a split, from the files' footers alone.

    Args:
        path: as in :func:`load_images`.
        split: part of the file name.

    Raises:
        ValueError: if there is no such file.
        ImportError: if pyarrow is missing.

    Example:
        >>> count_images("src", "nowhere")
        Traceback (most recent call last):
        ValueError: split='nowhere': no file *nowhere*.parquet in src; there are no Parquet files
    """
    parquet = _extra("pyarrow.parquet")
    return sum(parquet.read_metadata(file).num_rows for file in _split_files(path, split))


def _extra(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        extra = "demo" if package == "sklearn" else "data"
        raise ImportError(f"detent.data needs {package}, which comes with pip install 'detent[{extra}]'") from error


def _generator(*key: str | int) -> torch.Generator:
    """A CPU generator seeded by a hash: neighbouring keys get unrelated streams, on every device the same."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def _per_channel(
    field: str, value: Sequence[float] | None, default: float, channels: int, device: torch.device
) -> Tensor:
    numbers = [default] * channels if value is None else [float(v) for v in value]
    if len(numbers) not in (1, channels):
        raise ValueError(f"{field}={numbers}: need one number or {channels}, one a channel")
    if field == "std" and min(numbers) <= 0:
        raise ValueError(f"std={numbers}: need > 0")
    return (255 * torch.tensor(numbers, dtype=torch.float64)).to(device, torch.float32).view(1, -1, 1, 1)


def _mirrored(index: Tensor, size: int) -> Tensor:
    """Reflects indices in -(size-1) .. 2(size-1) into 0 .. size-1 without repeating the border."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def _split_files(path: str | os.PathLike[str], split: str) -> list[Path]:
    folder = Path(path)
    if not folder.is_dir():
        hub = _extra("huggingface_hub")
        folder = Path(hub.snapshot_download(str(path), repo_type="dataset", allow_patterns=[f"*{split}*.parquet"]))
    files = sorted(folder.rglob(f"*{split}*.parquet"))
    if not files:
        found = sorted(f.name for f in folder.rglob("*.parquet"))
        raise ValueError(
            f"split={split!r}: no file *{split}*.parquet in {path}; there are {found or 'no Parquet files'}"
        )
    return files


def _columns(schema: Any, label: str | None, where: str) -> tuple[str, str, list[str] | None]:
    """Names of the image and the label column, and the class names if the metadata has them."""
    types = _extra("pyarrow").types
    raw = (schema.metadata or {}).get(b"huggingface")
    features: dict[str, Any] = json.loads(raw)["info"]["features"] if raw else {}
    images = [k for k, v in features.items() if isinstance(v, dict) and v.get("_type") == "Image"] or [
        f.name for f in schema if types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0
    ]
    marked = {k: v for k, v in features.items() if isinstance(v, dict) and v.get("_type") == "ClassLabel"}
    candidates = list(marked) or [f.name for f in schema if types.is_integer(f.type)]
    if not images:
        raise ValueError(f"{where}: no image column struct{{bytes, path}} among {schema.names}")
    if label is None:
        usual = [name for name in ("label", "fine_label") if name in candidates]
        chosen = usual[0] if usual else candidates[0] if len(candidates) == 1 else None
        if chosen is None:
            raise ValueError(f"{where}: label=None needs one integer column, there are {candidates}; name one")
    elif label in schema.names and types.is_integer(schema.field(label).type):
        chosen = label
    else:
        raise ValueError(f"label={label!r}: no such integer column in {where}, allowed are {candidates}")
    return images[0], chosen, marked.get(chosen, {}).get("names")


def _decode(
    blobs: Sequence[bytes | None], mode: str, threads: int | None, where: str
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decodes images of one size into (N, H, W, C)."""
    pillow = _extra("PIL.Image")
    encoded = [blob for blob in blobs if blob is not None]
    if not encoded:
        raise ValueError(f"{where}: no rows with image bytes")
    if len(encoded) < len(blobs):
        raise ValueError(f"{where}: row {list(blobs).index(None)} holds no image bytes (stored by path only?)")
    width, height = pillow.open(io.BytesIO(encoded[0])).size
    out = np.empty((len(encoded), height, width, len(mode)), dtype=np.uint8)

    def decode(start: int) -> None:
        for i in range(start, min(start + 512, len(encoded))):
            image = pillow.open(io.BytesIO(encoded[i]))
            if image.size != (width, height):
                raise ValueError(
                    f"{where}: row {i} is {image.size[0]}x{image.size[1]}, row 0 {width}x{height}; "
                    "use stream_images for images of several sizes"
                )
            out[i] = np.asarray(image.convert(mode)).reshape(height, width, len(mode))

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        list(pool.map(decode, range(0, len(encoded), 512)))
    return out


def _read_cache(file: Path, source: str) -> ImageSet | None:
    """The cached set, or None if there is none or it was made from other files or options."""
    if not file.exists():
        return None
    with safe_open(file, "pt") as reader:
        metadata = reader.metadata() or {}
        if metadata.get("source") != source:
            return None
        return ImageSet(
            images=reader.get_tensor("images"),
            labels=reader.get_tensor("labels"),
            classes=json.loads(metadata["classes"]),
        )


def _write_cache(file: Path, images: ImageSet, source: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    passing = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    metadata = {"source": source, "classes": json.dumps(images.classes)}
    save_file({"images": images.images, "labels": images.labels}, passing, metadata)
    passing.replace(file)


def _stream_rows(
    path: str | os.PathLike[str], split: str, label: str | None, buffer: int, rng: np.random.Generator
) -> Iterator[tuple[bytes, int]]:
    """(image bytes, label) of every row; a buffer > 0 shuffles row groups, then rows within the buffer."""
    parquet = _extra("pyarrow.parquet")
    files = _split_files(path, split)
    image_column, label_column, _ = _columns(parquet.read_schema(files[0]), label, str(path))
    groups = [(file, g) for file in files for g in range(parquet.ParquetFile(file).num_row_groups)]
    if buffer:
        groups = [groups[i] for i in rng.permutation(len(groups))]

    def rows() -> Iterable[tuple[bytes, int]]:
        for file, group in groups:
            with parquet.ParquetFile(file) as reader:
                table = reader.read_row_group(group, columns=[image_column, label_column])
            for image, y in zip(table[image_column].to_pylist(), table[label_column].to_pylist(), strict=True):
                if image["bytes"] is None:
                    raise ValueError(f"{file}: a row holds no image bytes (stored by path only?)")
                yield image["bytes"], y

    held: list[tuple[bytes, int]] = []
    for row in rows():
        if len(held) < buffer:
            held.append(row)
            continue
        if buffer:
            slot = int(rng.integers(buffer))
            row, held[slot] = held[slot], row
        yield row
    for i in rng.permutation(len(held)):
        yield held[i]


def _random_crop(image: Any, size: int, scale: tuple[float, float], rng: np.random.Generator, pillow: Any) -> Any:
    """A random box (area `scale`, aspect 3/4 to 4/3, cut to the image) resized to size x size, maybe mirrored."""
    width, height = image.size
    area = rng.uniform(*scale) * width * height
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w = min(max(round(np.sqrt(area * aspect)), 1), width)
    h = min(max(round(np.sqrt(area / aspect)), 1), height)
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    out = image.resize((size, size), pillow.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    return out.transpose(pillow.Transpose.FLIP_LEFT_RIGHT) if rng.integers(2) else out


def _centre_crop(image: Any, size: int, resize: float, pillow: Any) -> Any:
    ratio = resize * size / min(image.size)
    width, height = (max(round(side * ratio), size) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), pillow.Resampling.BILINEAR).crop((left, top, left + size, top + size))
