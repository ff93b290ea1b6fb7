# SPDX-License-Identifier: Apache-2.0
"""Rules of the house, read from the source: imports run downwards, nothing dangerous, nothing oversized."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import eigenprune

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PACKAGE = REPOSITORY / "eigenprune"
# Each part may import those in earlier rows and itself; parts of one row do not see each other.
ROWS = (
    ("errors", "memory"),
    ("ops",),
    ("layers",),
    ("calibrate",),
    ("spectral",),
    ("recover", "entries", "evaluate", "report"),
    ("config",),
    ("removal",),
    ("quantize",),
    ("prune", "hub"),
    ("integrations", "cli", "__main__"),
)
HEIGHT = {part: row for row, parts in enumerate(ROWS) for part in parts}
LIGHT = "eigenprune.integrations.registration"  # standard library only, so the package's __init__ may have it
MOST_LINES = 400
LONGEST_FUNCTION = 60

MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((REPOSITORY / "benchmarks").rglob("*.py"))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _label(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def _imported(path: Path) -> Iterator[tuple[str, ast.stmt, bool]]:
    """(module name, statement, whether only type checkers see it) of every import in a file, also inside functions."""
    tree = _tree(path)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node, id(node) in for_types
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_label(path)}:{node.lineno}: relative import"
            yield node.module or "", node, id(node) in for_types


def _part(path: Path) -> str:
    inside = path.relative_to(PACKAGE).parts
    return inside[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=_label)
def test_module_imports_only_parts_below_its_own(path: Path) -> None:
    part = _part(path)
    for name, node, for_types in _imported(path):
        if name.partition(".")[0] != "eigenprune":
            continue
        if part == "__init__":
            assert for_types or name in ("eigenprune.errors", LIGHT), f"{_label(path)}:{node.lineno} imports {name}"
            continue
        if name == "eigenprune":  # the version, and the like
            assert part in ("cli", "integrations"), f"{_label(path)}:{node.lineno} imports the package itself"
            continue
        other = name.split(".")[1]
        assert part in HEIGHT, f"{part} has no place in the house: give it one in ROWS"
        upwards = other != part and HEIGHT[other] >= HEIGHT[part]
        assert not upwards, f"{_label(path)}:{node.lineno} imports {name}, which is not below {part}"


def test_registration_imports_the_standard_library_only() -> None:
    for name, node, _ in _imported(PACKAGE / "integrations" / "registration.py"):
        assert name.partition(".")[0] in sys.stdlib_module_names, f"line {node.lineno}: {name}"
    assert not list(_imported(PACKAGE / "integrations" / "__init__.py"))


def test_import_is_light_and_silent() -> None:
    heavy = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "rich", "typer"}
    code = f"import sys, eigenprune; sys.exit(', '.join({heavy!r} & set(sys.modules)) or 0)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names_are_few_resolvable_and_documented() -> None:
    assert len(eigenprune.__all__) <= 12
    assert sorted(set(eigenprune.__all__)) == eigenprune.__all__
    for name in eigenprune.__all__:
        found = getattr(eigenprune, name)
        assert (found.__doc__ or "").strip(), f"{name} has no docstring"
        assert not (found.__doc__ or "").startswith(f"{name}("), f"{name} has only the docstring that dataclass made"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = eigenprune.no_such_name


def _dangerous(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.partition(".")[0] in {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}:
                    yield node.lineno, f"imports {name}"
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in {"eval", "exec", "compile", "__import__"}:
                yield node.lineno, f"calls {called.id}"
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                full = f"{called.value.id}.{called.attr}"
                if full in {"torch.load", "torch.save", "os.system", "yaml.load", "np.load", "numpy.load"}:
                    yield node.lineno, f"calls {full}"
            if any(k.arg in {"shell", "trust_remote_code"} and _is_true(k.value) for k in node.keywords):
                yield node.lineno, "shell or remote code"


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and bool(node.value)


def test_the_search_for_danger_finds_danger() -> None:
    source = "import pickle\nfrom torch import x\neval('1')\ntorch.load('f')\nrun(c, shell=True)\n"
    found = list(_dangerous(ast.parse(source)))
    assert [line for line, _ in found] == [1, 3, 4, 5]


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=_label)
def test_no_pickle_no_evaluated_code_no_shell(path: Path) -> None:
    assert list(_dangerous(_tree(path))) == []


@pytest.mark.parametrize("path", MODULES, ids=_label)
def test_package_validates_with_errors_not_asserts(path: Path) -> None:
    assert [node.lineno for node in ast.walk(_tree(path)) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=_label)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node) is not None and len(node.body) > 1
            first = node.body[1] if documented else node.body[0]  # the docstring does not count
            length = (node.end_lineno or 0) - first.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} at line {node.lineno} has {length} lines"
