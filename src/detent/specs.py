"""Objects of a recipe as plain data and back, by the names of their classes."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_type_hints

import pydantic

from detent.grouping import Granularity
from detent.mechanisms import Mechanism, MirrorMap
from detent.quantizers import Quantizer
from detent.schedules import Schedule
from detent.targets import Held, Target

__all__ = [
    "and_more",
    "build",
    "check_pattern",
    "check_size",
    "from_spec",
    "kind_of",
    "nearest",
    "short",
    "short_spec",
    "target_of",
    "to_spec",
]

_BASES: tuple[type, ...] = (Target, Mechanism, Schedule, Granularity, MirrorMap, Quantizer)
_DEEPEST = 32  # what stands within what: a recipe is six deep
_MOST_VALUES = 1 << 16  # of a recipe; what stands there twice by reference counts twice


def kind_of(cls: type) -> str:
    """The name of a class in a recipe or a file: that of ours alone, else `module:Class`.

    Example:
        >>> from detent import Uniform
        >>> kind_of(Uniform), kind_of(int)
        ('Uniform', 'builtins:int')
    """
    is_ours = cls.__module__.partition(".")[0] == __name__.partition(".")[0]
    return cls.__qualname__ if is_ours else f"{cls.__module__}:{cls.__qualname__}"


def _kinds() -> dict[str, type]:
    """Every final class a spec may name, by its kind: they register by being defined, the latest of a name counts."""
    found: dict[str, type] = {}
    todo = list(_BASES)
    while todo:
        cls = todo.pop()
        todo.extend(cls.__subclasses__())  # the youngest last: a notebook's cell that runs again replaces its class
        if dataclasses.is_dataclass(cls) and not getattr(cls, "__abstractmethods__", None):
            found.setdefault(kind_of(cls), cls)
    return found


def _named(kinds: Mapping[str, type], kind: Any, where: str) -> type | None:
    """The class of a kind; one from elsewhere may leave its module out where nothing else is called so."""
    if not isinstance(kind, str) or kind in kinds:
        return kinds.get(kind)
    mine = [name for name in kinds if name.rpartition(":")[2].rpartition(".")[2] == kind]
    if len(mine) > 1:
        raise ValueError(f"{where}: several classes are called {kind}: say {' or '.join(sorted(mine))}")
    return kinds[mine[0]] if mine else None


def short(obj: object) -> str:
    """A dataclass as it would be written by hand: only the fields that differ from their defaults.

    Example:
        >>> from detent.targets import Uniform
        >>> short(Uniform(bits=4))
        'Uniform(bits=4)'
    """
    return short_spec(to_spec(obj))


def short_spec(spec: Any) -> str:
    """Plain data of an object as it would be written by hand.

    Example:
        >>> short_spec({"kind": "mine:Grid", "tile": [2, 4]})
        'Grid(tile=(2, 4))'
    """
    if isinstance(spec, dict):
        fields = ", ".join(f"{name}={short_spec(value)}" for name, value in spec.items() if name != "kind")
        return f"{str(spec.get('kind', '?')).rpartition(':')[2].rpartition('.')[2]}({fields})"
    if isinstance(spec, list):
        return repr(spec) if not spec else f"({', '.join(map(short_spec, spec))}{',' * (len(spec) == 1)})"
    return repr(spec)


def _is_told(value: Any, default: Any) -> bool:
    """Whether a field is not its default. 1 is not 1.0: as a moment, one is a step and the other the whole training."""
    return default is dataclasses.MISSING or value != default or type(value) is not type(default)


def to_spec(obj: Any) -> Any:
    """An object of a recipe as plain data: `{"kind": class name, field: value, ...}`, defaults left out.

    Example:
        >>> from detent.targets import Uniform
        >>> to_spec(Uniform(bits=4))
        {'kind': 'Uniform', 'bits': 4}
    """
    if isinstance(obj, Held):
        return json.loads(obj.spec)
    if isinstance(obj, (list, tuple)):
        return [to_spec(value) for value in obj]
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        return obj
    spec: dict[str, Any] = {"kind": kind_of(type(obj))}
    for f in dataclasses.fields(obj):
        value = getattr(obj, f.name)
        if _is_told(value, f.default):
            spec[f.name] = to_spec(value)
    return spec


def check_size(spec: Any, where: str) -> None:
    """Refuse plain data that nests without end, or that references make too large to walk.

    Raises:
        ValueError: more than 65536 values, or deeper than 32.

    Example:
        >>> loop = []
        >>> loop.append(loop)
        >>> check_size(loop, "recipe")
        Traceback (most recent call last):
        ...
        ValueError: recipe: nests deeper than 32
    """
    todo, seen = [(spec, 0)], 0
    while todo:
        value, depth = todo.pop()
        if not isinstance(value, (list, tuple, dict)):
            continue
        if depth == _DEEPEST:
            raise ValueError(f"{where}: nests deeper than {_DEEPEST}")
        seen += len(value)
        if seen > _MOST_VALUES:
            raise ValueError(f"{where}: holds more than {_MOST_VALUES} values")
        todo += [(inner, depth + 1) for inner in (value.values() if isinstance(value, dict) else value)]


def from_spec(spec: Any, where: str = "spec", bases: tuple[type, ...] = _BASES) -> Any:
    """The inverse of `to_spec`, checked.

    Args:
        where: where it stands, for errors, which name what derives from one of the `bases`.

    Raises:
        ValueError: an unknown kind or key (with the nearest valid name), or a value of the wrong type or range.

    Example:
        >>> from_spec({"kind": "Uniform", "bits": 4}).bits
        4
        >>> from_spec({"kind": "Uniform", "bit": 4})
        Traceback (most recent call last):
        ...
        ValueError: spec: Uniform has no field 'bit'; did you mean 'bits'?
    """
    check_size(spec, where)
    return _from_spec(spec, where, bases)


def target_of(spec: Mapping[str, Any]) -> Target:
    """The target that plain data of a file describes, or a `Held` one where this process has no such class.

    Example:
        >>> target_of({"kind": "Uniform", "bits": 4}), target_of({"kind": "Unheard", "of": 1})
        (Uniform(bits=4, ...), Held(spec='{"kind":"Unheard","of":1}'))
    """
    try:
        return from_spec(spec, "target", (Target,))
    except (ValueError, TypeError, OverflowError):
        return Held(spec=json.dumps(spec, separators=(",", ":")))


def _from_spec(spec: Any, where: str, bases: tuple[type, ...]) -> Any:
    if isinstance(spec, (list, tuple)):
        return [_from_spec(value, f"{where}[{i}]", bases) for i, value in enumerate(spec)]
    if not isinstance(spec, dict):
        return spec
    kinds, kind = _kinds(), spec.get("kind")
    named = _named(kinds, kind, where)
    if named is None or not issubclass(named, bases):
        fit = sorted(name for name, cls in kinds.items() if issubclass(cls, bases) and not name.startswith("_"))
        if named is not None:
            wrong = f"must be a {' or '.join(base.__name__ for base in bases)}, not {kind}"
        else:
            wrong = "no kind is given" if kind is None else f"unknown kind {kind!r}{nearest(str(kind), fit)}"
            module, is_elsewhere, _ = str(kind).partition(":")
            wrong += f"; import {module} first (detent --import {module})" if is_elsewhere else ""
        raise ValueError(f"{where}: {wrong}; known: {', '.join(fit)}")
    return build(named, {k: v for k, v in spec.items() if k != "kind"}, where)


@functools.cache
def _bases_of(cls: type, key: str) -> tuple[type, ...]:
    """Which of the bases a field takes, by its annotation; all of them if it names none."""
    hints = [get_type_hints(cls)[key]]
    for hint in hints:
        hints += get_args(hint)
    return tuple(h for h in hints if isinstance(h, type) and issubclass(h, _BASES)) or _BASES


@functools.cache
def _adapter(cls: type) -> pydantic.TypeAdapter[Any]:
    """Built once a class: it takes a hundred times as long as one check."""
    return pydantic.TypeAdapter(cls)


def build(cls: type, values: Any, where: str) -> Any:
    """A dataclass from a mapping of its fields, as large as `check_size` lets it be."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: must be a mapping, not {type(values).__name__}")
    known = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: {cls.__name__} has no field {key!r}{nearest(str(key), known)}")
    built = {key: _from_spec(value, f"{where}.{key}", _bases_of(cls, key)) for key, value in values.items()}
    try:
        made = _adapter(cls).validate_python(built)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(str(part) for part in first["loc"][:1])
        message = first["msg"].removeprefix("Value error, ")
        if len(first["loc"]) > 1:  # one of several types was meant, and pydantic speaks of the first
            message = f"cannot be {values.get(str(first['loc'][0]))!r}"
        place = f"{where}: {cls.__name__}.{field_name}" if field_name else where
        raise ValueError(f"{place}: {message}") from None
    for key, value in built.items():
        # pydantic takes "0.1" for 0.1; Python's constructors refuse it.
        if isinstance(value, str) and not isinstance(getattr(made, key), str):
            raise ValueError(f"{where}: {cls.__name__}.{key}: must not be the text {value!r}; leave out its quotes")
    return made


def and_more(names: Sequence[Any]) -> str:
    """How many there are besides the first, in words.

    Example:
        >>> and_more(["a"]), and_more(["a", "b", "c"])
        ('', ' and 2 more')
    """
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def check_pattern(pattern: Any, where: str, known: Sequence[str]) -> None:
    """Refuse what is neither a regular expression nor one of the names with @ that a field knows.

    Args:
        pattern: the value of the field.
        where: the class and the field, for errors, such as "Rule(match".
        known: names with @.

    Raises:
        ValueError: saying which it is.

    Example:
        >>> check_pattern("@weight", "Rule(match", ["@weights"])
        Traceback (most recent call last):
        ...
        ValueError: Rule(match='@weight'): names with @ are "@weights"; did you mean '@weights'?
    """
    if not isinstance(pattern, str):
        raise ValueError(f"{where}={pattern!r}): must be a string")
    if pattern.startswith("@") and pattern not in known:
        names = " and ".join(f'"{each}"' for each in known)
        raise ValueError(f"{where}={pattern!r}): names with @ are {names}{nearest(pattern, known)}")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:  # a repetition of 2^32, a thousand brackets
        raise ValueError(f"{where}={pattern!r}): not a regular expression: {error}") from None


def nearest(word: str, known: Any) -> str:
    """A question for a misspelt word, or nothing; for a number that is not there, the numbers that are.

    Example:
        >>> nearest("grid-w5", ["grid-w4", "grid-w6", "other"]), nearest("OTHER", ["grid-w4", "other"])
        ("; did you mean 'grid-w4' or 'grid-w6'?", "; did you mean 'other'?")
    """
    plain = word.casefold()
    if same := [name for name in known if name.casefold() == plain]:
        return f"; did you mean {same[0]!r}?"
    kin = [name for name in known if re.sub(r"\d+", "#", name.casefold()) == re.sub(r"\d+", "#", plain)]
    if kin:
        *most, last = map(repr, kin)
        return f"; did you mean {', '.join(most)} or {last}?" if most else f"; did you mean {last}?"
    begun = [name for name in known if len(word) > 1 and name.casefold().startswith(plain)]
    folded = {name.casefold(): name for name in known}
    near = begun or [folded[each] for each in difflib.get_close_matches(plain, list(folded), 1, 0.5)]
    return f"; did you mean {near[0]!r}?" if near else ""
