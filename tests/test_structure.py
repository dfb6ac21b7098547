"""Promises about the code itself: which way imports go, what an import costs, what every file must have.

Each check is a function over a folder or an object, so that it is tried on bad code as well as on ours.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import detent

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "detent"

# What each part of the package may import, besides itself. "" is the package's own __init__.
_TARGETS = {"schedules", "grouping", "masks", "pieces"}
_MECHANISMS = _TARGETS | {"targets"}
_SPECS = _MECHANISMS | {"mechanisms", "quantizers"}
_RECIPE = _SPECS | {"undoing", "sharding", "specs", "parameters", "ends", "plan", "contents"}
_RECIPE |= {"activations"}
_LIVES = _RECIPE | {"recipe", "roundings"}
_ENGINE = _LIVES | {"averages", "batchnorm", "calibration", "claimed", "collapse", "drivers", "fitting", "guards"}
_ENGINE |= {"lives", "optimizers", "resuming", "standins", "states", "threads"}
_PACK = _ENGINE | {"engine"}
_CORE = _PACK | {"amounts", "budget", "pack", "compression"}
MAY_IMPORT: dict[str, set[str]] = {
    "schedules": set(),
    "quantizers": {"schedules"},
    "activations": _SPECS | {"parameters", "specs"},
    "roundings": _RECIPE,
    "grouping": set(),
    "masks": set(),
    "pieces": set(),
    "undoing": set(),
    "sharding": set(),
    "targets": _TARGETS,
    "mechanisms": _MECHANISMS,
    "specs": _SPECS,
    "presets": _SPECS,
    "parameters": {"grouping"},
    "ends": {"parameters"},
    "collapse": _SPECS | {"undoing", "ends", "specs"},
    # Of recipe only the types: a recipe resolves to a plan.
    "plan": _SPECS | {"activations", "parameters", "specs", "ends", "recipe"},
    "recipe": _RECIPE | {"presets"},
    "contents": {"parameters", "sharding"},
    "batchnorm": {"parameters", "undoing"},
    "writes": {"sharding"},
    "claimed": _LIVES | {"writes"},
    "fitting": _LIVES | {"claimed", "drivers"},
    "guards": _LIVES | {"claimed"},
    "threads": {"undoing"},
    "feedback": _TARGETS | {"targets"},
    "inputs": {"grouping", "undoing"},
    "calibration": _LIVES | {"batchnorm", "claimed", "feedback", "inputs"},
    "lives": _LIVES | {"batchnorm", "calibration", "claimed", "collapse", "guards", "threads", "writes"},
    "optimizers": {"sharding"},
    "standins": _LIVES | {"claimed", "optimizers"},
    "drivers": _LIVES | {"claimed", "optimizers", "standins"},
    "averages": _LIVES | {"claimed", "lives"},
    "states": _LIVES | {"claimed", "drivers"},
    "resuming": _LIVES | {"averages", "claimed", "drivers", "states"},
    "engine": _ENGINE,
    "amounts": {"schedules"},
    "pack": _PACK | {"amounts"},
    "compression": _PACK | {"pack"},
    "budget": _PACK | {"amounts", "compression", "pack"},
    "": _CORE,
    "export": _CORE | {""},
    "report": _CORE | {""},
    "report.record": set(),
    "data": _CORE | {""},
    "testing": _CORE | {""},
    "integrations": _CORE | {""},
    "demo": _CORE | {"", "data", "report", "report.record"},
    "demos": _CORE | {"", "data", "demo", "export"},
    "__main__": {"cli"},
    "cli": _CORE | {"", "export", "report", "report.record", "data", "demo", "demos", "cli_work"},
    "cli_work": _CORE | {"", "export", "report", "report.record", "data"},
}
HEAVY = {"pyarrow", "sklearn", "matplotlib", "jinja2", "PIL", "huggingface_hub", "typer"}
MAX_LINES = 800


# ------------------------------------------------------------------------------------------------ (a) imports


def part_of(module: str) -> str:
    """The row of MAY_IMPORT that a dotted name below the package falls under: "targets.levels" -> "targets"."""
    return module if module in MAY_IMPORT else module.split(".")[0]


def imports_of(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name below the package) of every import of ours in a file, lazy and type-only ones included.

    `from detent import X` counts as X where X is a part and as the package's own __init__ ("") otherwise.
    """
    name = package.name
    here = path.relative_to(package).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        dotted: list[str] = []
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = [name, *here][: len(here) + 2 - node.level]
                base = ".".join([*parents, *([base] if base else [])])
            dotted = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            dotted = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        for module in dotted:
            first, _, rest = module.partition(".")
            if first == name:
                yield getattr(node, "lineno", 0), rest


def wrong_imports(package: Path) -> list[str]:
    """Every import under `package` that MAY_IMPORT does not allow, and every part without a row in it."""
    found: list[str] = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        module = ".".join(relative.with_suffix("").parts).removesuffix("__init__").rstrip(".")
        part = part_of(module)
        if part not in MAY_IMPORT:
            found.append(f"{relative}: {part!r} has no row in MAY_IMPORT")
            continue
        for line, name in imports_of(path, package):
            other = part_of(name)
            is_part = other in MAY_IMPORT or (package / f"{other}.py").exists() or (package / other).is_dir()
            other = other if is_part else ""  # a name, not a part: it comes from the package's __init__
            own = other == part or (part != "report.record" and other.split(".")[0] == part)
            if not own and other not in MAY_IMPORT[part]:
                found.append(f"{relative}:{line}: {part or '__init__'} imports {other or '__init__'}")
    return found


def test_imports_go_one_way() -> None:
    parts = {part_of(path.relative_to(SRC).parts[0].removesuffix(".py")) for path in SRC.rglob("*.py")}
    assert parts >= {"schedules", "grouping", "targets", "mechanisms", "recipe", "engine", "pack"}, "the tree moved"
    assert wrong_imports(SRC) == []


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("schedules.py", "from detent.grouping import Layout", "schedules imports grouping"),
        ("targets/levels.py", "import detent.mechanisms.latent", "targets imports mechanisms"),
        ("targets/levels.py", "from ..mechanisms import PSG", "targets imports mechanisms"),
        ("targets/levels.py", "from .. import recipe", "targets imports recipe"),
        ("recipe.py", "def late():\n    from detent import engine", "recipe imports engine"),
        ("engine.py", "from detent import Uniform", "engine imports __init__"),
        ("engine.py", "import detent", "engine imports __init__"),
        ("pack/container.py", "import importlib\nimportlib.import_module('detent.cli')", "pack imports cli"),
        ("engine.py", "if TYPE_CHECKING:\n    from detent.testing import laws", "engine imports testing"),
        ("__init__.py", "from detent.data import digits", "__init__ imports data"),
        ("__init__.py", "from .cli import app", "__init__ imports cli"),
        ("export/onnx.py", "from detent.report import numbers", "export imports report"),
        ("report/record.py", "from detent.report import numbers", "report.record imports report"),
        ("report/record.py", "import detent", "report.record imports __init__"),
        ("helpers.py", "import math", "'helpers' has no row"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, code: str, complaint: str) -> None:
    path = tmp_path / "detent" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    found = wrong_imports(tmp_path / "detent")
    assert len(found) == 1 and complaint in found[0], found


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("targets/levels.py", "import torch\nfrom detent.targets.base import Target\nfrom ..schedules import Linear"),
        ("mechanisms/latent.py", "from detent.grouping import Layout\nfrom . import base"),
        ("__init__.py", "from .engine import attach\nfrom detent.pack import save"),
        ("report/page.py", "from .record import Record\nimport detent as dt\nimport detentions"),
        ("cli.py", "from detent import Recipe, data\nfrom detent.report.record import Record"),
    ],
)
def test_a_right_import_passes(tmp_path: Path, file: str, code: str) -> None:
    path = tmp_path / "detent" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    assert wrong_imports(tmp_path / "detent") == []


# -------------------------------------------------------------------------------------- (b) print, (f) file size


def prints(package: Path) -> list[str]:
    """Every call of print under a folder; the word in a docstring is none."""
    return [
        f"{path.relative_to(package)}:{node.lineno}"
        for path in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def long_files(package: Path, limit: int = MAX_LINES) -> list[str]:
    """Files with more lines than the limit."""
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sorted(package.rglob("*.py"))}
    return [f"{path.relative_to(package)}: {lines} lines" for path, lines in sizes.items() if lines > limit]


def test_the_library_never_prints() -> None:
    assert prints(SRC) == []


def targets_named(package: Path) -> list[str]:
    """Imports of a target where its form should decide: in what stores, exports, reports and runs."""
    free = {"Target", "Params", "Held", "Form"}
    modules = {"detent.targets.forms", "detent.targets.parts", "detent.targets.kmeans"}
    found = []
    for path in sorted(package.rglob("*.py")):
        part = path.relative_to(package).parts[0].removesuffix(".py")
        if part not in ("pack", "export", "report", "engine", "lives", "claimed", "drivers", "guards", "specs"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("detent.targets"):
                continue
            names = {alias.name for alias in node.names}
            base = node.module == "detent.targets.base" and not {n for n in names if n[0].isupper()} - free
            if node.module not in modules and not base and (names - free or node.module != "detent.targets"):
                found.append(f"{path.relative_to(package)}:{node.lineno} imports {', '.join(sorted(names))}")
    return found


def test_what_comes_after_targets_goes_by_forms() -> None:
    assert targets_named(SRC) == []


def test_a_target_that_is_named_is_found(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "new.py").write_text("from detent.targets import Target, Uniform\n")
    (tmp_path / "pack.py").write_text("from detent.targets.levels import _Scaled\n")
    assert len(targets_named(tmp_path)) == 2


def test_files_stay_small() -> None:
    assert long_files(SRC) == []


def test_a_print_and_a_long_file_are_found(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text('"""print(plan) shows it."""\nif True:\n    print("here")\n')
    (tmp_path / "long.py").write_text("x = 1\n" * 801)
    (tmp_path / "full.py").write_text("x = 1\n" * 800)
    assert prints(tmp_path) == ["loud.py:3"]
    assert long_files(tmp_path) == ["long.py: 801 lines"]


# --------------------------------------------------------------------------------- (c) what `import detent` costs


def costs_of(statement: str) -> dict[str, Any]:
    """Run a statement in a fresh process: the heavy modules it loads, and the questions it asks about CUDA."""
    script = f"""
import json, sys, torch
before, asked = set(sys.modules), []
for name in ("is_available", "device_count", "current_device", "_lazy_init", "get_device_properties"):
    def spy(*args, name=name, real=getattr(torch.cuda, name), **kwargs):
        asked.append(name)
        return real(*args, **kwargs)
    setattr(torch.cuda, name, spy)
{statement}
loaded = sorted({{name.split(".")[0] for name in set(sys.modules) - before}} & {HEAVY!r})
sys.stdout.write(json.dumps({{"heavy": loaded, "cuda": asked, "initialized": torch.cuda.is_initialized()}}))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 0, f"the import wrote to standard output: {done.stdout!r}"
    return json.loads(done.stdout)


def test_importing_detent_is_lean_and_leaves_the_gpu_alone() -> None:
    assert costs_of("import detent") == {"heavy": [], "cuda": [], "initialized": False}


def test_a_heavy_import_and_a_question_to_cuda_are_found() -> None:
    costs = costs_of("import typer; torch.cuda.is_available()")
    assert costs["heavy"] == ["typer"]
    assert "is_available" in costs["cuda"]


# ------------------------------------------------------------------------------------- (d) docstrings with examples


def undocumented(module: ModuleType | type, names: list[str]) -> list[str]:
    """Public classes and functions without a docstring that holds an example; exceptions need only a docstring."""
    found: list[str] = []
    for name in names:
        value = getattr(module, name)
        if not callable(value) or getattr(value, "__module__", "") == "typing":
            continue
        text = value.__doc__ or ""
        is_exception = inspect.isclass(value) and issubclass(value, BaseException)
        if not text or (not is_exception and ">>> " not in text):
            found.append(name)
    return found


def public_names(module: ModuleType) -> list[str]:
    """`__all__` where there is one, else what the module binds: no modules, nothing private."""
    bound = [name for name, value in vars(module).items() if name[0] != "_" and not inspect.ismodule(value)]
    return list(getattr(module, "__all__", bound))


def test_every_public_name_has_an_example() -> None:
    names = public_names(detent)
    assert {"Recipe", "Rule", "Uniform", "PSG", "attach", "compress", "save", "load"} <= set(names)
    assert len(set(names)) == len(names), "a public name stands twice"
    assert undocumented(detent, names) == []


def test_a_name_without_an_example_is_found() -> None:
    class Bad:
        bare: Callable[[], None] = lambda: None

        class Wordy:
            """Says much, shows nothing."""

        class Shown:
            """>>> 1 + 1
            2
            """

        class Trouble(ValueError):
            """Raised on a bad day."""

        class Mute(ValueError):
            pass

    Bad.Mute.__doc__ = None
    assert undocumented(Bad, ["bare", "Wordy", "Shown", "Trouble", "Mute"]) == ["bare", "Wordy", "Mute"]


# ------------------------------------------------------------------------------------------ (e) version, markers


def test_the_version_is_said_once() -> None:
    # Read by hand: tomllib is newer than the oldest Python we support.
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = text.split("[project]\n", 1)[1].split("\n[", 1)[0]
    (version,) = re.findall(r'^version = "(.+)"$', project, flags=re.M)
    assert version == detent.__version__


def test_the_console_script_exists() -> None:
    (entry,) = re.findall(r'^detent = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.M)
    module, _, name = entry.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


# ------------------------------------------------------------------------------------------- (h) dependencies

_DISTRIBUTION = {
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "compressed_tensors": "compressed-tensors",
    "onnx_ir": "onnx-ir",
}


def undeclared(package: Path, pyproject: str) -> list[str]:
    """Packages that files of ours import, lazily or not, and pyproject.toml names neither as core nor in an extra."""
    lists = re.findall(r"^\w+ = \[(.*?)\]$", pyproject, flags=re.M | re.S)
    declared = {name.lower() for text in lists for name in re.findall(r'"([\w-]+)>=', text)}
    found: set[str] = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {package.name}
            found |= {top for top in tops if _DISTRIBUTION.get(top, top).lower() not in declared}
    return sorted(found)


def test_every_dependency_is_declared() -> None:
    assert undeclared(SRC, (ROOT / "pyproject.toml").read_text(encoding="utf-8")) == []


def test_an_undeclared_dependency_is_found(tmp_path: Path) -> None:
    package = tmp_path / "detent"
    package.mkdir()
    (package / "a.py").write_text("import os\nimport yaml\nfrom . import b\nfrom detent import c\n")
    (package / "b.py").write_text("def late():\n    import scipy.stats\n    from PIL import Image\n")
    text = '[project]\nkeywords = ["scipy"]\ndependencies = [\n    "PyYAML>=6",\n]\n'
    assert undeclared(package, text) == ["PIL", "scipy"]


# --------------------------------------------------------------------------------- (g) no registry, no download URL

# Spelt in pieces, so that this file does not hold what it looks for.
_HOSTS = ["py" + "pi.org", "python" + "hosted.org", "down" + "load.pytorch", "npm" + "js.", "ana" + "conda.org"]
_HOSTS += ["crates" + ".io", "proxy.go" + "lang", "deb.deb" + "ian", "/opt/" + "wheels", "/opt/" + "pypi"]
_OPTIONS = ["index" + "-url", "find" + "-links", "trusted" + "-host"]
_ARCHIVE = r"https?://\S+\.(?:whl|tar\.\w+|tgz|zip|gz|parquet|safetensors|onnx|pth?|npz)\b"
_FETCH = r"https?://\S+/resol" + r"ve/"
_REGISTRY = r"//regis" + r"try\."
FORBIDDEN = re.compile("|".join([*map(re.escape, [*_HOSTS, *_OPTIONS]), _ARCHIVE, _FETCH, _REGISTRY]), re.IGNORECASE)


def tracked_files() -> list[Path]:
    """What a commit would hold: tracked files and new ones that git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git work tree: what is tracked cannot be told")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_registry_or_a_download() -> None:
    files = tracked_files()
    assert Path(__file__).resolve() in files
    found = [
        f"{path.relative_to(ROOT)}: {match[0]!r}"
        for path in files
        for match in FORBIDDEN.finditer(path.read_text(encoding="utf-8", errors="ignore"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "pip install --extra-index" + "-url x",
        "https://files.python" + "hosted.org/packages/a",
        "http" + "s://example.net/files/model.safetensors",
        "http" + "s://example.net/some/repo/resol" + "ve/main/x",
    ],
)
def test_a_registry_or_a_download_is_found(text: str) -> None:
    assert FORBIDDEN.search(text)


@pytest.mark.parametrize("text", ["arXiv 1710.01878", "a registry of targets", "https://example.net/paper.html"])
def test_other_text_passes(text: str) -> None:
    assert not FORBIDDEN.search(text)
