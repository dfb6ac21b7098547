"""The two lives of a model: the compressed one shown and measured, its codes, its own BatchNorm statistics."""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from detent import sharding
from detent.batchnorm import Statistics, feed, install, reestimate, rounded, statistics_of
from detent.calibration import Batches, Calibration, How, by_prior, calibrated
from detent.claimed import Entry, entries_of, fit_target, refuse_nonfinite, refuse_stages
from detent.collapse import Losses, answers
from detent.guards import fingerprint
from detent.plan import Plan, resolve
from detent.recipe import Recipe, refuse_no_recipe
from detent.roundings import Roundings
from detent.targets import Form, Params, Target
from detent.targets.kmeans import sorted_rows
from detent.threads import OneThread
from detent.undoing import undone, undone_unless_done, without_gradients
from detent.writes import Seal

__all__ = ["Encoded", "Lives", "distance_row"]

_L = TypeVar("_L", bound="Lives")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One claimed tensor, ready to be written: what it is, and the target it lies on.

    Args:
        target: where the weights lie.
        form: what they are.

    Example:
        >>> import detent as dt
        >>> model = nn.Linear(4, 4)
        >>> run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
        >>> run.encoded()["weight"].form.nbytes    # sixteen codes of 4 bits, and a scale
        12
    """

    target: Target
    form: Form

    def decode(self) -> Tensor:
        """The projected tensor."""
        return self.form.dense()


@dataclass(kw_only=True)
class _Aside:
    """The full life, while the compressed one is shown in its place."""

    weights: list[tuple[Entry, Tensor]]
    buffers: list[tuple[Tensor, Tensor]]
    seals: list[tuple[Entry, Seal | None]]


def distance_row(name: str, w: Tensor, target: Target, params: Params, places: Tensor | None = None) -> dict[str, Any]:
    """How far one tensor's two lives are from each other; `places` were chosen, else the nearest ones are meant."""
    form = target.form(w if places is None else places, params)
    q = form.dense()
    w64, q64 = w.double(), q.double()
    gap = (w64 - q64).abs()
    cell = target.cell(params)
    energy = float(w64.square().sum())
    ordered = [sorted_rows(x.reshape(1, -1))[0] for x in (w, q)]  # in float32 where that holds them: far faster
    return {
        "name": name,
        "target": target,
        "weights": w.numel(),
        "bits_per_weight": 8 * form.nbytes / w.numel(),
        "error": float(gap.square().sum()) / energy if energy else 0.0,
        "wasserstein": float((ordered[0].double() - ordered[1]).abs_().mean()),
        "distance": float("nan") if cell is None else float((gap / cell.double()).mean()),
        "zeros": float((q == 0).double().mean()),
    }


class Lives(abc.ABC):
    """The two lives of a model whose claimed weights are known: everything a run can show without an optimizer.

    Attributes:
        calibration: what `detent.calibrate` did for the compressed life of the weights as they are; `None` before, and
            after the next training step.
        activations: how the inputs of layers are rounded.
    """

    calibration: Calibration | None = None
    model: nn.Module
    plan: Plan
    activations: Roundings
    _entries: list[Entry]
    _frozen: list[Entry]
    _losses: Losses
    _example: Any
    _statistics: dict[str, Statistics]
    _inside: bool = False
    _aside: _Aside | None = None
    _found_for: bytes = b""
    _kept: tuple[int | None, list[tuple[Entry, Target, Params]]] | None = None

    @abc.abstractmethod
    def _settle(self) -> None:
        """Make sure that the weights are what the entries say."""

    @abc.abstractmethod
    def _is_settled(self, entry: Entry) -> bool:
        """Whether an entry's own fit is over, so that the weights lie where its last one put them."""

    @abc.abstractmethod
    def _adopt(self) -> None:
        """Take the weights as they are for our own writing."""

    @contextmanager
    def _one_thread(self, what: str) -> Iterator[None]:
        """Work on the weights inside, which no other thread may meanwhile."""
        with OneThread.of(self.model).doing(what):
            yield

    def _fit_frozen(self) -> None:
        """Fit to frozen weights again what was fitted to others: they have no other memory than themselves."""
        stale = {entry.claim.rule for entry in self._frozen if entry.params is None or not entry.holds()}
        mine = [entry for entry in self._frozen if entry.claim.rule in stale]
        if mine and not any(entry.param.is_meta for entry in mine):
            fit_target(mine)
            for entry in mine:
                entry.adopt()

    def _look_for_losses(self, life: Iterable[tuple[Entry, Target, Params]]) -> None:
        """Note what a compressed life leaves nothing of. A collective under sharding."""
        for entry, target, params in life:
            if not entry.param.is_meta:
                whole, source = entry.hidden_whole(), entry.source(target, params, whole=True)
                self._losses.note(entry.name, whole, target.project(source, params), target)

    def _say_losses(self, who: str, bits: int | None = None, recipe: Recipe | None = None) -> None:
        """Warn of tensors that the compressed life has nothing of, and of outputs that do not depend on the input."""
        self._losses.say(who)
        if self._example is None or not self.activations.is_ready:
            return
        with self.compressed(bits=bits, recipe=recipe):
            here, there = answers(self.model, self._example)
        if here and all(map(torch.equal, here, there)):
            here, there = answers(self.model, self._example)
            if not all(map(torch.equal, here, there)):
                self._example = None  # once is enough
                warnings.warn(
                    f"{who}: the output of the compressed life does not depend on the input any more (of the example, "
                    "and of it turned round); a layer in between passes nothing on",
                    stacklevel=3,
                )

    def _refuse_inside(self, what: str) -> None:
        if self._inside:
            raise RuntimeError(f"{what} inside run.compressed(): leave that life first")
        self._come_back()

    def _come_back(self) -> None:
        """Put the full life back in its place, if it is not there."""
        aside = self._aside
        if aside is None:
            return
        self._inside = False
        sharding.reshard(self.model)
        with without_gradients():
            for entry, value in aside.weights:
                entry.write(value)
            for buffer, value in aside.buffers:
                buffer.copy_(value)
        sharding.reshard(self.model)
        for entry, seal in aside.seals:
            entry.reseal(seal)
        self._aside = None  # last: until here an interrupt leaves all of it for the next one who asks

    def _is_unfixed(self, entry: Entry) -> bool:
        if entry.chosen is not None:
            return False  # the places lie on the numbers of then
        return entry.params is None or (entry.has_own_fit and not self._is_settled(entry))

    @property
    def standing(self) -> Plan:
        """The plan as far as it has come: what the compressed life of this moment consists of."""
        mine = {entry.name: entry.claim for entry in self._entries}
        yet = [replace(c, rule=None, reason="claimed by a later stage") if c.claimed else c for c in self.plan.claims]
        return replace(self.plan, claims=tuple(mine.get(claim.name, claim) for claim in yet))

    def _life(self, bits: int | None, recipe: Recipe | None) -> list[tuple[Entry, Target, Params]]:
        """What each claimed tensor is in a compressed life; collective under sharding."""
        self._refuse_inside("a compressed life")
        self._settle()
        if bits is not None and recipe is not None:
            raise ValueError("give bits= or recipe=, not both")
        if recipe is not None:
            refuse_no_recipe(recipe, "compressed")
            if recipe.activations:
                raise ValueError(
                    "compressed(recipe=...): inputs are rounded as the run's own recipe says; leave out activations="
                )
            return self._life_of(recipe)
        if self._kept is not None and self._kept[0] == bits:
            return self._kept[1]
        life: list[tuple[Entry, Target, Params]] = []
        unfixed = [entry for entry in self._entries if self._is_unfixed(entry)]
        if unfixed:
            fit_target(unfixed)
        changed = 0
        for entry in self._entries:
            assert entry.params is not None
            target, params = entry.target, entry.params
            if bits is not None and target.has_bits and not entry.rule.pinned:
                if bits != getattr(target, "bits", None):
                    target, params = target.at_bits(entry.hidden_whole(), params, bits)
                changed += 1
            life.append((entry, target, params))
        if bits is not None and not changed:
            raise ValueError(f"bits={bits}: no rule of this recipe has an unpinned target with a bit-width")
        return life

    @contextmanager
    def _one_life(self, bits: int | None) -> Iterator[None]:
        """Find a compressed life once for all that is asked of it inside, where nothing is trained."""

        def forget() -> None:
            self._kept = None

        with self._one_thread("finding a compressed life"), undone(forget):
            self._kept = (bits, self._life(bits, None))
            yield

    def _life_of(self, recipe: Recipe) -> list[tuple[Entry, Target, Params]]:
        refuse_stages(recipe, "compressed")
        sharding.reshard(self.model)
        entries = entries_of(
            self.model, resolve(recipe, self.model, trained=False), {e.name: e.state for e in self._entries}
        )
        fit_target(entries)
        return [(entry, entry.target, entry.params) for entry in entries if entry.params is not None]

    @contextmanager
    def compressed(
        self: _L, *, bits: int | None = None, recipe: Recipe | None = None, batchnorm: bool = True
    ) -> Iterator[_L]:
        """Show the model in its compressed life; on leaving, the full-precision weights are back bitwise.

        Args:
            bits: another width for every target that has one and is not pinned, without retraining: the better of
                a fresh fit and the trained step times a power of two.
            recipe: other targets altogether, fitted to the weights as they are.
            batchnorm: use the BatchNorm statistics that `recalibrate` found for this life, if there are any.

        Raises:
            ValueError: both bits and recipe, or bits where no target has a width.
            RuntimeError: inside another `compressed()`, or while another thread works on the same model; on leaving,
                if a claimed weight was written inside.

        Example:
            >>> import torch, detent as dt
            >>> model = torch.nn.Linear(16, 16)
            >>> run = dt.compress(model, dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=4))]))
            >>> with run.compressed(bits=2):
            ...     print(len(model.weight.unique()))
            3
        """
        with self._one_thread("run.compressed()"):
            self.activations.refuse_unready("run.compressed()")
            with self._shown(bits, recipe, batchnorm), self.activations.shown(self.model):
                yield self

    @contextmanager
    def _shown(self, bits: int | None, recipe: Recipe | None, batchnorm: bool) -> Iterator[None]:
        life = self._life(bits, recipe)
        statistics = self.statistics(bits=bits, recipe=recipe) if batchnorm else None
        written: list[str] = []
        with self._set_aside([entry for entry, _, _ in life]):
            with without_gradients():
                for entry, target, params in life:
                    entry.write(entry.map_whole(target.project, target, params, entry.source(target, params)))
                    entry.adopt()
            if statistics is not None:
                install(self.model, statistics)
            yield
            written = [entry.name for entry, _, _ in life if not entry.holds()]
        if written:
            raise RuntimeError(
                f"{written[0]!r} was written inside run.compressed(), which shows weights and keeps none: what was "
                "written to the weights that the recipe claims is gone, the full-precision weights are back, and "
                "others keep it; load, change or merge weights outside"
            )

    @contextmanager
    def _set_aside(self, entries: list[Entry], *, statistics: bool = True) -> Iterator[dict[str, Tensor]]:
        """Let weights (and running statistics) be written inside; gives the weights as they are, by name."""
        sharding.reshard(self.model)
        buffers = statistics_of(self.model).values() if statistics else ()
        aside = _Aside(
            weights=[(entry, sharding.local(entry.param).clone()) for entry in entries],
            buffers=[(buffer, buffer.clone()) for buffer in buffers],
            seals=[(entry, entry.seal) for entry in self._entries],
        )
        self._aside = aside
        with undone(self._come_back):
            self._inside = True
            yield {entry.name: value for entry, value in aside.weights}

    def observe(self, batches: Iterable[Any], *, forward: Callable[[Any], Any] | None = None) -> None:
        """Find the ranges of rounded activations anew from a few inputs, as the compressed weights make them.

        A training does so by itself, from its first step on. There only the ranges that are still missing are found,
        if any are: of modules that training calls without gradients.

        Args:
            batches: inputs without labels, as for `recalibrate`. The model is in eval mode.
            forward: how to feed one batch, if `model(inputs)` is not it.

        Raises:
            ValueError: a recipe without `activations=`, no batches, a module that nothing goes into, or inputs that
                are not finite.

        Example:
            >>> import torch, detent as dt
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
            >>> grid = dt.Rule(match="weight", target=dt.Uniform(bits=8))
            >>> recipe = dt.Recipe([grid], activations=[dt.Activation(quantizer=dt.LearnedStep(bits=8))])
            >>> run = dt.compress(model, recipe)
            >>> run.observe([torch.randn(64, 8)])
            >>> with run.compressed():
            ...     y = model(torch.randn(4, 8))
        """
        if not self.activations:
            raise ValueError("run.observe: this recipe rounds no activations; give it activations=")
        with self._one_thread("run.observe()"):
            modes = {module: module.training for module in self.model.modules()}

            def back() -> None:
                for module, mode in modes.items():
                    module.training = mode

            def passes() -> None:
                for batch in batches:
                    feed(self.model, batch, forward, "observe")

            with self._shown(None, None, True), undone(back), without_gradients():
                self.model.eval()
                self.activations.observe(self.model, passes, "observe")

    def _calibrate(self, batches: Batches, forward: Callable[[Any], Any] | None, how: How) -> Calibration:
        """Choose the places of the compressed life in the metric of each layer's inputs; see `detent.calibrate`."""
        if isinstance(batches, str) and (batches != "prior" or forward is not None):
            raise ValueError(f'calibrate({batches!r}): must be batches of inputs, or "prior" without forward=')
        with self._one_thread("calibrate"):
            self._refuse_inside("calibrate")
            self._settle()  # what was found for other weights is no more
            if not isinstance(batches, str) and not self.activations.is_ready:
                batches = list(batches)
                self.observe(batches, forward=forward)
            with undone_unless_done(self._as_now()):
                self._forget_places()
                life = self._life(None, None)
                entries = [entry for entry, _, _ in life]
                with self._set_aside(entries) as kept, self.activations.shown(self.model):
                    hidden = {e.name: e.hidden_whole() if "latent" in e.state else kept[e.name] for e, _, _ in life}
                    if isinstance(batches, str):
                        found = by_prior(self.model, life, hidden, how)
                    else:
                        found = calibrated(self.model, life, hidden, batches, forward, how)
                self._statistics.pop(self._life_key(None, None), None)  # they were of other places
                self._found_for = fingerprint(self._entries)
                if found.statistics is not None:
                    self._keep_statistics(found.statistics)
                for entry, _, _ in life:
                    entry.chosen = found.places.get(entry.name)
                self.calibration = found.report
        said = found.report.warning()
        if said and not isinstance(batches, str):  # nobody who gives no inputs expects a table to be seen
            warnings.warn(f"calibrate: {said}", stacklevel=3)
        return found.report

    def _as_now(self) -> Callable[[], None]:
        """What makes the compressed lives of these weights again what they are now."""
        chosen = [(entry, entry.chosen) for entry in self._entries]
        statistics, found_for, report = dict(self._statistics), self._found_for, self.calibration

        def back() -> None:
            for entry, places in chosen:
                entry.chosen = places
            self._statistics.clear()
            self._statistics.update(statistics)
            self._found_for, self.calibration = found_for, report

        return back

    def _forget_places(self) -> None:
        """Let compressed lives be nearest places again."""
        for entry in self._entries if self.calibration is not None else ():
            entry.chosen = None
        self.calibration = None

    def _forget_lives(self) -> None:
        """The weights are others now: what was found for a compressed life of theirs is no more."""
        self._statistics.clear()
        self._forget_places()

    def recalibrate(
        self,
        batches: Iterable[Any],
        *,
        bits: int | None = None,
        recipe: Recipe | None = None,
        forward: Callable[[Any], Any] | None = None,
    ) -> None:
        """Re-estimate BatchNorm statistics for a compressed life, into buffers that belong to that life alone.

        The plain average over the batches; the full life's statistics stay untouched. The next training step drops
        them.

        Args:
            batches: inputs, tuples that start with inputs, or mappings of keyword arguments, on the model's device.
                Of training images, augmented as in training: the weights fit the statistics of those.
            bits: the life `compressed(bits=...)` shows.
            recipe: the life `compressed(recipe=...)` shows.
            forward: how to feed one batch, if `model(inputs)` is not it.

        Raises:
            ValueError: no BatchNorm with running statistics, no batches, or batches of an unknown kind.

        Example:
            >>> import torch, detent as dt
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
            >>> run = dt.compress(model, dt.Recipe([dt.Rule(match="0.weight", target=dt.Uniform(bits=2))]))
            >>> run.recalibrate([torch.randn(64, 4)])
            >>> bool((model[1].running_mean == 0).all())    # the full life keeps its own
            True
        """
        with self._one_thread("run.recalibrate()"):
            with self.compressed(bits=bits, recipe=recipe, batchnorm=False):
                found = reestimate(self.model, batches, forward)
            self._keep_statistics(found, bits, recipe)

    def round_statistics(self, dtype: str, *, bits: int | None = None, recipe: Recipe | None = None) -> None:
        """Round a compressed life's BatchNorm statistics to a shorter float, so that a file takes as many bits each.

        Those that `recalibrate` found, else the model's own; the full life keeps its own.

        Args:
            dtype: "float16", "bfloat16"; in 8 bits "float8_e4m3fn" (variances off by 6 % at most, up to 448),
                "float8_e5m2" (12.5 %, up to 57344). Variances too small for that are refused.
            bits: the life `compressed(bits=...)` shows.
            recipe: the life `compressed(recipe=...)` shows.

        Raises:
            ValueError: another dtype, a model without running statistics, or numbers that do not fit into 8 bits.

        Example:
            >>> import torch, detent as dt
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
            >>> run = dt.compress(model, dt.Recipe([dt.Rule(match="0.weight", target=dt.Uniform(bits=2))]))
            >>> run.round_statistics("bfloat16")
            >>> run.statistics().source
            'own, rounded to bfloat16'
        """
        with self._one_thread("run.round_statistics()"):
            if not self._inside:
                self._settle()
            found = rounded(self.model, self.statistics(bits=bits, recipe=recipe), dtype)
            self._keep_statistics(found, bits, recipe)

    def _keep_statistics(self, found: Statistics, bits: int | None = None, recipe: Recipe | None = None) -> None:
        """Take statistics for a life of the weights as they are now."""
        self._found_for = fingerprint(self._entries)
        self._statistics[self._life_key(bits, recipe)] = found

    def statistics(self, *, bits: int | None = None, recipe: Recipe | None = None) -> Statistics | None:
        """The BatchNorm statistics of a compressed life, if it has some of its own."""
        return self._statistics.get(self._life_key(bits, recipe))

    def _life_key(self, bits: int | None, recipe: Recipe | None) -> str:
        # One name for one life: the trained width asked for by number is the trained life.
        widths = {getattr(e.target, "bits", None) for e in self._entries if e.target.has_bits and not e.rule.pinned}
        return recipe.to_yaml() if recipe is not None else f"bits={None if widths == {bits} else bits}"

    def measure(self, *, bits: int | None = None, recipe: Recipe | None = None) -> list[dict[str, Any]]:
        """How far what is trained is from its target, one row a claimed tensor.

        That is how far the two lives are apart, but for mechanisms with a latent: what is measured then is the latent,
        while the full life is what the forward pass last saw of it, in the end the compressed life itself.

        Returns:
            Rows with name, target, weights, bits_per_weight (codes and params), error (|w - q|^2 / |w|^2),
            wasserstein (1-Wasserstein distance between the values of w and q), distance (mean |w - q| in
            cells, nan where there are none) and zeros (share of zeros among q).

        Example:
            >>> import torch, detent as dt
            >>> recipe = dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=8))])
            >>> run = dt.compress(torch.nn.Linear(16, 16), recipe)
            >>> run.measure()[0]["error"] < 1e-3
            True
        """
        rows = []
        with self._one_thread("run.measure()"):
            for entry, target, params in self._life(bits, recipe):
                places = entry.source(target, params, whole=True)
                rows.append(distance_row(entry.name, entry.hidden_whole(), target, params, places))
        return rows

    def encoded(self, *, bits: int | None = None, recipe: Recipe | None = None) -> dict[str, Encoded]:
        """The claimed tensors of a compressed life as codes, by name: what a file holds."""
        with self._one_thread("run.encoded()"):
            return {name: encode() for name, encode in self.encoders(bits=bits, recipe=recipe).items()}

    def encoders(self, *, bits: int | None = None, recipe: Recipe | None = None) -> dict[str, Callable[[], Encoded]]:
        """What `encoded` gives, one call a tensor, so that one is held at a time; collectives under sharding."""

        def encode(entry: Entry, target: Target, params: Params) -> Encoded:
            whole, source = entry.hidden_whole(), entry.source(target, params, whole=True)
            refuse_nonfinite(entry.name, whole, target)
            form = target.form(source, params)
            self._losses.note(entry.name, whole, form.dense(), target)
            return Encoded(target=target, form=form)

        with self._one_thread("run.encoders()"):
            return {life[0].name: partial(encode, *life) for life in self._life(bits, recipe)}
