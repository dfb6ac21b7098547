"""A slow reader of coded tensors, written from docs/format-streams.md alone: no NumPy, no entropy coder."""

from __future__ import annotations

import math
from collections.abc import Sequence

RAW = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8}
RAW |= {"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
PRIORS = (16, 8, 2, 1)
FOLDS = (1, 4, 9, 16, 25, 36, 49, 64)


class Grid:
    def __init__(self, rows: int, inputs: int, inner: int, mask: list[int] | None = None):
        self.rows, self.inputs, self.inner, self.mask = rows, inputs, inner, mask
        self.columns = inputs * inner

    def places(self) -> list[int]:
        every = range(self.rows * self.columns)
        return list(every) if self.mask is None else [i for i in every if self.mask[i]]


def grid_of(count: int, shape: Sequence[int], mask: list[int] | None) -> Grid:
    rows, inputs, inner = (shape[0], shape[1], math.prod(shape[2:])) if len(shape) > 1 else (1, math.prod(shape), 1)
    if mask is not None and len(mask) == rows * inputs * inner and count == sum(mask) and count != len(mask):
        return Grid(rows, inputs, inner, mask)
    if count == rows * inputs * inner:
        return Grid(rows, inputs, inner)
    if count == rows * inputs:
        return Grid(rows, inputs, 1)
    if rows and count % rows == 0:
        return Grid(rows, count // rows, 1)
    return Grid(1, count, 1)


# --- section 3: the coder -----------------------------------------------------------------------------------------


class Reader:
    def __init__(self, plain: bytes, coded: bytes):
        assert not coded or coded[-1]
        padded = coded + bytes(-len(coded) % 4)
        self.words = [int.from_bytes(padded[i : i + 4], "little") for i in range(0, len(padded), 4)]
        self.state = 0
        self.refill()
        self.refill()
        self.plain = list(plain)

    def refill(self) -> None:
        if self.state < 2**32 and self.words:
            self.state = self.state << 32 | self.words.pop()

    def symbol(self, bounds: list[int]) -> int:
        q = self.state % 2**24
        low, high = 0, len(bounds) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if bounds[middle] <= q else (low, middle)
        self.state = (self.state >> 24) * (bounds[low + 1] - bounds[low]) + q - bounds[low]
        self.refill()
        return low

    def symbols(self, weights: list[int], count: int) -> list[int]:
        size, total, below, bounds = len(weights), sum(weights), 0, []
        scale = (2**24 - size) / total
        for i, weight in enumerate(weights):
            bounds.append(i + math.floor(below * scale))
            below += weight
        bounds.append(2**24)
        return [self.symbol(bounds) for _ in range(count)]

    def decision(self, p: int) -> int:
        return self.symbol([0, 2**24 - p, 2**24])

    def number(self, size: int) -> int:
        return self.symbols([1] * size, 1)[0] if size > 1 else 0

    def raw(self, size: int) -> list[int]:
        taken, self.plain = self.plain[:size], self.plain[size:]
        assert len(taken) == size
        return taken


# --- section 4: whole numbers -------------------------------------------------------------------------------------


def adaptive(reader: Reader, count: int, weights: list[int]) -> list[int]:
    """Also adds to `weights`."""
    out: list[int] = []
    while len(out) < count:
        run = reader.symbols(weights, min(count - len(out), 2**18, max(16, len(out) // 8)))
        out += run
        for value in run:
            weights[value] += 16
    return out


def classes(reader: Reader, count: int, size: int, grid: Grid) -> list[int]:
    prior = PRIORS[reader.number(4)]
    sides = []
    for lines in (grid.rows, grid.columns):
        many = 1 + reader.number(16)
        sides.append((many, adaptive(reader, lines, [8] * many) if many > 1 else [0] * lines))
    (rows, of_row), (columns, of_column) = sides
    cells = [(of_row[p // grid.columns], of_column[p % grid.columns]) for p in grid.places()]
    assert len(cells) == count
    out, grown = [0] * count, [0] * size
    for row in range(rows):
        for column in range(columns):
            here = [i for i, cell in enumerate(cells) if cell == (row, column)]
            start = [prior + 1024 * t // max(1, sum(grown)) for t in grown]
            weights = list(start)
            for i, value in zip(here, adaptive(reader, len(here), weights), strict=True):
                out[i] = value
            grown = [t + w - s for t, w, s in zip(grown, weights, start, strict=True)]
    return out


def whole(reader: Reader, count: int, size: int, grid: Grid, part: bool = False) -> list[int]:
    if size < 2 or not count:
        return [0] * count
    model = reader.number(5)
    if model == 0:
        return reader.raw(count) if size == 256 else reader.symbols([1] * size, count)
    if model == 1:
        return adaptive(reader, count, [PRIORS[reader.number(4)]] * size)
    if model == 2:
        return classes(reader, count, size, grid)
    if model == 3 and size == 2:
        return distances(reader, count, grid)
    if model == 3:
        assert not part, "a split inside a split, or inside distances"
        pivot = reader.number(size)
        mask = whole(reader, count, 2, grid, True)
        rest = iter(whole(reader, sum(mask), size - 1, within(grid, mask), True))
        return [pivot if not bit else (r + 1 if (r := next(rest)) >= pivot else r) for bit in mask]
    fold = FOLDS[reader.number(8)]
    inputs, inner = (grid.inputs, grid.inner) if fold == 1 else (grid.inputs // fold, fold)
    return sparse_mask(reader, grid.rows, inputs, inner)


def below(reader: Reader, lengths: list[int]) -> list[int]:
    """Numbers of these bit lengths."""
    out = [min(1, n) for n in lengths]
    for length in sorted(set(lengths)):
        left = length - 1
        while left > 0:
            digit = min(16, left)
            left -= digit
            here = [i for i, n in enumerate(lengths) if n == length]
            for i, low in zip(here, reader.symbols([1] * 2**digit, len(here)), strict=True):
                out[i] = out[i] << digit | low
    return out


def distances(reader: Reader, count: int, grid: Grid) -> list[int]:
    way = reader.number(4)
    if way == 2:
        return lines(reader, grid.rows, grid.columns)
    if way == 3:
        turned = lines(reader, grid.columns, grid.rows)
        return [turned[c * grid.rows + r] for r in range(grid.rows) for c in range(grid.columns)]
    ones = below(reader, [reader.number(count.bit_length() + 1)])[0]
    assert 2 * ones <= count
    size = count.bit_length() + 1
    lengths = [0] * ones
    many = ones if way == 0 else (ones + 1) // 2
    first = whole(reader, many, size, Grid(1, many, 1), True)
    lengths[:: 1 if way == 0 else 2] = first
    if way == 1:
        sums: dict[int, list[int]] = {}
        for i in range(1, ones, 2):
            sums.setdefault(lengths[i - 1] + lengths[i + 1 if i + 1 < ones else i - 1], []).append(i)
        total = [16 * first.count(v) for v in range(size)]
        for here in (sums[key] for key in sorted(sums)):
            start = [1 + 1024 * t // max(1, sum(total)) for t in total]
            weights = list(start)
            for i, value in zip(here, adaptive(reader, len(here), weights), strict=True):
                lengths[i] = value
            total = [t + w - s for t, w, s in zip(total, weights, start, strict=True)]
    out, place = [0] * count, -1
    for step in below(reader, lengths):
        place += step
        out[place] = 1
    return out


def lines(reader: Reader, many: int, length: int) -> list[int]:
    left = below(reader, whole(reader, many, length.bit_length() + 1, Grid(1, many, 1), True))
    out = [[0] * length for _ in range(many)]
    for j in range(length):
        for i, ones in enumerate(left):
            n = length - j
            out[i][j] = reader.decision((ones << 24) // n) if 0 < ones < n else int(ones == n)
            left[i] -= out[i][j]
    return [bit for line in out for bit in line]


def within(grid: Grid, mask: list[int]) -> Grid:
    kept = [0] * (grid.rows * grid.columns)
    for place, bit in zip(grid.places(), mask, strict=True):
        kept[place] = bit
    return Grid(grid.rows, grid.inputs, grid.inner, kept)


# --- section 5: mixing --------------------------------------------------------------------------------------------


def log(x: int) -> int:
    return round(256 * math.log(x))


def density(ones: int, seen: int) -> int:
    return max(0, 15 + ((log(16 * ones + 8) - log(16 * seen + 16)) >> 7))


class Mixer:
    def __init__(self, sizes: list[int]):
        self.counts = [[[0, 0] for _ in range(size)] for size in sizes]
        self.weights = [[65536 * 13 // 50] * 8 for _ in sizes]

    def round(self, reader: Reader, contexts: list[list[int]]) -> list[int]:
        bits, learned = [], []
        for place in contexts:
            x, used = 0, []
            for s, c in enumerate(place):
                zeros, ones = self.counts[s][c]
                logit, weight = log(16 * ones + 6) - log(16 * zeros + 6), min(7, (zeros + ones).bit_length())
                x += self.weights[s][weight] * logit
                used.append((s, weight, logit))
            x = max(-3071, min(3071, x >> 16))
            p = max(64, min(2**24 - 64, round(2**24 / (1 + math.exp(-x / 256)))))
            bits.append(reader.decision(p))
            learned.append((used, (bits[-1] * 2**24 - p) >> 8))
        steps = [[0] * 8 for _ in self.weights]
        for used, error in learned:
            for s, weight, logit in used:
                steps[s][weight] += logit * error
        self.weights = [
            [w + ((2 * g) >> 18) for w, g in zip(*pair, strict=True)] for pair in zip(self.weights, steps, strict=True)
        ]
        for place, bit in zip(contexts, bits, strict=True):
            for s, c in enumerate(place):
                self.counts[s][c][bit] += 1
        for s, c in {pair for place in contexts for pair in enumerate(place)}:
            if sum(self.counts[s][c]) > 4000:
                self.counts[s][c] = [(n + 1) >> 1 for n in self.counts[s][c]]
        return bits


def bits(reader: Reader, rows: int, alive: list[list[int]]) -> list[list[list[int]]]:
    inputs, inner = len(alive), len(alive[0])
    width = sum(map(sum, alive))
    chunk = max(8, rows * width // 2048)
    side = math.isqrt(inner) if math.isqrt(inner) ** 2 == inner else inner
    mixer = Mixer([128, inputs, 16 * inner, 32, 256])
    out: list[list[list[int]]] = []
    column = [[0] * inner for _ in range(inputs)]
    blank = [[0] * inner for _ in range(inputs)]
    for r in range(rows):
        row, ones, seen = [[0] * inner for _ in range(inputs)], 0, 0
        up = [out[-j] if r >= j else blank for j in (1, 2)]
        for k in range(inner):
            here = [i for i in range(inputs) if alive[i][k]]
            for first in range(0, len(here), chunk):
                contexts = []
                for i in here[first : first + chunk]:
                    few = min(3, sum(row[i]))
                    left = row[i][k - 1] if k % side else 0
                    above = row[i][k - side] if k >= side else 0
                    contexts.append(
                        [
                            8 * min(ones, 15) + min(7, 8 * seen // max(1, width)),
                            i,
                            16 * k + 4 * few + 2 * left + above,
                            8 * few + 4 * up[0][i][k] + 2 * up[1][i][k] + left,
                            16 * density(column[i][k], r) + density(ones, seen),
                        ]
                    )
                found = mixer.round(reader, contexts)
                for i, bit in zip(here[first : first + chunk], found, strict=True):
                    row[i][k] = bit
                ones, seen = ones + sum(found), seen + len(found)
        for i in range(inputs):
            for k in range(inner):
                column[i][k] += row[i][k]
        out.append(row)
    return out


def sparse_mask(reader: Reader, rows: int, inputs: int, inner: int) -> list[int]:
    lines = [row[0][0] for row in bits(reader, rows, [[1]])]
    fold = inner if inputs > 1 else 1
    flat = [bit[0] for row in bits(reader, inputs * inner // fold, [[1]] * fold) for bit in row]
    alive = [flat[i * inner : (i + 1) * inner] for i in range(inputs)]
    coded = iter(bits(reader, sum(lines), alive))
    out: list[int] = []
    for line in lines:
        row = next(coded) if line else [[0] * inner] * inputs
        out += [bit for place in row for bit in place]
    return out


# --- section 6: raw numbers ---------------------------------------------------------------------------------------


def planes(reader: Reader, count: int, width: int, real: bool, grid: Grid) -> list[int]:
    out = [0] * count
    for _ in range(width // 8):
        out = [v << 8 | b for v, b in zip(out, whole(reader, count, 256, grid), strict=True)]
        grid = Grid(1, count, 1)
    return [v >> 1 | (v & 1) << (width - 1) for v in out] if real else out


def ascending(reader: Reader, count: int, width: int) -> list[int]:
    keys, last = [], 0
    for step in below(reader, whole(reader, count, width + 1, Grid(1, count, 1))):
        last += step
        keys.append(last)
    return keys


def unkeyed(key: int, width: int, real: bool) -> int:
    if not real:
        return key
    top = 1 << (width - 1)
    return key ^ top if key & top else key ^ (2 * top - 1)


def patterns(reader: Reader, count: int, width: int, real: bool, grid: Grid) -> list[int]:
    if not count:
        return []
    way = reader.number(4)
    if way == 0:
        return planes(reader, count, width, real, grid)
    if way == 1:
        return [unkeyed(key, width, real) for key in ascending(reader, count, width)]
    if way == 2:
        size = 1 + reader.number(4096)
        keys = ascending(reader, size, width)
        return [unkeyed(keys[i], width, real) for i in whole(reader, count, size, grid)]
    mask = whole(reader, count, 2, grid)
    rest = iter(planes(reader, sum(mask), width, real, within(grid, mask)))
    return [next(rest) if bit else 0 for bit in mask]


# --- sections 1 and 2: the blob -----------------------------------------------------------------------------------


def read(data: bytes, specs: Sequence[tuple[int | str, int | None]], shape: Sequence[int]) -> list[list[int]]:
    """Values of each piece, given (kind, count) of each; raw numbers as bit patterns."""
    if not specs:
        assert not data
        return []
    form, rest = data[0], data[1:]
    reader = None
    if form in (2, 3):
        size = shift = 0
        while form == 3:
            size |= (rest[0] & 127) << shift
            more, rest, shift = rest[0] & 128, rest[1:], shift + 7
            if not more:
                break
        reader = Reader(rest[:size], rest[size:])
    found: list[list[int]] = []
    mask = None
    for kind, declared in specs:
        count = sum(mask or []) if declared is None else declared
        width = RAW[kind] if isinstance(kind, str) else kind
        if reader is None:
            values, rest = plain(rest, count, width, form == 0 or isinstance(kind, str))
        elif isinstance(kind, str):
            values = patterns(reader, count, width, kind[0] in "FB" and kind != "BOOL", grid_of(count, shape, mask))
        else:
            values = whole(reader, count, 2**width, grid_of(count, shape, mask))
        found.append(values)
        mask = values if kind == 1 else mask
    if reader is None:
        assert not rest
    else:
        assert reader.state == 0 and not reader.words and not reader.plain
    return found


def plain(data: bytes, count: int, width: int, aligned: bool) -> tuple[list[int], bytes]:
    width = -(-width // 8) * 8 if aligned else width
    size = -(-count * width // 8)
    number = int.from_bytes(data[:size], "little")
    assert len(data) >= size and not number >> (count * width)
    return [number >> (i * width) & ((1 << width) - 1) for i in range(count)], data[size:]
