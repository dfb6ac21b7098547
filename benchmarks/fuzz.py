"""What damaged and lying files do to the reader, kills to a file that is being saved, exceptions to the engine.

python -m benchmarks.fuzz
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgpack
import torch
import typer
from torch import Tensor, nn

import detent as dt
from benchmarks import ROOT, recording
from detent import pack
from detent.pack.dictionary import DICTIONARY
from detent.report.record import process_peak

MAGIC = b"\x89Detent\x02"
SECONDS = 20  # for one file; more is a hang
HEADROOM = 1 << 29  # bytes of address space beyond what a worker has after it has read every sample once
# Right in every checksum: may be somebody else's file. A form's sizes say what it is, and nothing says them twice.
FORGED = ("lying sizes", "forged value", "forged blob")
_SMALL = 1 << 22  # weights of a tensor that is worth decoding without a model


# --- samples ------------------------------------------------------------------------------------------------------


def targets() -> list[list[dt.Target]]:
    """Every kind of target, a few a file; the last of each file share a codebook or a threshold where they can."""
    u3 = dt.Uniform(bits=3)
    return [
        [u3, dt.Uniform(bits=5, granularity="channel", param_dtype="float16"), dt.Uniform(bits=8), dt.Binary()],
        [dt.Ternary(granularity="channel"), dt.PowerOfTwo(bits=4), dt.LearnedLevels(k=5), dt.TopK(keep=0.3)],
        [dt.NM(n=2, m=4), dt.Structured(group="filter", keep=0.5), dt.Zero(), dt.Round(dtype="bfloat16")],
        [
            dt.SparseLevels(sparse=dt.TopK(keep=0.2), survivors=u3),
            dt.SparseLevels(sparse=dt.NM(n=1, m=4), survivors=dt.Binary(granularity="channel")),
            dt.Uniform(bits=4, granularity=dt.Group(size=5)),
            dt.KernelCodebook(size=5, book="global", codebook_bits=None, param_dtype="float16"),
        ],
        [
            dt.KernelCodebook(size=4),
            dt.SparseLevels(sparse=dt.Structured(group="filter", keep=0.5), survivors=dt.LearnedLevels(k=3)),
            dt.LearnedLevels(k=16, granularity="channel", param_dtype="bfloat16"),
            dt.KernelCodebook(size=6, book="global"),
        ],
    ]


class Net(nn.Module):
    """Tensors of several shapes, dtypes and ties; never called."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3)
        self.c, self.d, self.e = nn.Conv2d(4, 4, 3), nn.Conv2d(2, 4, 3, bias=False), nn.Conv2d(2, 4, 3, bias=False)
        self.bn, self.half = nn.BatchNorm1d(4), nn.Linear(3, 2).to(torch.bfloat16)
        self.matrix = nn.Linear(8, 6, bias=False)
        self.tied = nn.Conv2d(2, 4, 3, bias=False)
        self.tied.weight = self.e.weight
        self.register_buffer("flags", torch.rand(5) > 0.5)
        for value in self.state_dict().values():
            if value.is_floating_point():
                value.normal_()


@dataclass(kw_only=True)
class Sample:
    """A sound file, and what its lives are."""

    name: str
    data: bytes
    model: nn.Module
    lives: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def is_container(self) -> bool:
        return self.data.startswith(MAGIC)


def samples(folder: Path, seeds: tuple[int, ...] = (1, 2)) -> list[Sample]:
    """Files of every kind, coding, life and form; those of the second seed are twins with other weights."""
    found = []
    for seed in seeds:
        for group, kinds in enumerate(targets()):
            model = Net(seed)
            last = kinds[-1]
            rules = [dt.Rule(match=f"^{name}.weight", target=t) for name, t in zip("abc", kinds[:3], strict=True)]
            rules.append(dt.Rule(match="^(d|e).weight", target=last))
            rules.append(dt.Rule(match="^matrix.weight", target=dt.VectorCodebook(block=2, size=4, zero=True)))
            run = dt.compress(model, dt.Recipe(rules))
            if group % 2:
                run.round_statistics("float16")
            full = snapshot(model)
            with run.compressed():
                compressed = snapshot(model)
            for coding in pack.CODINGS:
                for life in ("both", "compressed"):
                    for form in ("detent", "safetensors") if coding == "bitpacked" else ("detent",):
                        path = folder / f"sample.{form}"
                        dt.save(run, path, life, coding=coding, notes={"seed": seed})
                        lives = {"compressed": compressed} | ({"full": full} if life == "both" else {})
                        name = f"{group} {coding} {life} {form} {seed}"
                        found.append(Sample(name=name, data=path.read_bytes(), model=model, lives=lives))
    return found


def snapshot(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of a model, to the bit."""
    return {name: _as_bytes(value) for name, value in model.state_dict().items()}


def _as_bytes(value: Tensor) -> bytes:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# --- mutations ----------------------------------------------------------------------------------------------------


def split(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Blobs, deflated header, checksums of a container."""
    length = struct.unpack("<I", data[-8:-4])[0]
    packed = data[-8 - length : -8]
    inflate = zlib.decompressobj(-15, DICTIONARY)
    inflate.decompress(packed)
    checks = inflate.unused_data
    return data[8 : -8 - length], packed[: len(packed) - len(checks)], checks


def values_of(packed: bytes) -> list[Any]:
    """The values of a deflated header."""
    unpacker = msgpack.Unpacker()
    unpacker.feed(zlib.decompressobj(-15, DICTIONARY).decompress(packed))
    return list(unpacker)


def joined(blobs: bytes, packed: bytes | list[Any], checks: bytes) -> bytes:
    """A container whose own checksums are right."""
    if isinstance(packed, list):
        packer = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
        plain = b"".join(msgpack.packb(value) or b"" for value in packed)
        packed = packer.compress(plain) + packer.flush()
    header = packed + checks
    return MAGIC + blobs + header + struct.pack("<II", len(header), zlib.crc32(header))


def labels(values: list[Any]) -> list[str]:
    """For each value of a header whether it is a size (a length, count, dimension, rank, number of things)."""
    found: list[str] = []

    def take(label: str) -> Any:
        found.append(label)
        return values[len(found) - 1]

    def many(read: Callable[[], Any]) -> None:
        for _ in range(take("size")):
            read()

    def shape() -> None:
        many(lambda: take("size"))

    def form() -> None:
        kind = take("kind")
        for _ in range(5 if kind == 2 else 3 + kind):
            take("pointer")
        if kind == 2:
            many(lambda: take("size"))

    for _ in range(3):
        take("other")
    many(lambda: (take("text"), take("text")))
    many(lambda: take("text"))
    many(form)
    names = take("text")
    count = names.count("\n") + 1 if names else 0
    for _ in range(count):
        take("pointer")
    for _ in range(count):
        shape()
    rest = len(values) - len(found)
    # Counts and lengths until the aliases: from the end, notes and pairs of text and number.
    tail, at = 1, len(values) - 2
    while isinstance(values[at - 1], str):
        tail, at = tail + 2, at - 2
    found += ["size"] * (rest - tail) + ["other"] * tail
    return found


HUGE = (2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**47, 2**48 - 1, 2**48, 2**63, 2**64 - 1)


def lie(dice: random.Random, value: int) -> int:
    """Another number: a near one, a small one, a huge one."""
    return dice.choice(
        [max(value - 1, 0), value + 1, 2 * value + 2, value // 2, 0, 1, dice.randrange(256), dice.choice(HUGE)]
    )


def flipped(dice: random.Random, data: bytes, one: Sample, other: Sample) -> bytes:
    """A few bits are the other way round."""
    out = bytearray(data)
    for _ in range(dice.choice([1, 1, 1, 2, 3, 8])):
        out[dice.randrange(len(out))] ^= 1 << dice.randrange(8)
    return bytes(out)


def overwritten(dice: random.Random, data: bytes, one: Sample, other: Sample) -> bytes:
    """A run of bytes is noise, zeros, ones, or from elsewhere."""
    out, size = bytearray(data), dice.choice([1, 2, 4, 8, 64, 512])
    at = dice.randrange(len(out))
    out[at : at + size] = dice.choice([dice.randbytes(size), bytes(size), b"\xff" * size, data[:size]])
    return bytes(out)


def cut(dice: random.Random, data: bytes, one: Sample, other: Sample) -> bytes:
    """The end, the beginning or something between is missing."""
    first = dice.randrange(len(data))
    past = dice.choice([len(data), min(len(data), first + dice.choice([1, 2, 8, 100]))])
    return dice.choice([data[:first], data[first:], data[:first] + data[past:]])


def inserted(dice: random.Random, data: bytes, one: Sample, other: Sample) -> bytes:
    """There is more than there was."""
    at, first = dice.randrange(len(data) + 1), dice.randrange(len(data))
    more = dice.choice([dice.randbytes(dice.choice([1, 8, 100])), data[first : first + 64], data, other.data])
    return data[:at] + more + data[at:]


def spliced(dice: random.Random, data: bytes, one: Sample, other: Sample) -> bytes:
    """The head of one file and the tail of another; or this file's blobs under another's header."""
    if one.is_container and other.is_container and dice.random() < 0.6:
        blobs, mine = split(data)[0], split(other.data)
        return joined(dice.choice([blobs, blobs[: len(mine[0])].ljust(len(mine[0]), b"\0")]), *mine[1:])
    at = dice.randrange(len(data))
    return data[:at] + other.data[dice.choice([at, dice.randrange(len(other.data))]) :]


def swapped(dice: random.Random, data: bytes, one: Sample, other: Sample) -> bytes:
    """Two runs of bytes change places."""
    a, b = sorted(dice.sample(range(len(data)), 2))
    size = min(dice.choice([1, 4, 36, 144]), b - a, len(data) - b)
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def lying(dice: random.Random, data: bytes, one: Sample, other: Sample) -> bytes:
    """Sizes that are not so, under right checksums."""
    return _changed(dice, data, lambda label: label == "size", dice.choice([1, 1, 2, 3]))


def forged_value(dice: random.Random, data: bytes, one: Sample, other: Sample) -> bytes:
    """Any number of the header, under right checksums."""
    return _changed(dice, data, lambda label: True, dice.choice([1, 2]))


def _changed(dice: random.Random, data: bytes, wanted: Callable[[str], bool], times: int) -> bytes:
    blobs, packed, checks = split(data)
    values = values_of(packed)
    places = [i for i, label in enumerate(labels(values)) if wanted(label) and isinstance(values[i], int)]
    for _ in range(times):
        at = dice.choice(places)
        values[at] = lie(dice, values[at])
    if dice.random() < 0.1:
        checks = checks[: dice.randrange(len(checks) + 1)]
    return joined(blobs, values, checks)


def forged_blob(dice: random.Random, data: bytes, one: Sample, other: Sample) -> bytes:
    """Other bytes in a blob, under right checksums."""
    blobs, packed, _ = split(data)
    out = bytearray(blobs)
    for _ in range(dice.choice([1, 2, 5])):
        at = dice.randrange(len(out))
        size = dice.choice([1, 1, 2, 8])
        out[at : at + size] = dice.choice([dice.randbytes(size), bytes(size), b"\xff" * size])
    blobs = bytes(out[: len(blobs)]).ljust(len(blobs), b"\0")
    with tempfile.NamedTemporaryFile(dir=shared_memory()) as file:
        file.write(data)
        file.flush()
        with pack.Reader(file.name) as reader:
            lengths = [blob.length for blob in reader._head.blobs]
    checks, at = b"", 0
    for length in lengths:
        checks += struct.pack("<I", zlib.crc32(blobs[at : at + length]))
        at += length
    return joined(blobs, packed, checks)


MUTATIONS: dict[str, tuple[int, Callable[[random.Random, bytes, Sample, Sample], bytes]]] = {
    "flipped bits": (20, flipped),
    "overwritten bytes": (10, overwritten),
    "cut": (10, cut),
    "inserted bytes": (8, inserted),
    "spliced": (10, spliced),
    "swapped": (8, swapped),
    "lying sizes": (18, lying),
    "forged value": (8, forged_value),
    "forged blob": (8, forged_blob),
}
_CONTAINER_ONLY = ("lying sizes", "forged value", "forged blob")


def mutated(seed: int, index: int, pool: list[Sample]) -> tuple[str, Sample, str, bytes]:
    """Mutation `index`: its kind, the sample it was made from, the life to load, the bytes."""
    dice = random.Random(f"{seed}:{index}")
    kind = dice.choices(list(MUTATIONS), [weight for weight, _ in MUTATIONS.values()])[0]
    usable = [s for s in pool if s.is_container] if kind in _CONTAINER_ONLY else pool
    one = dice.choice(usable)
    # A twin of the same shapes half of the time: only its checksums tell it from this one.
    twins = [s for s in pool if s.name[:-1] == one.name[:-1] and s is not one] or pool
    other = dice.choice(twins if dice.random() < 0.5 else pool)
    data = MUTATIONS[kind][1](dice, one.data, one, other)
    return kind, one, dice.choice(sorted(one.lives)), data


# --- outcomes -----------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """A file that takes too long."""


def outcome(path: Path, data: bytes, sample: Sample, life: str, twin: nn.Module, aloof: dict[str, Tensor]) -> str:
    """What loading these bytes does."""
    path.write_bytes(data)
    written = sum(value._version for value in aloof.values())
    try:
        dt.load(path, twin, life)  # type: ignore[arg-type]
    except dt.FormatError:
        found = "FormatError"
    except ValueError as error:
        if not any(part in str(error) for part in ("does not fit this model", "holds only the compressed life")):
            return f"ValueError: {error}"
        found = "ValueError"
    except (Exception, Hang) as error:
        return f"{type(error).__name__}: {error}"
    else:
        same = snapshot(twin) == sample.lives[life]
        for value in aloof.values():
            value.zero_()
        return "identical" if same else "another file"
    is_written = written != sum(value._version for value in aloof.values())
    return f"{found}, but the model was written to" if is_written else found


def others(path: Path) -> str:
    """What all other ways of reading the same bytes do: nothing but FormatError is fine, or none at all."""
    try:
        with pack.Reader(path) as reader:
            for name, shape in ((name, reader.header.tensors[name]["shape"]) for name in reader.names):
                if len(shape) < 8 and torch.Size(shape).numel() <= _SMALL:
                    reader.tensor(name)
        pack.sizes(path)
    except dt.FormatError:
        return ""
    except (Exception, Hang) as error:
        return f"reading at random: {type(error).__name__}: {error}"
    return ""


def shared_memory() -> str | None:
    """A folder that is no disk, if there is one."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


class Tally:
    """What became of damaged files in this process: counts, the first that went wrong, time and memory; with limits."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._wrong: list[str] = []
        self._slowest, self._before = 0.0, process_peak()
        limit_memory()

        def stop(*_: object) -> None:
            raise Hang(f"more than {SECONDS} s")

        signal.signal(signal.SIGALRM, stop)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """A file is read inside, in limited time."""
        start = time.process_time()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self._slowest = max(self._slowest, time.process_time() - start)

    def add(self, index: int, kind: str, found: str, bad: str) -> None:
        """Count a file; `bad` says what is wrong with it, if anything is."""
        if bad:
            self._wrong.append(f"{index}: {kind}{bad}")
        self.counts[kind, found] += 1

    def figures(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "counts": [[*key, count] for key, count in sorted(self.counts.items())],
            "wrong": self._wrong[:20],
            "slowest_seconds": self._slowest,
            "grown_bytes": process_peak() - self._before,
        }


def work(seed: int, first: int, past: int) -> dict[str, Any]:
    """Mutations `first` to `past - 1` in this process, with a limit on time and memory."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=shared_memory()) as name:
        folder = Path(name)
        pool = samples(folder)
        path, twin = folder / "f", copy.deepcopy(pool[0].model)
        aloof = dict(twin.state_dict())
        for value in aloof.values():
            value.zero_()
        for sample in pool:  # what is built once is no cost of a damaged file
            for life in sample.lives:
                if outcome(path, sample.data, sample, life, twin, aloof) != "identical" or others(path):
                    raise AssertionError(f"the sound file {sample.name} does not load")
        tally, sound = Tally(), {sample.data for sample in pool}
        for index in range(first, past):
            kind, sample, life, data = mutated(seed, index, pool)
            if data in sound:  # cut off exactly at the end, or spliced at the start
                tally.counts[kind, "unchanged"] += 1
                continue
            with tally.timed():
                found = outcome(path, data, sample, life, twin, aloof)
                odd = others(path) if index % 4 == 0 else ""
            fine = ("FormatError", "ValueError", "identical", *(("another file",) if kind in FORGED else ()))
            bad = (
                "" if found in fine and not odd else f" of {sample.name}, {life}: {found if found not in fine else odd}"
            )
            tally.add(index, kind, found if found in fine else "WRONG", bad)
    return tally.figures()


def limit_memory() -> None:
    """From here on an allocation of more than the headroom fails, and counts as a wrong outcome."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + HEADROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


# --- killed while saving ------------------------------------------------------------------------------------------


def killed(trials: int, seed: int = 3) -> dict[str, Any]:
    """Kill -9 a process that saves two models to one name in turn, at random moments; the name must stand for one."""
    torch.set_num_threads(1)
    runs, wanted = [], []
    for one in (1, 2):
        torch.manual_seed(one)
        model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 50))
        runs.append(dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))])))
        wanted.append(snapshot(model))
    dice, seen, left, which = random.Random(seed), Counter[str](), 0, set[int]()
    twin = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 50))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.detent"
        start = time.perf_counter()
        dt.save(runs[0], path)
        once = time.perf_counter() - start
        for _ in range(trials):
            child = os.fork()
            if not child:
                while True:
                    for run in runs:
                        dt.save(run, path)
            time.sleep(dice.uniform(0.0, 6 * once))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            left += any(entry.name.endswith(".tmp") for entry in os.scandir(name))
            try:
                dt.load(path, twin)
                found = snapshot(twin)
            except dt.FormatError:
                found = None
            seen["old or new file" if found in wanted else "WRONG"] += 1
            which |= {i for i in (0, 1) if found == wanted[i]}
        dt.save(runs[1], path)
        tidy = sorted(os.listdir(name)) == ["model.detent"]
    return {
        "trials": trials,
        "whole_file": dict(seen),
        "both_seen": which == {0, 1},
        "left_a_temporary_file": left,
        "tidied_by_the_next_save": tidy,
    }


# --- the record ---------------------------------------------------------------------------------------------------


def batches(seed: int, count: int, size: int, jobs: int, part: str = "") -> Iterator[dict[str, Any]]:
    """All mutations, in processes of their own: a crash is counted and ends only its batch."""

    def one(first: int) -> dict[str, Any]:
        past = min(first + size, count)
        command = [sys.executable, "-m", "benchmarks.fuzz", "--worker", f"{part}{seed},{first},{past}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            return {"counts": [["any", "CRASH", past - first]], "wrong": [f"{first}..{past}: {done.stderr[-500:]}"]}
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, range(0, count, size))


def _summed(found: Iterator[dict[str, Any]], kinds: Iterable[str]) -> dict[str, Any]:
    """What all batches found."""
    counts: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    slowest = grown = 0.0
    for part in found:
        for kind, what, n in part["counts"]:
            counts[kind, what] += n
        wrong += part["wrong"]
        slowest, grown = max(slowest, part.get("slowest_seconds", 0)), max(grown, part.get("grown_bytes", 0))
    return {
        "outcomes": {k: {what: n for (a, what), n in sorted(counts.items()) if a == k} for k in kinds},
        "files": sum(counts.values()),
        "wrong": wrong,
        "slowest_cpu_seconds": slowest,
        "most_grown_bytes": grown,
    }


def _meaning() -> Any:
    """The part that knows structure; it builds on this one."""
    from benchmarks import fuzz_meaning

    return fuzz_meaning


def _interrupted(stride: int) -> dict[str, Any]:
    """Every act of the engine broken off at every `stride`-th line of ours that it runs."""
    from benchmarks import interrupts

    command = [sys.executable, "-m", "benchmarks.interrupts", "--stride", str(stride)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(f"benchmarks.interrupts: {done.stderr[-500:]}")
    return {"stride": stride, "mechanisms": list(interrupts.MECHANISMS), **json.loads(done.stdout)}


def main(
    count: Annotated[int, typer.Option(help="mutated files")] = 120_000,
    kills: Annotated[int, typer.Option(help="saves to kill")] = 500,
    seed: Annotated[int, typer.Option(help="of the mutations")] = 1,
    batch: Annotated[int, typer.Option(help="mutations a process")] = 10_000,
    jobs: Annotated[int, typer.Option(help="processes at a time")] = 1,
    meanings: Annotated[int, typer.Option(help="files that are sound and mean what they cannot")] = 40_000,
    stride: Annotated[int, typer.Option(help="break the engine off at every so many lines")] = 7,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Mutates files and kills saves; writes the record, and fails if anything went wrong."""
    if worker:
        part, _, numbers = worker.rpartition(":")
        print(json.dumps((_meaning().work if part else work)(*map(int, numbers.split(",")))))
        return
    with recording(
        "fuzz",
        question="What do mutated files do to the reader, kill -9 to a save, and exceptions to the engine?",
        seeds=[seed],
        config={
            "mutations": count,
            "kinds": {kind: weight for kind, (weight, _) in MUTATIONS.items()},
            "seconds_a_file": SECONDS,
            "headroom_bytes": HEADROOM,
            "kills": kills,
            "meanings": meanings,
            "stride": stride,
        },
        notes="Allowed are FormatError, ValueError for another model, or the same weights to the bit; a forged file "
        "(wrong in a size, a value or a blob, right in every checksum) may be a sound file of other weights too. Every "
        "fourth file is also read tensor by tensor without a model. Files of another meaning "
        "(benchmarks/fuzz_meaning.py) are refused, or give a tensor that is a member of its target's set: "
        "projected again it is the same to the bit. An exception at a line of the engine "
        "(benchmarks/interrupts.py) leaves the old state or the new one, and "
        "training goes on as the unbroken one; `moved`: after the optimizer's own step and before our first line.",
        out=out,
    ) as results:
        results |= _summed(batches(seed, count, batch, jobs), MUTATIONS)
        results["meaning"] = _summed(batches(seed, meanings, batch, jobs, "meaning:"), [*_meaning().MEANINGS, "any"])
        results["interrupted"] = _interrupted(stride)
        results["killed"] = killed(kills)
        print(json.dumps(results, indent=1))
    parts = (results, results["meaning"], results["interrupted"])
    if any(part["wrong"] for part in parts) or "WRONG" in results["killed"]["whole_file"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
