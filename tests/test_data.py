"""Image sets are read as they are stored; batches are what a slow loop per image would make, and resume exactly."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.ndimage
import torch
from PIL import Image

from detent import data
from detent.data import Batches, ImageSet, _warped, count_images, digits, load_images, split_holdout, stream_images


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_set(
    folder: Path,
    images: list[np.ndarray],
    split: str = "train",
    labels: dict[str, list[int]] | None = None,
    names: dict[str, list[str]] | None = None,
    files: int = 1,
) -> Path:
    """A Parquet set; class names, if any, go to the metadata as the `datasets` library writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = labels or {"label": [i % 3 for i in range(len(images))]}
    table = pa.table(
        {
            "img": pa.array(
                [{"bytes": png(x), "path": None} for x in images],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            **{k: pa.array(v, pa.int64()) for k, v in labels.items()},
        }
    )
    if names is not None:
        features = {"img": {"_type": "Image"}}
        features |= {k: {"_type": "ClassLabel", "names": v} for k, v in names.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    rows = -(-len(images) // files)
    for i in range(files):
        part = table.slice(i * rows, rows)
        pq.write_table(part, folder / f"{split}-{i:05d}-of-{files:05d}.parquet", row_group_size=4)
    return folder


def noise(num: int, size: tuple[int, ...] = (6, 5, 3), seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (num, *size), dtype=np.uint8))


def test_pixels_labels_and_names_come_back_in_file_order(tmp_path: Path) -> None:
    images, labels = noise(11), [i % 4 for i in range(11)]
    names = ["ant", "bee", "crab", "dog"]
    write_set(tmp_path, images, labels={"label": labels}, names={"label": names}, files=3)
    write_set(tmp_path, noise(2, seed=1), "test")
    got = load_images(tmp_path, "train")
    assert np.array_equal(got.images.numpy(), np.stack(images).transpose(0, 3, 1, 2))
    assert got.labels.tolist() == labels
    assert got.classes == names
    assert len(load_images(tmp_path, "test")) == 2


def test_columns_are_found_by_type_without_metadata(tmp_path: Path) -> None:
    write_set(tmp_path, noise(5), labels={"species": [0, 1, 2, 1, 0]})
    got = load_images(tmp_path, "train")
    assert got.labels.tolist() == [0, 1, 2, 1, 0]
    assert got.classes == ["0", "1", "2"]


def test_fine_label_is_the_default_and_label_chooses(tmp_path: Path) -> None:
    fine, coarse = [0, 1, 2, 3], [0, 0, 1, 1]
    names = {"coarse_label": ["x", "y"], "fine_label": list("abcd")}
    write_set(tmp_path, noise(4), labels={"coarse_label": coarse, "fine_label": fine}, names=names)
    assert load_images(tmp_path, "train").labels.tolist() == fine
    chosen = load_images(tmp_path, "train", label="coarse_label")
    assert (chosen.labels.tolist(), chosen.classes) == (coarse, ["x", "y"])
    with pytest.raises(ValueError, match=r"label='colour'.*coarse_label"):
        load_images(tmp_path, "train", label="colour")


def test_two_unmarked_label_columns_must_be_chosen_from(tmp_path: Path) -> None:
    write_set(tmp_path, noise(2), labels={"height": [1, 2], "species": [0, 1]})
    with pytest.raises(ValueError, match=r"height.*species"):
        load_images(tmp_path, "train")


def test_grey_only_when_every_image_is(tmp_path: Path) -> None:
    grey = [np.repeat(x[..., :1], 3, axis=2) for x in noise(6)]
    got = load_images(write_set(tmp_path / "grey", grey), "train")
    assert np.array_equal(got.images.numpy()[:, 0], np.stack(grey)[..., 0])
    assert got.images.shape[1] == 1
    assert load_images(tmp_path / "grey", "train", grey=False).images.shape[1] == 3
    grey[4][2, 3, 1] ^= 1
    assert load_images(write_set(tmp_path / "almost", grey), "train").images.shape[1] == 3
    assert load_images(tmp_path / "almost", "train", grey=True).images.shape[1] == 1


def test_cache_gives_the_same_and_follows_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = write_set(tmp_path / "set", noise(5)), tmp_path / "made" / "train.safetensors"
    first = load_images(folder, "train", cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(data, "_decode", lambda *args: pytest.fail("decoded again"))
        again = load_images(folder, "train", cache=cache)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert first.classes == again.classes
    assert load_images(folder, "train", grey=True, cache=cache).images.shape[1] == 1
    write_set(folder, noise(7, seed=1))
    assert len(load_images(folder, "train", cache=cache)) == 7
    assert [f.name for f in cache.parent.iterdir()] == [cache.name]
    with pytest.raises(ValueError, match="safetensors"):
        load_images(folder, "train", cache=tmp_path / "x.npz")


def test_errors_say_what_is_there(tmp_path: Path) -> None:
    write_set(tmp_path / "one", noise(3))
    with pytest.raises(ValueError, match="train-00000-of-00001"):
        load_images(tmp_path / "one", "validation")
    write_set(tmp_path / "two", [*noise(2), *noise(1, (4, 4, 3))])
    with pytest.raises(ValueError, match=r"row 2 is 4x4.*stream_images"):
        load_images(tmp_path / "two", "train")
    by_path = pa.table(
        {
            "image": pa.array(
                [{"bytes": None, "path": "a.png"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            ),
            "label": [0],
        }
    )
    (tmp_path / "three").mkdir()
    pq.write_table(by_path, tmp_path / "three" / "train.parquet")
    with pytest.raises(ValueError, match="image bytes"):
        load_images(tmp_path / "three", "train")


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, noise(1))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"detent\[data\]"):
        load_images(tmp_path, "train")


def test_hub_names_are_fetched_only_if_there_is_no_such_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = write_set(tmp_path / "snapshot", noise(3)), []

    def snapshot(name: str, **options: object) -> str:
        asked.append((name, options["repo_type"]))
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot))
    assert len(load_images("someone/some-set", "train")) == 3
    assert len(load_images(folder, "train")) == 3
    assert asked == [("someone/some-set", "dataset")]


def test_image_set_checks_its_parts() -> None:
    images, labels = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="0 to 1"):
        ImageSet(images=images, labels=labels, classes=["a", "b"])
    with pytest.raises(ValueError, match="uint8"):
        ImageSet(images=images.float(), labels=labels, classes=list("abc"))
    with pytest.raises(ValueError, match="int64"):
        ImageSet(images=images, labels=labels[:2], classes=list("abc"))


def test_digits_are_parted_once_and_evenly() -> None:
    train, test = digits("train", seed=3), digits("test", seed=3)
    assert torch.equal(train.images, digits("train", seed=3).images)
    assert not torch.equal(train.labels, digits("train", seed=4).labels)
    share = torch.bincount(test.labels) / (torch.bincount(test.labels) + torch.bincount(train.labels))
    assert float((share - 360 / 1797).abs().max()) < 0.01
    from sklearn.datasets import load_digits

    source = np.asarray(load_digits(return_X_y=True)[0])
    both = torch.cat([train.images, test.images]).reshape(-1, 64).numpy()
    expected = np.minimum(source * 16, 255).astype(np.uint8)
    assert sorted(map(bytes, both)) == sorted(map(bytes, expected))


def counted(num: int, height: int = 5, width: int = 7, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, and labels that are row numbers."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(1, 256, (num, channels, height, width), dtype=torch.uint8, generator=generator)
    return images, torch.arange(num)


def test_holdout_parts_the_set() -> None:
    images, rows = counted(30)
    whole = ImageSet(images=images, labels=rows, classes=[str(i) for i in range(30)])
    rest, held_out = split_holdout(whole, 7, seed=5)
    assert len(held_out) == 7
    assert sorted(rest.labels.tolist() + held_out.labels.tolist()) == list(range(30))
    assert torch.equal(held_out.images, images[held_out.labels])
    assert held_out.labels.tolist() != split_holdout(whole, 7, seed=6)[1].labels.tolist()
    with pytest.raises(ValueError, match="n=30"):
        split_holdout(whole, 30)


@pytest.mark.parametrize("padding", ["reflect", "zero"])
@pytest.mark.parametrize("flip", [True, False])
def test_augmented_images_are_crops_of_the_padded_mirrored_image(
    padding: Literal["reflect", "zero"], flip: bool
) -> None:
    images, rows = counted(200)
    pad = 2
    batches = Batches(images, rows, 200, True, std=[1 / 255], crop=pad, padding=padding, flip=flip)
    x, y = next(iter(batches))
    assert x.shape == (200, 3, 5, 7)
    seen = set()
    for out, row in zip(x.numpy(), y.tolist(), strict=True):
        found: list[tuple[bool, int, int]] = []
        for mirror in (False, True):
            image = images[row].numpy()[:, :, ::-1] if mirror else images[row].numpy()
            padded = np.pad(
                image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect" if padding == "reflect" else "constant"
            )
            places = itertools.product(range(2 * pad + 1), repeat=2)
            found += [(mirror, a, b) for a, b in places if np.array_equal(padded[:, a : a + 5, b : b + 7], out)]
        assert len(found) == 1, "every output is exactly one crop of its own image"
        seen.add(found[0])
    assert {m for m, _, _ in seen} == ({False, True} if flip else {False})
    assert len(seen) > 0.9 * 25 * (2 if flip else 1)


def test_crop_and_flip_are_drawn_evenly() -> None:
    image = torch.arange(1, 50, dtype=torch.uint8).view(1, 1, 7, 7).expand(20000, 1, 7, 7)
    batches = Batches(image, torch.zeros(20000, dtype=torch.int64), 20000, std=[1 / 255], crop=1, flip=True)
    x = next(iter(batches))[0]
    # the centre pixel tells the shift (and mirroring moves it sideways), its right neighbour the mirror
    shares = torch.bincount(x[:, 0, 3, 3].long()).div(20000)
    assert torch.allclose(shares[shares > 0], torch.full((9,), 1 / 9), atol=0.01)
    assert abs(float((x[:, 0, 3, 4] < x[:, 0, 3, 3]).float().mean()) - 0.5) < 0.02


def test_an_epoch_holds_every_row_once_and_depends_on_seed_and_epoch() -> None:
    images, rows = counted(23)

    def order(seed: int, epoch: int, drop_last: bool = False) -> list[int]:
        batches = Batches(images, rows, 5, True, seed=seed, drop_last=drop_last)
        batches.set_epoch(epoch)
        out = [y for _, y in batches]
        assert len(out) == len(batches)
        return torch.cat(out).tolist()

    assert sorted(order(0, 0)) == list(range(23))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4
    assert len(order(0, 0, drop_last=True)) == 20


def test_skip_continues_the_epoch_exactly() -> None:
    images, rows = counted(40)
    batches = Batches(images, rows, 6, True, crop=2, flip=True, seed=9)
    batches.set_epoch(3)
    whole = list(batches)
    batches.set_epoch(3, skip=4)
    tail = list(batches)
    assert len(tail) == 3
    for (x, y), (expected_x, expected_y) in zip(tail, whole[4:], strict=True):
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)
    with pytest.raises(ValueError, match="skip=8"):
        batches.set_epoch(0, skip=8)


def test_warped_images_are_affine_maps_of_their_own() -> None:
    images, degrees, scale, pixels = torch.from_numpy(np.stack(noise(5, (2, 9, 14)))).float(), 25.0, 0.2, 3.0
    out = _warped(images, (degrees, scale, pixels), torch.Generator().manual_seed(4))
    drawn = torch.rand(6, 5, generator=torch.Generator().manual_seed(4)).double().numpy() * 2 - 1
    centre = np.array([4.0, 6.5])
    for i, image in enumerate(images.double().numpy()):
        turn, shear = np.radians(degrees) * drawn[:2, i]
        tall, wide = 1 + scale * drawn[2:4, i]
        # Rows first, as scipy counts: where in the input an output's place comes from.
        matrix = np.array([[tall * np.cos(turn + shear), np.sin(turn)], [-np.sin(turn + shear), wide * np.cos(turn)]])
        offset = centre - matrix @ centre + pixels * drawn[4:, i]
        for channel in range(2):
            expected = scipy.ndimage.affine_transform(
                image[channel],
                matrix,
                offset,  # pyright: ignore[reportArgumentType]
                order=1,
                mode="grid-constant",
            )
            assert np.abs(out[i, channel].numpy() - expected).max() < 0.02  # of 255


def test_a_warp_is_drawn_by_seed_epoch_and_batch_and_may_be_nothing() -> None:
    images, rows = counted(40)
    plain = torch.cat([x for x, _ in Batches(images, rows, 6, True, seed=3)])
    still = torch.cat([x for x, _ in Batches(images, rows, 6, True, seed=3, warp=(0, 0, 0))])
    assert torch.allclose(plain, still, atol=1e-4)
    batches = Batches(images, rows, 6, True, seed=3, warp=(10, 0.1, 1))
    first, again = list(batches), list(batches)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert not torch.allclose(torch.cat([x for x, _ in first]), plain, atol=1e-2)
    batches.set_epoch(0, skip=4)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, first[4:], strict=True))


def test_normalisation_and_memory_format() -> None:
    images, rows = counted(4)
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.3, 0.4]
    x, _ = next(iter(Batches(images, rows, 4, mean=mean, std=std, channels_last=True)))
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(x.double(), expected, atol=1e-6)
    assert x.is_contiguous(memory_format=torch.channels_last)
    raw, _ = next(iter(Batches(images, rows, 4, std=[1 / 255], dtype=torch.bfloat16)))
    assert torch.equal(raw, images.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"crop": 5}, "crop=5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"mean": [0.1, 0.2]}, "mean"),
        ({"std": [0.0]}, "std"),
        ({"padding": "edge"}, "padding"),
        ({"warp": (0, 1.0, 0)}, "warp"),
        ({"warp": (181, 0.5, 0)}, "warp"),
        ({"batch_size": 9, "drop_last": True}, "drop_last"),
    ],
)
def test_batches_refuse_in_words(options: dict[str, Any], field: str) -> None:
    images, rows = counted(8)
    arguments: dict[str, Any] = {"batch_size": 4} | options
    with pytest.raises(ValueError, match=field):
        Batches(images, rows, **arguments)


def test_stream_without_training_is_the_set_in_order(tmp_path: Path) -> None:
    images = noise(10, (8, 8, 3))
    write_set(tmp_path, images, labels={"label": list(range(10))}, files=2)
    got = list(stream_images(tmp_path, "train", 8, 4, resize=1.0, std=[1 / 255]))
    assert [len(y) for _, y in got] == [4, 4, 2]
    assert torch.cat([y for _, y in got]).tolist() == list(range(10))
    assert np.array_equal(torch.cat([x for x, _ in got]).numpy(), np.stack(images).transpose(0, 3, 1, 2))
    assert [len(y) for _, y in stream_images(tmp_path, "train", 8, 4, drop_last=True)] == [4, 4]


def test_stream_resizes_the_shorter_side_and_cuts_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 200
    x, _ = next(stream_images(write_set(tmp_path, [wide]), "train", 8, 1, resize=1.0, std=[1 / 255]))
    assert torch.equal(x, torch.full((1, 3, 8, 8), 200.0))


def test_stream_shuffles_by_seed_and_epoch_and_crops_within_bounds(tmp_path: Path) -> None:
    # each image has one colour, which tells its label after any crop, resize and flip
    images = [np.full((9 + i % 3, 12, 3), 10 * i, dtype=np.uint8) for i in range(20)]
    write_set(tmp_path, images, labels={"label": list(range(20))})

    def epoch(seed: int, epoch: int) -> list[int]:
        batches = stream_images(tmp_path, "train", 6, 8, train=True, seed=seed, epoch=epoch, buffer=7, std=[1 / 255])
        out = []
        for x, y in batches:
            assert torch.equal(x, (10.0 * y)[:, None, None, None].expand_as(x))
            out += y.tolist()
        return out

    assert sorted(epoch(0, 0)) == list(range(20))
    assert epoch(0, 0) == epoch(0, 0)
    assert len({tuple(epoch(s, e)) for s in (0, 1) for e in (0, 1)} | {tuple(range(20))}) == 5


def test_stream_augments(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], (16, 1, 3))
    write_set(tmp_path, [ramp] * 64, labels={"label": [0] * 64})
    x = torch.cat([x for x, _ in stream_images(tmp_path, "train", 8, 16, train=True, std=[1 / 255])])
    falls = (x[:, 0, 0, 0] > x[:, 0, 0, -1]).float().mean()
    assert 0.2 < float(falls) < 0.8
    assert len({tuple(row) for row in x[:, 0, 0].tolist()}) > 32


def test_mnist_is_the_published_one(shared: Path) -> None:
    got = load_images(shared / "data" / "mnist", "test")
    assert got.images.shape == (10000, 1, 28, 28)
    # both stated in shared/data/README.md
    digest = hashlib.sha256(got.images.numpy().tobytes()).hexdigest()
    assert digest == "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161"
    assert torch.bincount(got.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("skip", [0, 1, 3, 5, 9])
def test_a_stream_that_skips_is_the_rest_of_the_whole(tmp_path: Path, train: bool, skip: int) -> None:
    write_set(tmp_path, noise(20, (9, 8, 3)), labels={"label": list(range(20))}, files=2)

    def batches(skip: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(stream_images(tmp_path, "train", 6, 4, train=train, seed=1, epoch=2, buffer=7, skip=skip))

    whole, rest = batches(0)[skip:], batches(skip)
    assert len(whole) == len(rest)
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(whole, rest, strict=True))
    assert count_images(tmp_path, "train") == 20
