"""The bytes of a tensor: every model against a reader written from docs/format-streams.md, sizes, and damage."""

from __future__ import annotations

import contextlib
import math
import time
import tracemalloc

import numpy as np
import pytest
import reference_pack as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.mask_models import by_row, memoryless
from detent.pack import mixing, models
from detent.pack.coder import Meter, Reader, Tape, Writer
from detent.pack.coding import CODINGS, Coding, Piece, Spec, decode_tensor, encode_tensor
from detent.pack.models import Grid

RAW = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "|u1", "F8_E5M2": "|u1"}
RAW |= {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1", "BOOL": "|u1"}
WEIRD = np.array([0, 0x80000000, 0x7FC00001, 0xFFC12345, 0x7F800000, 0xFF800000, 1, 0x80000001], dtype=np.uint32)


def specs_of(pieces: list[Piece]) -> list[Spec]:
    return [Spec(p.name, p.kind, p.values.size) for p in pieces]


def patterns_of(values: np.ndarray) -> list[int]:
    return values.view(f"<u{values.dtype.itemsize}").tolist()


def check(
    pieces: list[Piece], shape: tuple[int, ...], coding: Coding = "entropy", specs: list[Spec] | None = None
) -> bytes:
    """Encode, decode with the library and with the slow reader, and compare bit for bit; returns the blob."""
    blob = encode_tensor(pieces, shape=shape, coding=coding)
    specs = specs or specs_of(pieces)
    found = decode_tensor(blob, specs, shape=shape)
    slow = reference.read(blob, [(spec.kind, spec.count) for spec in specs], shape)
    assert len(found) == len(pieces)
    for piece, values, again in zip(pieces, found, slow, strict=True):
        assert values.dtype == (RAW[piece.kind] if isinstance(piece.kind, str) else ("u1" if piece.kind <= 8 else "u2"))
        assert values.tobytes() == piece.values.astype(values.dtype).tobytes()
        assert patterns_of(values) == again
    return blob


def entropy_bytes(values: np.ndarray) -> float:
    """Zero-order entropy."""
    share = np.unique(values, return_counts=True)[1] / values.size
    return float(-(share * np.log2(share)).sum()) * values.size / 8


def uneven_mask(rng: np.random.Generator, shape: tuple[int, ...], share: float) -> np.ndarray:
    """A mask whose rows and columns differ in how many ones they have."""
    rows = np.exp(rng.standard_normal((shape[0], 1)))
    columns = np.exp(rng.standard_normal((1, math.prod(shape[1:]))))
    return (rng.random((rows.size, columns.size)) < np.minimum(1, share * rows * columns)).reshape(-1).astype(np.uint8)


# --- against the slow reader --------------------------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn) -> tuple[list[Piece], tuple[int, ...]]:
    """Any pieces: codes of every width, masks, every raw dtype; few values, many of one, sorted, or anything."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    total = math.prod(shape)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    pieces = []
    for i in range(draw(st.integers(1, 3))):
        kind = draw(st.one_of(st.integers(1, 16), st.sampled_from(sorted(RAW))))
        rows = shape[0] if shape else 1
        count = draw(st.sampled_from([0, 1, total, total // rows, 3 * rows, total + 1]))
        width = kind if isinstance(kind, int) else 8 * np.dtype(RAW[kind]).itemsize
        spread = draw(st.sampled_from(["any", "few", "zeros", "sorted"]))
        values = (
            rng.integers(0, 2**width, count, dtype=np.uint64, endpoint=False) if width < 64 else rng.bytes(8 * count)
        )
        values = np.frombuffer(values, dtype="<u8") if isinstance(values, bytes) else values
        if spread == "few" and count:
            values = values[rng.integers(0, min(3, count), count)]
        if spread == "zeros":
            values = values * (rng.random(count) < 0.2)
        if spread == "sorted":
            values = np.sort(values)
        if isinstance(kind, int):
            pieces.append(Piece(f"p{i}", kind, values.astype(np.uint16)))
        else:
            pieces.append(Piece(f"p{i}", kind, values.astype(f"<u{width // 8}").view(RAW[kind])))
    return pieces, shape


@settings(max_examples=60)
@given(tensors(), st.sampled_from(CODINGS))
def test_any_pieces_come_back_and_the_slow_reader_agrees(
    case: tuple[list[Piece], tuple[int, ...]], coding: Coding
) -> None:
    check(*case, coding)


@pytest.mark.parametrize("shape", [(20, 1, 5, 5), (24, 96), (12, 16, 3, 3), (300,), (2, 700)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 11])
def test_codes_of_a_layer(shape: tuple[int, ...], bits: int) -> None:
    rng = np.random.default_rng(bits)
    w = rng.standard_normal(shape) * np.exp(rng.standard_normal((shape[0], *[1] * (len(shape) - 1))))
    most = 2 ** (bits - 1) - 1 if bits > 1 else 1
    codes = np.clip(np.rint(w * most / 3), -most, most).reshape(-1) + most if bits > 1 else w.reshape(-1) > 1
    check([Piece("scale", "F32", rng.random(1, np.float32)), Piece("codes", bits, codes.astype(np.uint16))], shape)


@pytest.mark.parametrize("shape", [(20, 2, 5, 5), (20, 96), (200,)])
@pytest.mark.parametrize("kind", [3, "F32", "F16", "BF16", "F64"])
def test_survivors_of_a_mask_whose_number_is_not_declared(shape: tuple[int, ...], kind: int | str) -> None:
    rng = np.random.default_rng(7)
    mask = uneven_mask(rng, shape, 0.1)
    alive = int(mask.sum())
    if isinstance(kind, int):
        values = rng.integers(0, 2**kind, alive).astype(np.uint8)
    else:
        values = (
            rng.integers(0, 2**16, alive).astype("<u2")
            if kind == "BF16"
            else rng.standard_normal(alive).astype(RAW[kind])
        )
    pieces = [Piece("mask", 1, mask), Piece("values", kind, values)]
    for coding in CODINGS:
        check(pieces, shape, coding, [Spec("mask", 1, mask.size), Spec("values", kind, None)])


def test_floats_of_every_pattern() -> None:
    check([Piece("w", "F32", np.repeat(WEIRD, 9).view("<f4")), Piece("v", "F32", WEIRD.view("<f4"))], (8, 9))
    check([Piece("w", "F32", np.zeros(72, "<f4"))], (8, 9))
    check([Piece("w", "F32", -np.zeros(72, "<f4"))], (8, 9))


PLANS = {
    "even": models._Plan(model=0),
    **{f"adaptive{i}": models._Plan(model=1, prior=i) for i in range(4)},
    "rows": models._Plan(model=2, prior=1, lines=(np.arange(20, dtype=np.uint8) % 3, np.zeros(64, np.uint8))),
    "both": models._Plan(
        model=2, prior=3, lines=(np.arange(20, dtype=np.uint8) % 2, np.arange(64, dtype=np.uint8) % 8)
    ),
    "split": models._Plan(model=3, pivot=1, parts=(models._Plan(model=4, fold=1), models._Plan(model=1, prior=0))),
    **{f"mixed{fold}": models._Plan(model=4, fold=i) for i, fold in enumerate(mixing.FOLDS) if 64 % fold == 0},
    **{f"distance{way}": models._Plan(model=3, way=way) for way in range(4)},
}
MASKS = [name for name in PLANS if name.startswith(("mixed", "distance"))]


@pytest.mark.parametrize("name", PLANS)
def test_every_model_by_itself(name: str) -> None:
    """Not only those that win: what a model writes the slow reader reads, and the meter says how much it is."""
    rng = np.random.default_rng(3)
    size = 2 if name in MASKS else 5
    values = (rng.integers(0, size, 20 * 64) * uneven_mask(rng, (20, 64), 0.2)).astype(np.uint8)
    grid = Grid(20, 64, 1)
    writer, meter = Writer(), Meter()
    for coder in (writer, meter):
        models.whole_numbers(coder, values, values.size, size, grid, PLANS[name])
    raw, coded = writer.finish()
    reader = Reader(memoryview(raw), memoryview(coded))
    reader.turns = -(1 << 20)  # a place a round, as a matrix folded into one kernel a row has, is no writer's choice
    assert models.whole_numbers(reader, None, values.size, size, grid).tolist() == values.tolist()
    reader.finish()
    slow = reference.Reader(raw, coded)
    assert reference.whole(slow, values.size, size, reference.Grid(20, 64, 1)) == values.tolist()
    assert 0 <= len(raw) + len(coded) - meter.bits / 8 <= 4  # the coder's end


@pytest.mark.parametrize("way", range(4))
@pytest.mark.parametrize("shape", [(20, 64), (3, 1000), (200, 3)])
def test_masks_by_distance_at_their_ends(way: int, shape: tuple[int, int]) -> None:
    """No ones, all ones, one at either end, whole lines of ones; and what lies beyond."""
    grid, places = Grid(*shape, 1), shape[0] * shape[1]
    plan = models._Plan(model=3, way=way)
    rng = np.random.default_rng(way)
    masks = [np.zeros(places, np.uint8), np.ones(places, np.uint8), np.repeat(rng.integers(0, 2, shape[0]), shape[1])]
    masks += [(np.arange(places) == i).astype(np.uint8) for i in (0, 1, places - 1)]
    masks += [(rng.random(places) < share).astype(np.uint8) for share in (0.003, 0.02, 0.5, 0.98)]
    for mask in masks:
        mask = mask.astype(np.uint8)
        writer = Writer()
        lines, length = shape if way == 2 else shape[::-1]
        if (2 * int(mask.sum()) > places) if way < 2 else length > max(64, 16 * lines):
            with pytest.raises(ValueError, match="a mask of"):  # too much memory, or time, for its bytes
                models.whole_numbers(writer, mask, places, 2, grid, plan)
            continue
        models.whole_numbers(writer, mask, places, 2, grid, plan)
        raw, coded = writer.finish()
        reader = Reader(memoryview(raw), memoryview(coded))
        assert models.whole_numbers(reader, None, places, 2, grid).tolist() == mask.tolist()
        reader.finish()
        slow = reference.Reader(raw, coded)
        assert reference.whole(slow, places, 2, reference.Grid(*shape, 1)) == mask.tolist()
        assert slow.state == 0 and not slow.words


@pytest.mark.parametrize(
    ("kind", "ways"),
    [("rows", [models._BY_ROW]), ("columns", [models._BY_COLUMN]), ("bursts", [models._PLAIN, models._BETWEEN])],
)
def test_masks_take_what_a_perfect_coder_of_their_kind_would(kind: str, ways: list[int]) -> None:
    """Ones whose density differs by row or by column, or that come in bursts: bits by an independent formula."""
    rng = np.random.default_rng(9)
    chance = np.full((256, 1536), 0.02)
    if kind == "bursts":
        on = np.repeat(rng.random((256, 48)) < 0.2, 32, axis=1)
        chance = np.where(on, 0.12, 0.0005)
    else:
        chance = chance * rng.lognormal(sigma=1.0, size=(256, 1) if kind == "rows" else (1, 1536)).clip(0, 20)
    mask = (rng.random(chance.shape) < chance).astype(np.uint8)
    plan = models._best(mask.reshape(-1), 2, Grid(256, 1536, 1))
    assert plan.model == 3 and plan.way in ways
    found = len(encode_tensor([Piece("mask", 1, mask.reshape(-1))], shape=mask.shape))
    if kind == "bursts":
        limit = 0.98 * memoryless(mask) / 8
    else:
        limit = 1.01 * by_row(mask if kind == "rows" else mask.T) / 8
    assert found < limit


def test_contexts_are_halved_before_they_overflow() -> None:
    """10,800 places share the few contexts of narrow rows."""
    rng = np.random.default_rng(5)
    mask = (rng.random((1200, 9)) < 0.3).astype(np.uint8).reshape(-1)
    writer = Writer()
    models.whole_numbers(writer, mask, mask.size, 2, Grid(1200, 9, 1), models._Plan(model=4))
    raw, coded = writer.finish()
    assert (
        models.whole_numbers(Reader(memoryview(raw), memoryview(coded)), None, mask.size, 2, Grid(1200, 9, 1)).tolist()
        == mask.tolist()
    )
    slow = reference.whole(reference.Reader(raw, coded), mask.size, 2, reference.Grid(1200, 9, 1))
    assert slow == mask.tolist()


def test_no_entry_of_a_table_depends_on_how_a_machine_rounds() -> None:
    """The documentation defines the tables by mathematics: doubles must be far nearer to it than to the next entry."""
    k = np.arange(1, 1 << 20)
    logs = 256 * np.log(k)
    assert np.abs(logs % 1 - 0.5).min() > 1e-8 > 100 * np.spacing(logs.max())
    x = np.arange(-3072, 3072)
    guesses = 2**24 / (1 + np.exp(-x / 256))
    assert np.abs(guesses % 1 - 0.5).min() > 1e-6 > 100 * np.spacing(guesses.max())
    assert (mixing._log()[k] == np.rint(logs)).all()


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_a_stream_takes_its_entropy_and_two_percent(bits: int) -> None:
    rng = np.random.default_rng(bits)
    share = 0.7 ** np.arange(2**bits)
    codes = rng.choice(2**bits, 60_000, p=share / share.sum()).astype(np.uint8)
    size = len(encode_tensor([Piece("codes", bits, codes)], shape=(200, 300)))
    assert 0.99 * entropy_bytes(codes) < size < 1.02 * entropy_bytes(codes) + 10


def test_rows_of_different_spread_take_less_than_the_entropy() -> None:
    rng = np.random.default_rng(1)
    w = rng.standard_normal((128, 400)) * np.exp(rng.standard_normal((128, 1)))
    codes = (np.clip(np.rint(w * 2), -7, 7) + 7).astype(np.uint8).reshape(-1)
    assert len(encode_tensor([Piece("codes", 4, codes)], shape=(128, 400))) < 0.9 * entropy_bytes(codes)


@pytest.mark.parametrize("shape", [(120, 400), (60, 20, 3, 3)])
def test_a_mask_of_uneven_rows_and_columns_takes_less_than_its_entropy(shape: tuple[int, ...]) -> None:
    mask = uneven_mask(np.random.default_rng(2), shape, 0.04)
    assert len(encode_tensor([Piece("mask", 1, mask)], shape=shape)) < 0.92 * entropy_bytes(mask)


def test_kernels_with_neighbours_take_less_than_the_entropy() -> None:
    rng = np.random.default_rng(4)
    mask = (rng.random((40, 30, 1)) < 0.3) & (rng.random((40, 30, 9)) < 0.8)
    size = len(encode_tensor([Piece("mask", 1, mask.reshape(-1))], shape=(40, 30, 3, 3)))
    assert size < 0.85 * entropy_bytes(mask.reshape(-1))


def test_ascending_levels_take_less_than_their_bytes() -> None:
    levels = np.sort(np.random.default_rng(0).standard_normal(256)).astype(np.float32)
    orders = math.lgamma(257) / math.log(2) / 8  # the bytes that any order but one could have said
    assert len(encode_tensor([Piece("levels", "F32", levels)], shape=(256,))) < 4 * 256 - orders


def test_raw_numbers_of_few_values_are_listed() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal(200).astype(np.float32)[rng.integers(0, 200, 40_000)]
    size = len(encode_tensor([Piece("w", "F32", w)], shape=(100, 400)))
    assert size < 1.02 * entropy_bytes(w) + 4 * 200


def test_entropy_is_never_larger_than_bitpacked() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 20, 100):
        for kind, values in ((8, rng.integers(0, 256, count)), ("F32", rng.standard_normal(count).astype(np.float32))):
            piece = Piece("p", kind, values)
            sizes = {c: len(encode_tensor([piece], shape=(count,), coding=c)) for c in CODINGS}
            assert sizes["entropy"] <= sizes["bitpacked"] <= sizes["none"]


def test_memory_stays_near_what_the_values_take() -> None:
    codes = np.random.default_rng(0).integers(0, 16, 4_000_000).astype(np.uint8)
    pieces, shape = [Piece("codes", 4, codes)], (2000, 2000)
    blob = encode_tensor(pieces, shape=shape)
    tracemalloc.start()
    decode_tensor(blob, specs_of(pieces), shape=shape)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * codes.nbytes  # the values, the words, and one block as 32-bit numbers


# --- what is tried -------------------------------------------------------------------------------------------------


def small_masks() -> dict[str, np.ndarray]:
    """Masks of small layers, each with one thing to learn, or with none."""
    rng = np.random.default_rng(11)
    kernels = (rng.random((40, 30, 1)) < 0.3) & (rng.random((40, 30, 9)) < 0.8)
    image = (rng.random((60, 3, 25)) < 0.4 * np.exp(-0.15 * (np.arange(25) - 12) ** 2)).reshape(60, 75)
    dead = rng.random((60, 80)) < 0.2
    dead[rng.random(60) < 0.5] = 0
    dead[:, rng.random(80) < 0.5] = 0
    smooth = np.cumsum(rng.standard_normal((32, 16, 9)), axis=2) > 0
    alike = np.repeat(rng.random((20, 100)) < 0.3, 3, axis=0) ^ (rng.random((60, 100)) < 0.03)
    masks = {
        "signs of a matrix": rng.random((96, 64)) < 0.5,
        "signs of kernels": rng.random((32, 32, 9)) < 0.5,
        "a tenth": rng.random((64, 80)) < 0.1,
        "a tenth of kernels": rng.random((32, 32, 9)) < 0.1,
        "uneven rows": rng.random((64, 90)) < 0.15 * np.exp(rng.standard_normal((64, 1))),
        "uneven columns": rng.random((64, 90)) < 0.15 * np.exp(rng.standard_normal((1, 90))),
        "uneven both": uneven_mask(rng, (60, 90), 0.05).reshape(60, 90),
        "kernels": kernels,
        "smooth signs": smooth,
        "an image": image,
        "dead lines": dead,
        "rows alike": alike,
        "tiny": rng.random((16, 3, 9)) < 0.3,
    }
    return {name: mask.astype(np.uint8).reshape(*mask.shape[:2], -1) for name, mask in masks.items()}


@pytest.mark.parametrize("name", small_masks())
def test_what_is_not_tried_would_save_little(name: str) -> None:
    """Against every fold of the mixing model run to its end: at most 2 % and two bytes of a mask."""
    mask = small_masks()[name]
    grid, flat = Grid(*mask.shape), mask.reshape(-1)
    found = models._best(flat, 2, grid).bits
    for fold, size in enumerate(mixing.FOLDS):
        if models._folded(grid, size)[0]:
            assert found <= 1.02 * models._measured(flat, 2, grid, models._Plan(model=4, fold=fold)) + 16


def test_signs_that_say_nothing_cost_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "sparse_mask", lambda *_: pytest.fail("the mixing model was run"))
    for name in ("signs of a matrix", "signs of kernels", "a tenth"):
        mask = small_masks()[name]
        models._best(mask.reshape(-1), 2, Grid(*mask.shape))


def test_a_trial_is_written_as_it_was_measured() -> None:
    """A tape says the same as the model run once more, in the file and in the meter."""
    mask = small_masks()["kernels"]
    grid, flat = Grid(*mask.shape), mask.reshape(-1)
    plan = models._best(flat, 2, grid)
    assert plan.model == 4 and plan.tape is not None
    again = models._Plan(model=4, fold=plan.fold)
    files, meters = (Writer(), Writer()), (Meter(), Meter())
    for coders in (files, meters):
        for coder, each in zip(coders, (plan, again), strict=True):
            models.whole_numbers(coder, flat, flat.size, 2, grid, each)
    assert files[0].finish() == files[1].finish() and files[0].turns == files[1].turns
    assert math.isclose(meters[0].bits, meters[1].bits) and math.isclose(meters[0].bits, plan.bits)
    assert meters[0].turns == meters[1].turns


@pytest.mark.parametrize(("size", "count"), [(2, 5000), (256, 777), (3, 16), (300, 4000)])
def test_tables_counted_at_once_take_what_they_take_one_by_one(size: int, count: int) -> None:
    values = np.minimum(np.random.default_rng(size).geometric(0.1, count) - 1, size - 1).astype(np.uint16)
    meter, tape = Meter(), Tape()
    after = [models._adaptive(coder, values, count, np.full(size, 8))[1].tolist() for coder in (meter, tape)]
    assert after[0] == after[1] and math.isclose(meter.bits, tape.bits) and meter.turns == tape.turns


# --- what is refused ----------------------------------------------------------------------------------------------


def test_wrong_pieces_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"coding='zip': must be one of 'entropy', 'bitpacked', 'none'"):
        encode_tensor([], shape=(), coding="zip")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"kind=17: must be 1 to 16 bits or one of F64"):
        encode_tensor([Piece("p", 17, np.zeros(1, np.uint8))], shape=(1,))
    with pytest.raises(ValueError, match=r"kind='F80'"):
        encode_tensor([Piece("p", "F80", np.zeros(1))], shape=(1,))
    with pytest.raises(ValueError, match=r"'p': values from 0 to 4 do not fit into 2 bits"):
        encode_tensor([Piece("p", 2, np.array([0, 4]))], shape=(2,))
    with pytest.raises(ValueError, match=r"'p' has 2 dimensions"):
        encode_tensor([Piece("p", 2, np.zeros((2, 2), np.uint8))], shape=(2, 2))
    with pytest.raises(ValueError, match=r"'p' is float64, but its kind F32"):
        encode_tensor([Piece("p", "F32", np.zeros(2))], shape=(2,))


@pytest.mark.parametrize(
    ("data", "specs", "words"),
    [
        (b"", [Spec("p", 2, 4)], "no bytes for a tensor with pieces"),
        (b"\x01", [], "1 bytes for a tensor without pieces"),
        (b"\x09", [Spec("p", 2, 4)], "form 9"),
        (b"\x01", [Spec("p", 2, 4)], "'p' needs 1 bytes, 0 are left"),
        (b"\x01\x00\x00", [Spec("p", 2, 4)], "1 bytes more"),
        (b"\x01\x80", [Spec("p", 2, 3)], "set bits after its last value"),
        (b"\x00\x04", [Spec("p", 2, 1)], "does not fit into 2 bits"),
        (b"\x01\x00", [Spec("p", 2, None)], "no mask comes before"),
        (b"\x01\x00", [Spec("p", 2, -1)], "a count of -1"),
        (b"\x02\x00", [Spec("p", 2, 4)], "ends in a zero byte"),
        (b"\x02" + bytes(40) + b"\x01", [Spec("p", 2, 4)], "do not end where the pieces do"),
        (b"\x03", [Spec("p", 2, 4)], "length of the plain bytes is cut off"),
        (b"\x03" + b"\xff" * 12, [Spec("p", 2, 4)], "length of the plain bytes is cut off"),
        (b"\x03\x05\x00", [Spec("p", 2, 4)], "5 plain bytes are declared, 1 are there"),
        (b"\x03\x01\x00", [Spec("p", 8, 4)], "4 plain bytes are due, 1 are left"),
    ],
)
def test_damage_is_refused_in_words(data: bytes, specs: list[Spec], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode_tensor(data, specs, shape=(2, 2))


@settings(max_examples=150)
@given(st.data())
def test_damaged_blobs_give_values_of_the_right_shape_or_a_value_error(data: st.DataObject) -> None:
    pieces, shape = data.draw(tensors())
    blob = bytearray(encode_tensor(pieces, shape=shape))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(blob)))
        change = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if change == "flip" and place < len(blob):
            blob[place] ^= 1 << data.draw(st.integers(0, 7))
        elif change == "cut":
            del blob[place:]
        else:
            blob[place:place] = data.draw(st.binary(min_size=1, max_size=4))
    try:
        found = decode_tensor(bytes(blob), specs_of(pieces), shape=shape)
    except ValueError:
        return
    assert [values.size for values in found] == [p.values.size for p in pieces]


def _first_symbols(sizes: list[int], symbols: list[int]) -> bytes:
    """A blob that begins with these even choices."""
    writer = Writer()
    for size, symbol in zip(sizes, symbols, strict=True):
        writer.number(symbol, size)
    return b"\x02" + writer.finish()[1]


def test_models_where_they_may_not_stand_are_refused() -> None:
    mixed = _first_symbols([5], [4])
    with pytest.raises(ValueError, match="cannot be of model 4"):
        decode_tensor(mixed, [Spec("p", 2, 4)], shape=(2, 2))
    with pytest.raises(ValueError, match="cannot be of model 4"):
        decode_tensor(mixed, [Spec("p", 1, 2**24)], shape=(2**12, 2**12))
    with pytest.raises(ValueError, match="do not fold into runs of 4"):
        decode_tensor(_first_symbols([5, 8], [4, 1]), [Spec("p", 1, 18)], shape=(3, 6))
    with pytest.raises(ValueError, match="cannot be counted by its lines"):
        decode_tensor(_first_symbols([5, 4], [3, 2]), [Spec("p", 1, 2**16)], shape=(2**16,))
    with pytest.raises(ValueError, match="cannot be counted by its lines"):
        decode_tensor(_first_symbols([5, 4], [3, 3]), [Spec("p", 1, 2**17)], shape=(2**15, 4))
    with pytest.raises(ValueError, match="31 ones in 24 places"):
        decode_tensor(_first_symbols([5, 4, 6, 16], [3, 0, 5, 15]), [Spec("p", 1, 24)], shape=(24,))
    with pytest.raises(ValueError, match="beyond the 24 places"):  # one one, 31 places from the beginning
        decode_tensor(_first_symbols([5, 4, 6, 5, 6, 16], [3, 0, 1, 0, 5, 15]), [Spec("p", 1, 24)], shape=(24,))
    with pytest.raises(ValueError, match="a line of 12 places has 15 ones"):
        counted = _first_symbols([5, 4, 5, 5, 5, 8, 8], [3, 2, 0, 4, 4, 7, 7])
        decode_tensor(counted, [Spec("p", 1, 24)], shape=(2, 12))
    with pytest.raises(ValueError, match="15 gaps in a mask of 24 places"):
        decode_tensor(_first_symbols([5, 4, 6, 8], [3, 0, 4, 7]), [Spec("p", 1, 24)], shape=(24,))
    with pytest.raises(ValueError, match="cannot be counted by its lines"):  # 65 turns for 130 places
        decode_tensor(_first_symbols([5, 4], [3, 2]), [Spec("p", 1, 130)], shape=(2, 65))
    # A split whose mask is of gaps (two ones) whose lengths are a split again: no recursion without end.
    nested = _first_symbols([5, 4, 5, 4, 4, 2, 5], [3, 1, 3, 0, 2, 0, 3])
    with pytest.raises(ValueError, match="cannot be of model 3"):
        decode_tensor(nested, [Spec("p", 2, 4)], shape=(2, 2))
    with pytest.raises(ValueError, match="16 classes of rows and 2 of columns are more than 16 pairs"):
        decode_tensor(_first_symbols([5, 4, 16, 16, 16, 16], [2, 0, 15, 0, 0, 1]), [Spec("p", 2, 4)], shape=(2, 2))
    with pytest.raises(ValueError, match="has too many lines for classes"):
        decode_tensor(_first_symbols([5, 4], [2, 0]), [Spec("p", 2, 70_000)], shape=(70_000,))
    writer = Writer()
    writer.number(4, 5)
    writer.number(0, 8)
    mixing._flags(writer, np.ones(4096, np.uint8), 4096, 1)
    mixing._flags(writer, np.ones(144, np.uint8), 144, 9)
    _, coded = writer.finish()
    with pytest.raises(ValueError, match=f"more than the {2048 + 32 * len(coded)} turns of the coder"):
        decode_tensor(b"\x02" + coded, [Spec("p", 1, 4096 * 144)], shape=(4096, 16, 3, 3))
    enough = 5 * 4096 // 32 + 16  # plain bytes nobody wants pay for the flags; then the mask itself is refused
    filled = b"\x03" + bytes([enough & 127 | 128, enough >> 7]) + bytes(enough) + coded
    with pytest.raises(ValueError, match="36864 rounds, more than 16384"):
        decode_tensor(filled, [Spec("p", 1, 4096 * 144)], shape=(4096, 16, 3, 3))


def test_the_time_of_reading_is_bounded_by_the_bytes() -> None:
    """A coded stream of no bytes is zeros without end: no model may make hours of it."""
    for columns, rows in ((16384, 64), (4096, 256), (2, 4096)):
        for first in ([5, 8], [5, 4, 4]):  # the mixing model; places in lines and the other way round
            for last in range(first[-1]):
                numbers = [4, 0] if len(first) == 2 else [3, last]
                data = _first_symbols(first[:2], numbers)
                start = time.process_time()
                with contextlib.suppress(ValueError):
                    decode_tensor(data, [Spec("p", 1, rows * columns)], shape=(rows, columns))
                assert time.process_time() - start < 2.0  # 16384 rounds took 4


def test_a_writer_prefers_more_bytes_to_what_no_reader_takes() -> None:
    """A mask with a handful of ones in many rows would cost the mixing model hundreds of rounds a byte."""
    mask = np.zeros((1024, 1024), dtype=np.uint8)
    mask[:: 1024 // 17, 7] = 1
    blob = encode_tensor([Piece("mask", 1, mask.reshape(-1))], shape=mask.shape)
    assert len(blob) < 64
    assert np.array_equal(decode_tensor(blob, [Spec("mask", 1, mask.size)], shape=mask.shape)[0], mask.reshape(-1))
