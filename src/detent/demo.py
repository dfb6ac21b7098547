"""The demo: one small network trained by plain SGD and by PSG, and what is left of each at every width."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from detent.compression import compress
from detent.data import Batches, ImageSet, digits, load_images
from detent.engine import Run, attach
from detent.mechanisms import PSG, Mechanism
from detent.pack import load, save
from detent.recipe import Recipe, Rule
from detent.report import History, Moment, collect, write_html
from detent.schedules import Linear
from detent.targets import TopK, Uniform, Zero

__all__ = ["WIDTHS", "Bench", "Cell", "Outcome", "Row", "Settings", "Watch", "demonstrate", "pyplot", "threads"]

WIDTHS = (8, 6, 4, 3, 2)
KEEP = 0.1  # share of weights that pruning keeps

Watch = Callable[[str, int], Callable[[], None]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the demo is asked to do.

    Args:
        data: folder with an image set in Parquet files, or `None` for scikit-learn's digits.
        out: folder for the files it leaves behind; made if absent.
        epochs: passes over the training split, >= 1; `None` for the task's own number.
        seed: of initialisation and batches, >= 0.
        device: "cpu" or "cuda".
        bits: width PSG trains for, one of 8, 6, 4, 3, 2; `None` for the task's own.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> Settings(bits=5)
        Traceback (most recent call last):
        ...
        ValueError: bits=5: must be one of 8, 6, 4, 3, 2
    """

    data: Path | None = None
    out: Path = Path("runs/demo")
    epochs: int | None = None
    seed: int = 0
    device: str = "cpu"
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and self.bits not in WIDTHS:
            raise ValueError(f"bits={self.bits}: must be one of {', '.join(map(str, WIDTHS))}")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs={self.epochs}: must be >= 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be >= 0")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device!r}: must be 'cpu' or 'cuda'")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda': this machine has no CUDA device that torch can use; take 'cpu'")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One network in one life: accuracy on the test split in percent, and bytes of the file that holds this life."""

    accuracy: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: "SGD" or "PSG".
        range: how the range of a grid is found, "mse" or "minmax".
        cells: by life: "full", "W8" to "W2", "pruned".
    """

    name: str
    range: str
    cells: dict[str, Cell]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything the demo found out.

    Attributes:
        setup: data, network and training, alike for all networks.
        rows: the table.
        pruned_full: full-precision accuracy of the networks behind the "pruned" column, by row name.
        files: what was written, by what it is.
        seconds: wall time, with reading the data.
    """

    setup: dict[str, Any]
    rows: list[Row]
    pruned_full: dict[str, float]
    files: dict[str, str]
    seconds: float


# --- networks and how each is trained -----------------------------------------------------------------------------


class DigitsNet(nn.Sequential):
    """Narrow convolutions with BatchNorm for 8x8 grey images: deep enough for rounding errors to add up.

    Args:
        classes: number of classes.
        widths: channels of each convolution; the first of more channels than before has stride 2.
    """

    def __init__(self, classes: int = 10, widths: Sequence[int] = (8, 8, 8, 16, 16, 16, 32, 32)) -> None:
        super().__init__()
        fan_in = 1
        for i, width in enumerate(widths, start=1):
            stride = 2 if i > 1 and width > fan_in else 1
            self.add_module(f"conv{i}", nn.Conv2d(fan_in, width, 3, stride=stride, padding=1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(width))
            self.add_module(f"relu{i}", nn.ReLU())
            fan_in = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(fan_in, classes)


class LeNet5(nn.Sequential):
    """LeNet-5 of Caffe: 20-50-500-10, 430,500 weights, for 28x28 grey images.

    Example:
        >>> sum(p.numel() for name, p in LeNet5().named_parameters() if name.endswith("weight"))
        430500
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(800, 500)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(500, classes)


class _Block(nn.Module):
    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        stride = 1 if fan_in == fan_out else 2
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2:
            self.shortcut = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride=2, bias=False), nn.BatchNorm2d(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet8(nn.Sequential):
    """A ResNet of three blocks, 16-32-64 channels, for 32x32 colour images."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.block1 = _Block(16, 16)
        self.block2 = _Block(16, 32)
        self.block3 = _Block(32, 64)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, classes)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What is trained for images of one shape: momentum 0.9, cosine schedule, all numbers alike for SGD and PSG.

    `decay_pruned` is the weight decay of the two networks of the "pruned" column: towards zero PSG lets go of small
    weights and weight decay takes them there, so sparse training wants more of it than a grid does.
    """

    network: Callable[[int], nn.Module]
    epochs: int
    batch_size: int
    rate: float
    decay: float
    decay_pruned: float
    bits: int
    gain: float = 12.0
    gain_pruned: float = 12.0
    crop: int = 0
    flip: bool = False
    one_thread: bool = False  # more of them only slow down tensors this small


# How the numbers were found: docs/decisions.md, "The demo".
_TASKS = {
    (1, 8): _Task(
        network=DigitsNet,
        epochs=20,
        batch_size=32,
        rate=0.1,
        decay=5e-4,
        decay_pruned=1e-2,
        bits=2,
        one_thread=True,
    ),
    (1, 28): _Task(
        network=LeNet5,
        epochs=5,
        batch_size=64,
        rate=0.01,
        decay=5e-4,
        decay_pruned=5e-3,
        bits=3,
        gain_pruned=3.0,  # without BatchNorm, large weights at a multiple of the rate make it diverge
    ),
    (3, 32): _Task(
        network=ResNet8,
        epochs=15,
        batch_size=128,
        rate=0.1,
        decay=5e-4,
        decay_pruned=2e-3,
        bits=3,
        crop=4,
        flip=True,
    ),
}


def _images(settings: Settings) -> tuple[ImageSet, ImageSet, _Task]:
    if settings.data is None:
        train, test = digits("train"), digits("test")
    else:
        if not settings.data.is_dir():
            raise ValueError(f"data={str(settings.data)!r}: no such folder")
        train = load_images(settings.data, "train")
        # What one split is, the other must be: let the training split decide whether the set is grey.
        test = load_images(settings.data, "test", grey=train.images.shape[1] == 1)
    _, channels, height, width = train.images.shape
    task = _TASKS.get((channels, width)) if height == width else None
    if task is None:
        raise ValueError(
            f"data={str(settings.data)!r}: images are {width}x{height} with {channels} channels; the demo has networks "
            "for 8x8 grey, 28x28 grey (MNIST) and 32x32 colour (CIFAR)"
        )
    return train.to(settings.device), test.to(settings.device), task


# --- recipes ------------------------------------------------------------------------------------------------------


def _grid(bits: int, mechanism: Mechanism | None, how: Literal["mse", "minmax"] = "mse") -> Recipe:
    """Every convolution and linear weight, the first and the last layer too, on a b-bit grid a tensor.

    The grid is fitted to the first weights and stays: levels that move with the weights never catch them in a training
    as short as this.
    """
    target = Uniform(bits=bits, range=how)
    return Recipe([Rule(match=r"weight$", target=target, mechanism=mechanism, fit_until=1)])


def _sparse(mechanism: Mechanism | None) -> Recipe:
    """The tenth of all weights that is largest stays; one threshold for the whole network."""
    return Recipe([Rule(match=r"weight$", target=TopK(keep=KEEP, scope="model"), mechanism=mechanism)])


# Every number is spelt out: the demo was tuned with these, whatever the defaults become.
def _onto_grid(task: _Task) -> PSG:
    return PSG(gain=task.gain, eps=Linear(first=0.05, last=0.0, end=0.8), clip=True, clip_start=None)


def _towards_zero(task: _Task) -> PSG:
    return PSG(toward=Zero(), gain=task.gain_pruned, eps=Linear(first=0.002, last=0.0, end=0.8), clip=False)


# --- training and measuring ---------------------------------------------------------------------------------------


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    epochs: int,
    recipe: Recipe | None = None,
    *,
    watch: Callable[[int], Callable[[], None]] = lambda steps: lambda: None,
    look: Callable[[int, nn.Module, Run | None], None] = lambda epoch, model, run: None,
) -> Run | None:
    """Trains with a cosine down to zero; the recipe, if any, rides along.

    Args:
        model: trained in place.
        optimizer: of its parameters.
        batches: of the train split.
        epochs: how often they are gone through, >= 1.
        recipe: what is attached.
        watch: told the number of steps; what it gives is called after each.
        look: called before the first epoch (with 0) and after each.

    Returns:
        The run of the recipe.
    """
    total = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    run = None if recipe is None else attach(model, optimizer, recipe, total_steps=total)
    advance = watch(total)
    look(0, model, run)
    for epoch in range(epochs):
        model.train()
        batches.set_epoch(epoch)
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
            advance()
        look(epoch + 1, model, run)
    return run


class Bench:
    """Trains networks that differ in nothing but recipe and weight decay, and measures them."""

    def __init__(self, settings: Settings, watch: Watch) -> None:
        self.train_set, self.test_set, self.task = _images(settings)
        self.settings, self.watch = settings, watch
        self.epochs = settings.epochs or self.task.epochs
        self.bits = settings.bits or self.task.bits
        pixels = self.train_set.images.float() / 255
        self.mean = pixels.mean((0, 2, 3)).tolist()
        self.std = pixels.std((0, 2, 3)).clamp_min(1e-3).tolist()

    def network(self) -> nn.Module:
        """The network as every training starts with it."""
        torch.manual_seed(self.settings.seed)
        return self.task.network(len(self.train_set.classes)).to(self.settings.device)

    def train(
        self,
        label: str,
        recipe: Recipe | None,
        decay: float,
        *,
        epochs: int | None = None,
        rate: float | None = None,
        start: Mapping[str, Tensor] | None = None,
        look: Callable[[int, nn.Module, Run | None], None] = lambda epoch, model, run: None,
        make: Callable[..., torch.optim.Optimizer] | None = None,
    ) -> tuple[nn.Module, Run | None]:
        """A network after its last epoch, from the same start and through the same batches as every other.

        Args:
            label: shown beside the progress bar.
            recipe: what is attached.
            decay: weight decay.
            epochs: another length than the task's.
            rate: another learning rate than the task's.
            start: weights to start from instead of fresh ones.
            look: called before the first epoch (with 0) and after each.
            make: another optimizer than SGD with momentum 0.9.
        """
        task = self.task
        model = self.network()
        if start is not None:
            model.load_state_dict(start)
        batches = self._batches(self.train_set, task.batch_size, training=True)
        epochs, rate = epochs or self.epochs, rate or task.rate
        make = make or functools.partial(torch.optim.SGD, momentum=0.9)
        optimizer = make(model.parameters(), lr=rate, weight_decay=decay)
        run = fit(model, optimizer, batches, epochs, recipe, watch=functools.partial(self.watch, label), look=look)
        return model, run

    def accuracy(self, model: nn.Module) -> float:
        """Percent right on the test split."""
        return self.scores(model, self.test_set)["accuracy"]

    def scores(self, model: nn.Module, images: ImageSet) -> dict[str, float]:
        """Percent right and mean cross-entropy on a split."""
        model.eval()
        right, loss = 0, 0.0
        with torch.no_grad():
            for x, y in self._batches(images, 500, training=False):
                out = model(x)
                right += int((out.argmax(1) == y).sum())
                loss += float(F.cross_entropy(out, y, reduction="sum"))
        return {"accuracy": 100 * right / len(images), "loss": loss / len(images)}

    @property
    def _data(self) -> str:
        return "scikit-learn's digits" if self.settings.data is None else str(self.settings.data)

    def notes(self) -> dict[str, Any]:
        """What the card of a network trained here says of its training."""
        return {
            "data": f"{len(self.train_set):,} training images of {self._data}",
            "epochs": self.epochs,
            "calibration": "none; BatchNorm is not re-estimated",
            "seed": self.settings.seed,
        }

    def report(self, run: Run, title: str, history: Sequence[Moment] = ()) -> dict[str, str]:
        """Write report.html and its JSON twin for a run, if the extra is installed; what was written, by name."""
        if importlib.util.find_spec("jinja2") is None:
            return {}
        found = collect(
            run,
            evaluate=lambda model: self.scores(model, self.test_set),
            sensitivity=lambda model: self.scores(model, self.train_set),
            bits=WIDTHS,
            history=history,
            notes=self.notes(),
            title=title,
            evaluated_on=f"the test split, {len(self.test_set):,} images of {self._data}",
            sensitivity_on=f"the training split, {len(self.train_set):,} images",
            watch=self.watch,
        )
        write_html(found, self.settings.out / "report.html")
        return {name: str(self.settings.out / name) for name in ("report.html", "report.json")}

    def _batches(self, images: ImageSet, size: int, training: bool) -> Batches:
        return Batches(
            images.images,
            images.labels,
            size,
            shuffle=training,
            mean=self.mean,
            std=self.std,
            crop=self.task.crop if training else 0,
            flip=self.task.flip and training,
            seed=self.settings.seed,
            drop_last=training,
        )

    def inputs(self, count: int) -> list[Tensor]:
        """Training images as the network gets them, without labels and augmentation."""
        some = replace(self.train_set, images=self.train_set.images[:count], labels=self.train_set.labels[:count])
        return [x for x, _ in self._batches(some, 256, training=False)]

    def cell(
        self, run: Run, *, bits: int | None = None, recipe: Recipe | None = None, budget: int | None = None
    ) -> Cell:
        """A compressed life: what it gets right, and the size of the file that holds it alone."""
        if budget is not None and any(isinstance(m, nn.BatchNorm2d) for m in run.model.modules()):
            run.round_statistics("float16", bits=bits, recipe=recipe)  # as the file has them
        with run.compressed(bits=bits, recipe=recipe):
            accuracy = self.accuracy(run.model)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "life.detent"
            save(run, file, "compressed", bits=bits, recipe=recipe, budget=budget)
            return Cell(accuracy=accuracy, bytes=file.stat().st_size)

    def row(self, name: str, how: str, run: Run, pruned: Run) -> Row:
        """One network at every width, and the one that was trained for pruning in its pruned life."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "full.safetensors"
            save_file({name: value.cpu() for name, value in run.model.state_dict().items()}, file)
            cells = {"full": Cell(accuracy=self.accuracy(run.model), bytes=file.stat().st_size)}
        cells |= {f"W{bits}": self.cell(run, bits=bits) for bits in WIDTHS}
        cells["pruned"] = self.cell(pruned, recipe=_sparse(None))
        return Row(name=name, range=how, cells=cells)

    def setup(self, model: nn.Module) -> dict[str, Any]:
        """What a reader has to know to judge the table."""
        task, settings = self.task, self.settings
        return {
            "data": "scikit-learn digits" if settings.data is None else str(settings.data),
            "train_images": len(self.train_set),
            "test_images": len(self.test_set),
            "network": task.network.__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "batchnorm": any(isinstance(m, nn.BatchNorm2d) for m in model.modules()),
            "epochs": self.epochs,
            "batch_size": task.batch_size,
            "learning_rate": task.rate,
            "weight_decay": task.decay,
            "weight_decay_pruned": task.decay_pruned,
            "bits": self.bits,
            "gain": task.gain,
            "gain_pruned": task.gain_pruned,
            "seed": settings.seed,
            "device": settings.device,
            "threads": torch.get_num_threads(),
        }


@contextlib.contextmanager
def threads(one: bool) -> Iterator[None]:
    """One thread if asked for, and as many as before at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if one else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def demonstrate(settings: Settings, watch: Watch) -> Outcome:
    """Train the networks, measure every life, and leave model.detent, weights.png, result.json in `settings.out`.

    With the extra `report` installed also report.html and report.json, on the PSG network.

    The test split is read after the last epoch of all trainings, and no epoch or network is chosen by it.

    Args:
        settings: what to do.
        watch: called with a label and a number of steps when a training starts; what it returns is called each step.

    Raises:
        ValueError: a data folder that holds no image set, or images of a shape the demo has no network for.
        ImportError: an extra that is not installed.
        OSError: the output folder cannot be written.
    """
    began = time.perf_counter()
    settings.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(settings, watch)
    task, bits = bench.task, bench.bits
    with threads(task.one_thread):
        plain, _ = bench.train("SGD", None, task.decay)
        history: list[Moment] = []
        look = functools.partial(_follow, history)
        _, psg = bench.train(f"PSG, {bits} bits", _grid(bits, _onto_grid(task)), task.decay, look=look)
        plain_pruned, _ = bench.train("SGD, to be pruned", None, task.decay_pruned)
        _, psg_pruned = bench.train("PSG, towards zero", _sparse(_towards_zero(task)), task.decay_pruned)
        assert psg is not None and psg_pruned is not None
        sgd, sgd_pruned = compress(plain, _grid(bits, None)), compress(plain_pruned, _sparse(None))
        rows = [
            bench.row("SGD", "minmax", compress(plain, _grid(bits, None, "minmax")), sgd_pruned),
            bench.row("SGD", "mse", sgd, sgd_pruned),
            bench.row("PSG", "mse", psg, psg_pruned),
        ]
        pruned_full = {"SGD": bench.accuracy(sgd_pruned.model), "PSG": bench.accuracy(psg_pruned.model)}
        files = {name: str(settings.out / name) for name in ("model.detent", "weights.png", "result.json")}
        _save_and_check(bench, psg, Path(files["model.detent"]), rows[-1])
        _draw(sgd, psg, rows[1:], bits, Path(files["weights.png"]))
        files |= bench.report(psg, f"{task.network.__name__}, trained by PSG for {bits} bits", history)
        setup = bench.setup(plain)
    outcome = Outcome(setup=setup, rows=rows, pruned_full=pruned_full, files=files, seconds=time.perf_counter() - began)
    Path(files["result.json"]).write_text(json.dumps(asdict(outcome), indent=2) + "\n", encoding="utf-8")
    return outcome


def _follow(history: list[Moment], epoch: int, model: nn.Module, run: Run | None) -> None:
    """Note after each epoch how far the lives of a run are apart."""
    if run is not None:
        history.append(History(run).log(epoch=epoch))


def _save_and_check(bench: Bench, run: Run, path: Path, row: Row) -> None:
    """Write both lives of the PSG network, read each back into a fresh network, and compare what it gets right."""
    life = f"W{bench.bits}"
    notes = bench.notes() | {f"test accuracy, {key} (%)": row.cells[key].accuracy for key in ("full", life)}
    save(run, path, "both", notes=notes)
    for which, key in (("full", "full"), ("compressed", life)):
        twin = bench.task.network(len(bench.train_set.classes)).to(bench.settings.device)
        load(path, twin, which)  # type: ignore[arg-type]
        found = bench.accuracy(twin)
        if found != row.cells[key].accuracy:
            raise RuntimeError(
                f"{path}: read back, the {which} life gets {found} % right and not {row.cells[key].accuracy} %"
            )


# --- the picture --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Spread:
    """Where the weights of one tensor lie on its grid, in steps of the grid."""

    name: str
    position: Tensor  # w / step
    distance: Tensor  # |w - project(w)| / step


def _close(distance: Tensor) -> float:
    """Percent of weights within a tenth of a step of a level; a spread blind to the grid has 20."""
    return 100 * float((distance <= 0.1).double().mean())


def _spreads(run: Run) -> list[_Spread]:
    weights = {name: p.detach().cpu() for name, p in run.model.named_parameters()}
    found = []
    for name, item in run.encoded().items():
        w, form = weights[name], item.form.to("cpu")
        step = form.cell
        assert step is not None
        position = (w / step).reshape(-1)
        distance = ((w - form.dense()).abs() / step).reshape(-1)
        found.append(_Spread(name=name, position=position, distance=distance))
    return found


def pyplot() -> Any:
    """matplotlib.pyplot, for files alone; imported here, so that nothing else needs it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _draw(sgd: Run, psg: Run, rows: Sequence[Row], bits: int, path: Path) -> None:
    """Both networks over their grids: the largest layer as histograms, all layers as distances to the nearest level."""
    plt = pyplot()
    both = [("Plain SGD", _spreads(sgd)), ("PSG", _spreads(psg))]
    largest = max(range(len(both[0][1])), key=lambda i: both[0][1][i].position.numel())
    all_layers = [torch.cat([spread.distance for spread in spreads]) for _, spreads in both]
    figure = plt.figure(figsize=(9.6, 7.0), dpi=130, layout="constrained")
    figure.suptitle(
        f"{_close(all_layers[1]):.0f} % of the weights trained by PSG lie within a tenth of a step of a {bits}-bit "
        f"level, {_close(all_layers[0]):.0f} % of those trained by plain SGD",
        fontsize=11,
    )
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2))
    for column, ((name, spreads), row) in enumerate(zip(both, rows, strict=True)):
        axes = figure.add_subplot(grid[0, column])
        _draw_layer(axes, spreads[largest], 2 ** (bits - 1) - 1)
        full, coarse = row.cells["full"].accuracy, row.cells[f"W{bits}"].accuracy
        axes.set_title(f"{name}, {spreads[largest].name}\naccuracy {full:.1f} % in full, {coarse:.1f} % on {bits} bits")
    axes = figure.add_subplot(grid[1, :])
    share = torch.linspace(0, 100, 501)
    looks = (("Plain SGD", "--", "tab:orange"), ("PSG", "-", "tab:blue"))
    for distance, (name, style, shade) in zip(all_layers, looks, strict=True):
        rank = ((len(distance) - 1) * share.double() / 100).long()
        reach = distance.sort().values[rank]
        axes.plot(reach.numpy(), share.numpy(), style, color=shade, linewidth=2, label=name)
    axes.axvspan(0, 0.1, color="0.9", zorder=0)
    axes.text(0.105, 4, "a tenth of a step", fontsize=9, color="0.3")
    axes.set(title="All layers: how far the weights are from their levels", xlim=(0, 0.5), ylim=(0, 101))
    axes.set(xlabel="distance to the nearest level, in steps of the grid", ylabel="% of weights that are closer")
    axes.legend(frameon=False, loc="center right")
    figure.savefig(path)
    plt.close(figure)


def _draw_layer(axes: Any, spread: _Spread, n: int) -> None:
    edge = n + 1.0
    beyond = 100 * float((spread.position.abs() > edge).double().mean())
    inside = spread.position[spread.position.abs() <= edge].float()
    bins = 40 * (n + 1) + 1  # odd, so that level 0 lies in the middle of a bin
    share = torch.histc(inside, bins, -edge, edge) / spread.position.numel() * 100
    axes.stairs(share.numpy(), torch.linspace(-edge, edge, bins + 1).numpy(), color="0.35", fill=True)
    for level in range(-n, n + 1):
        axes.axvline(level, color="tab:red", linestyle=":", linewidth=1.2, zorder=0)
    axes.set_xticks(range(-n, n + 1), [f"{level:+d}" if level else "0" for level in range(-n, n + 1)])
    axes.set(xlabel="weight in steps of the grid (dotted: its levels)", xlim=(-edge, edge), ylabel="% of weights")
    if beyond >= 0.05:
        text = axes.text(0.98, 0.95, f"{beyond:.1f} % lie outside", transform=axes.transAxes, ha="right", fontsize=9)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
