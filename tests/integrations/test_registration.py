# SPDX-License-Identifier: Apache-2.0
"""Plug-ins are imported right after the library they are for, whatever was imported or asked about before."""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eigenprune.integrations import registration

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A library and a plug-in for it, that note when they run; the name of the list they note it in."""
    (tmp_path / "noted_order.py").write_text("order = []\n")
    (tmp_path / "some_library.py").write_text("import noted_order\nnoted_order.order.append('library')\n")
    (tmp_path / "some_plugin.py").write_text(
        "import noted_order, some_library\nnoted_order.order.append('plug-in')\nsome_library.known = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registration.PLUGINS, "some_library", "some_plugin")
    yield "noted_order"
    for name in ("noted_order", "some_library", "some_plugin"):
        sys.modules.pop(name, None)


def order(library: str) -> list[str]:
    return list(importlib.import_module(library).order)


def test_plug_in_runs_right_after_its_library(library: str) -> None:
    module = importlib.import_module("some_library")
    assert order(library) == ["library", "plug-in"]
    assert module.known


def test_plug_in_is_imported_at_once_where_the_library_is_there(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without = [finder for finder in sys.meta_path if type(finder).__name__ != "_PluginFinder"]
    monkeypatch.setattr(sys, "meta_path", list(without))
    importlib.import_module("some_library")
    assert order(library) == ["library"]
    registration.register_plugins()
    registration.register_plugins()
    assert order(library) == ["library", "plug-in"]
    assert len(sys.meta_path) == len(without) + 1


def test_asking_whether_the_library_is_there_does_not_use_the_hook_up(library: str) -> None:
    for _ in range(3):
        assert importlib.util.find_spec("some_library") is not None
    assert order(library) == []
    importlib.import_module("some_library")
    assert order(library) == ["library", "plug-in"]


def test_two_finders_do_not_call_each_other(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finders = [registration._PluginFinder(), registration._PluginFinder()]
    monkeypatch.setattr(sys, "meta_path", [*finders, *sys.meta_path])
    importlib.import_module("some_library")
    assert order(library) == ["library", "plug-in"]


def test_a_library_that_is_not_installed_is_missing_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registration.PLUGINS, "no_such_library_at_all", "some_plugin")
    assert importlib.util.find_spec("no_such_library_at_all") is None
    with pytest.raises(ModuleNotFoundError, match="no_such_library_at_all"):
        importlib.import_module("no_such_library_at_all")


@pytest.mark.parametrize("autoload", ["0", "1"])
def test_peft_first_and_a_config_from_before_work(autoload: str) -> None:
    """peft and a LoraConfig are there before eigenprune is imported (the other order: test_peft_reload).

    With autoloading, where the package is installed, torch imports eigenprune while peft is only half there.
    """
    pytest.importorskip("peft")
    code = """
import os, peft
config = peft.LoraConfig(target_modules=["0"], r=2)
wrapped = hasattr(peft.tuners.tuners_utils.BaseTuner.inject_adapter, "checked_by_eigenprune")
assert not (wrapped and os.environ["EIGENPRUNE_AUTOLOAD"] == "0")
import eigenprune, torch
model = torch.nn.Sequential(eigenprune.LowRankLinear(16, 16, 4))
print(type(peft.get_peft_model(model, config).base_model.model[0]).__name__)
"""
    env = os.environ | {"EIGENPRUNE_AUTOLOAD": autoload}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["LoraLowRankLinear"], done.stderr[-2000:]
