"""Load: one life of a file into a model, under the names that the model has."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detent import sharding
from detent.activations import modules_of
from detent.contents import DTYPES, Contents, contents_of, refuse_unsavable
from detent.pack.container import Reader, opened
from detent.pack.header import Head, Row
from detent.pack.shown import Header
from detent.parameters import canonical_name, refuse_no_model
from detent.roundings import install

__all__ = ["Loaded", "Rename", "load", "names_in_model"]

Rename = Mapping[str, str] | Callable[[str], str | None]
_ADAPTED = "base_layer"  # the segment that peft puts between a layer's name and its parameters
_SHOWN = 3


@dataclass(frozen=True, kw_only=True, repr=False)
class Loaded(Header):
    """What a file says about itself, and what of it went where.

    Attributes:
        missing: names of the model that the file has nothing for: left as they were.
        unexpected: names of the file that the model does not have: not loaded.
        mismatched: names of the model whose shape is another in the file: left as they were.
        renamed: names of the file that the model has under another name, and that name.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)


def load(
    path: str | os.PathLike[str] | Reader,
    model: nn.Module,
    life: Literal["full", "compressed"] = "full",
    *,
    strict: bool = True,
    rename: Rename | None = None,
) -> Loaded:
    """Put one life of a file into a model: everything is checked and decoded before the first weight is written.

    The tensors of that life are checked against their checksums, those of the other one are not read. The model must
    have the same parameters and persistent buffers in the same dtypes. Wrappers do not matter: segments that DDP,
    compile and checkpointing insert are taken off names, and where names differ by one prefix, as those of a
    LightningModule (`model.`) or of peft (`base_model.model.`, `base_layer`) do, that is seen. A tied tensor may stand
    in the file under any of its names.

    Args:
        path: a file that `save` wrote, or a `Reader` of it.
        model: built by the same code.
        life: "full" or "compressed", which also rounds what goes into layers, where the file says so: from then on
            the model's modules have hooks for it.
        strict: whether every tensor of the model must come from the file, and every one of the file must go into the
            model. If not, what does not fit is left as it is and told in the result; see there.
        rename: from names in the file to names in the model: prefixes and what to put in their place, the first that
            fits (`{"backbone.": "encoder."}`; a whole name is a prefix too), or a function of a name, which gives
            `None` for what should not be loaded.

    Returns:
        What the file says about itself, with `missing`, `unexpected`, `mismatched` and `renamed` names.

    Raises:
        FormatError: the file is damaged, of another version or not one of ours.
        ValueError: an unknown life, one that the file does not hold, or a model it does not fit.
        OSError: the file cannot be opened.

    Example:
        >>> import tempfile, detent as dt
        >>> run = dt.compress(nn.Linear(8, 8), dt.Recipe([dt.Rule(match="weight", target=dt.Uniform(bits=3))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = dt.save(run, f"{folder}/model.detent")
        ...     twin = nn.Linear(8, 8)
        ...     _ = load(f"{folder}/model.detent", twin)
        ...     other = nn.ModuleDict({"stem": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
        ...     told = load(f"{folder}/model.detent", other, strict=False, rename={"": "stem."})
        >>> torch.equal(twin.weight, run.model.weight), torch.equal(other["stem"].weight, twin.weight), told.missing
        (True, True, ('head.weight', 'head.bias'))
    """
    refuse_no_model(model, "load")
    with opened(path) as file:
        file.check_life(life)
        contents = contents_of(model)
        match = _match(file.path, contents, file._head, strict, rename)
        names = dict.fromkeys(itertools.chain.from_iterable(match.sources.values()))
        rows = {name: file._head.rows[name] for name in names}
        room = _room([row for row in rows.values() if not file.is_there(row, life)])
        values = {}
        for name, row in rows.items():
            value = file.value(row, life, view=True)
            values[name] = value if file.is_there(row, life) else next(room).copy_(value)
        for name, (first, *others) in match.sources.items():
            if other := next((other for other in others if not same_bits(values[first], values[other])), None):
                match.refuse(
                    f"{name!r} is one tied tensor in the model and two in the file, {first!r} and {other!r}, which "
                    f"differ in the {life} life"
                )
        rounded = _roundings(match, file._head, model, strict) if life == "compressed" else []
        sharding.reshard(model)
        copies = []
        for name, (first, *_) in match.sources.items():
            tensor = contents.tensors[name]
            copies.append((sharding.local(tensor), sharding.from_whole(values[first], tensor, name)))

        def put() -> None:
            with torch.no_grad():
                for place, value in copies:
                    place.copy_(value)
            sharding.reshard(model)

        try:
            put()
        except BaseException:  # all is decoded: broken off, it is written to the end all the same
            put()
            raise
        install(model, rounded)
        header = file.header
        return Loaded(
            **{f.name: getattr(header, f.name) for f in fields(Header)},
            missing=tuple(match.missing),
            unexpected=tuple(match.unexpected),
            mismatched=tuple(match.mismatched),
            renamed=match.renamed,
        )


def _roundings(match: _Match, head: Head, model: nn.Module, strict: bool) -> list[Mapping[str, Any]]:
    """What the file says of rounded activations, by the modules of the model; without `strict` of those it has.

    Raises:
        ValueError: a module that the model does not have.
    """
    renamed = {file: name for name, files in match.sources.items() for file in files}
    modules, rows = modules_of(model), []
    for row in head.activations:
        own = next((name for name in renamed if name.rpartition(".")[0] == row["module"]), None)
        name = renamed[own].rpartition(".")[0] if own is not None else row["module"]
        if name in modules:
            rows.append({**row, "module": name})
        elif strict:
            match.refuse(f"the file rounds what goes into {row['module']!r}, which is no module of the model")
    return rows


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def _room(rows: Sequence[Row]) -> Iterator[Tensor]:
    """Empty tensors for these rows, in one piece of memory.

    Taken one by one they would end up between a decoder's working memory and keep that from being given back: up to
    twice the model.
    """
    sizes = [DTYPES[row.dtype].itemsize * math.prod(row.shape) for row in rows]
    starts = [0, *itertools.accumulate(-(-size // 64) * 64 for size in sizes)]
    whole = torch.empty(starts[-1], dtype=torch.uint8)
    for row, start, size in zip(rows, starts, sizes, strict=False):
        yield whole[start : start + size].view(DTYPES[row.dtype]).reshape(row.shape)


# --- names --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Match:
    """What goes where.

    Attributes:
        path: of the file.
        sources: by name in the model: where in the file the tensor stands; more than once if the model ties them.
        missing: in the model and not in the file.
        unexpected: in the file and not in the model.
        mismatched: of another shape.
        renamed: by name in the file.
    """

    path: str
    sources: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)

    def refuse(self, why: str) -> None:
        raise ValueError(f"{self.path} does not fit this model, which was left as it is: {why}")

    def refuse_names(self, contents: Contents) -> None:
        """Refuse what is missing or too much.

        Raises:
            ValueError: naming some of it, and what to do.
        """
        said = []
        for names, where in ((self.missing, "in the model and not"), (self.unexpected, "in the file and not")):
            if names:
                whole = "in the file" if names is self.missing else "in the model"
                more = f" (and {len(names) - _SHOWN} more)" if len(names) > _SHOWN else ""
                verb = "is" if len(names) == 1 else "are"
                said.append(f"{', '.join(map(repr, names[:_SHOWN]))}{more} {verb} {where} {whole}")
        if not said:
            return
        if unsaved := [name for name in self.missing if name in contents.lost]:
            said.append(f"{unsaved[0]!r} {contents.lost[unsaved[0]].reason}, which a file cannot hold")
        if self.missing and self.unexpected:
            example = {self.unexpected[0]: self.missing[0]}
            said.append(f"if names differ, say how with rename={example!r}, from prefixes to prefixes")
            said.append(
                "if a library stores weights under other names than its modules have, as transformers does with fused "
                "experts, unpack this file and load that with the library's from_pretrained"
            )
        self.refuse("; ".join([*said, "strict=False loads what is there and tells what is not"]))


def _match(path: str, contents: Contents, head: Head, strict: bool, rename: Rename | None) -> _Match:
    """Where in the file every tensor of the model is.

    Raises:
        ValueError: the first one that is of another shape or dtype, or all names that are missing or too much.
    """
    match = _Match(path=path)
    stored = {**{name: name for name in head.rows}, **head.aliases}
    known = {*contents.tensors, *contents.aliases}
    to_model = names_in_model(list(stored), known, rename)
    lookup = {ours: stored[theirs] for theirs, ours in to_model.items() if ours is not None}
    match.renamed = {theirs: ours for theirs, ours in to_model.items() if ours not in (None, theirs) and ours in known}
    used: set[str] = set()
    for first, tensor in contents.tensors.items():
        found = list(dict.fromkeys(lookup[name] for name in contents.names(first) if name in lookup))
        used.update(found)
        if not found:
            match.missing.append(first)
            continue
        for theirs in found:
            row = head.rows[theirs]
            if tuple(tensor.shape) != row.shape:
                shapes = f"has shape {tuple(tensor.shape)} in the model and {row.shape} in the file"
                if strict:
                    match.refuse(f"{first!r} {shapes}; strict=False passes it over")
                match.mismatched.append(first)
                break
            _check(match, first, tensor, row)
        else:
            match.sources[first] = found
    match.missing += contents.lost
    # Nothing of the file is lost where another name of the same tensor was found.
    match.unexpected = [theirs for theirs, at in stored.items() if at not in used and at == theirs]
    if strict:
        match.refuse_names(contents)
    if not match.sources and match.mismatched:
        match.refuse(f"nothing would be loaded: {match.mismatched[0]!r} and all others have another shape in the file")
    if not match.sources and contents.tensors:
        match.refuse_names(contents)
    return match


def _check(match: _Match, name: str, tensor: Tensor, row: Row) -> None:
    """Refuse a tensor of the model that cannot take that of the file."""
    if tensor.is_meta:
        refuse_unsavable(Contents(tensors={name: tensor}), "load", unready=False)
    if tensor.dtype != DTYPES[row.dtype]:
        dtypes = f"{tensor.dtype} in the model and {DTYPES[row.dtype]} in the file"
        match.refuse(f"{name!r} is {dtypes}; convert the model first")
    if tensor.is_inference() or any(n > 1 and step == 0 for n, step in zip(row.shape, tensor.stride(), strict=True)):
        match.refuse(f"{name!r} cannot be written (an inference tensor, or one that repeats its memory)")


def names_in_model(theirs: Collection[str], ours: Collection[str], rename: Rename | None) -> dict[str, str | None]:
    """Name in the model of every name in a file, `None` for what should not be loaded.

    Without `rename` names stay as they are, unless taking a prefix off them, or putting one before them, makes more
    names meet than anything else does, most of the names of one side among them.

    Raises:
        ValueError: a renaming that gives two tensors one name, or is none.

    Example:
        >>> names_in_model(["net.0.weight", "net.0.bias"], ["0.weight", "0.bias"], None)
        {'net.0.weight': '0.weight', 'net.0.bias': '0.bias'}
    """
    if rename is not None:
        return _asked(theirs, rename)
    theirs_bare, ours_bare = _bare(theirs), _bare(ours)
    by_bare = {bare: name for name, bare in ours_bare.items()}
    votes = Counter({("", ""): sum(name in by_bare for name in theirs_bare.values())})
    there = {*theirs_bare.values()}
    for name in there:
        votes.update((prefix, "") for prefix, rest in _cuts(name) if rest in by_bare)
    for name in by_bare:
        votes.update(("", prefix) for prefix, rest in _cuts(name) if rest in there)
    (best, most), *others = votes.most_common(2)
    is_clear = not others or others[0][1] < most
    if best == ("", "") or votes["", ""] == most or not is_clear or 2 * most <= min(len(there), len(by_bare)):
        best = ("", "")
    cut, put = best
    found: dict[str, str | None] = {}
    for name, bare in theirs_bare.items():
        meant = put + bare.removeprefix(cut) if bare.startswith(cut) else bare
        found[name] = by_bare.get(meant, name if best == ("", "") else meant)
    return found


def _bare(names: Collection[str]) -> dict[str, str]:
    """Names without the segment that an adapter puts into them, where all stay apart without it."""
    found = {name: ".".join(part for part in name.split(".") if part != _ADAPTED) for name in names}
    return found if len(set(found.values())) == len(found) else {name: name for name in names}


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """A name cut in two at each of its dots."""
    at = name.find(".")
    while at >= 0:
        yield name[: at + 1], name[at + 1 :]
        at = name.find(".", at + 1)


def _asked(theirs: Collection[str], rename: Rename) -> dict[str, str | None]:
    """Names as a user renames them."""
    if not callable(rename) and not isinstance(rename, Mapping):
        raise ValueError(f"rename={rename!r}: must be a mapping of prefixes, or a function of a name")
    found: dict[str, str | None] = {}
    taken: dict[str, str] = {}
    for name in theirs:
        if callable(rename):
            new = rename(name)
        else:
            prefix = next((prefix for prefix in rename if name.startswith(prefix)), None)
            new = name if prefix is None else rename[prefix] + name.removeprefix(prefix)
        if new is not None and not isinstance(new, str):
            raise ValueError(f"rename: gives {new!r} for {name!r}; must be a name, or None for what is not loaded")
        new = new if new is None else canonical_name(new)
        if new is not None and taken.setdefault(new, name) != name:
            raise ValueError(f"rename: {taken[new]!r} and {name!r} both become {new!r}")
        found[name] = new
    return found
