# SPDX-License-Identifier: Apache-2.0
"""Nothing from a file becomes code, a module, a type or an attribute: read from the source (rows G1, G8, G9)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SOURCES = sorted(path for part in ("eigenprune", "benchmarks") for path in (REPOSITORY / part).rglob("*.py"))
SOURCES += [REPOSITORY / "setup.py", REPOSITORY / "_eigenprune_autoload.py"]
PICKLES = {"pickle", "_pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "cPickle"}
NEVER_CALLED = {
    *("eval", "exec", "compile", "__import__"),
    *("torch.load", "torch.save", "torch.hub.load", "torch.package.PackageImporter", "torch.jit.load"),
    *("numpy.load", "np.load", "yaml.load", "yaml.unsafe_load", "os.system", "runpy.run_path", "runpy.run_module"),
    *("importlib.util.spec_from_file_location", "importlib.util.module_from_spec"),
}
# Where a module is imported by a name that is no literal, and why no file can choose it.
IMPORTS_BY_NAME = {
    "eigenprune/__init__.py": "the literal table of public names",
    "eigenprune/integrations/registration.py": "the literal table of plug-ins",
}
# Where an attribute is read by a name that is no literal, and why no file can choose it.
GETATTR_BY_NAME = {
    "eigenprune/__init__.py": "the literal table of public names",
    "eigenprune/config.py": "the names of integer settings, a literal tuple",
    "eigenprune/prune/savable.py": "the names of settings, a literal tuple",
    "eigenprune/memory.py": "names of C functions, literals at the callers",
    "eigenprune/ops/_autocast.py": "the name of a dispatch key, made from a device type",
    "eigenprune/hub/model_class.py": "only names in the closed list of model classes of transformers",
}


def _label(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _found(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(what, line) of everything that could turn data into code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for name in [*names, module, *(f"{module}.{name}" for name in names)]:
                if name.partition(".")[0] in PICKLES or name in NEVER_CALLED:
                    yield "danger", node.lineno
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "shell"):
            yield "danger", node.value.lineno
        elif isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "allow_pickle"):
            yield "danger", node.lineno
        elif isinstance(node, ast.Call):
            called = _dotted(node.func)
            if called in NEVER_CALLED:
                yield "danger", node.lineno
            literal = all(isinstance(argument, ast.Constant) for argument in node.args[:1])
            if called.endswith("import_module") and not literal:
                yield "import", node.lineno
            if called == "getattr" and not (isinstance(node.args[1], ast.Constant) or _dotted(node.args[1]).isupper()):
                yield "getattr", node.lineno


def test_the_search_finds_each_kind() -> None:
    lines = (
        "import pickle",
        "from torch import load",
        "eval('1')",
        "torch.load(f)",
        "f(trust_remote_code=x)",
        "f(**{'trust_remote_code': True})",
        "np.load(f)",
        "subprocess.run(c, shell=True)",
        "import_module(name)",
        "importlib.import_module(a + b)",
        "getattr(torch, name)",
        "import_module('torch')",
        "getattr(x, 'y')",
        "model.eval()",
    )
    found = sorted({line for _, line in _found(ast.parse("\n".join(lines)))})
    assert found == list(range(1, 12))


@pytest.mark.parametrize("path", SOURCES, ids=_label)
def test_g1_g8_g9_nothing_turns_data_into_code(path: Path) -> None:
    found = list(_found(ast.parse(path.read_text(encoding="utf-8"))))
    kinds = {kind for kind, _ in found}
    assert "danger" not in kinds, found
    assert "import" not in kinds or _label(path) in IMPORTS_BY_NAME, found
    assert "getattr" not in kinds or _label(path) in GETATTR_BY_NAME, found


def test_no_exception_is_listed_for_nothing() -> None:
    for kind, table in (("import", IMPORTS_BY_NAME), ("getattr", GETATTR_BY_NAME)):
        for name in table:
            kinds = {found for found, _ in _found(ast.parse((REPOSITORY / name).read_text(encoding="utf-8")))}
            assert kind in kinds, f"{name} needs no exception any more"
