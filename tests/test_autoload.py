# SPDX-License-Identifier: Apache-2.0
"""The entry point that `import torch` calls: present, absent, opted out, failing inside, in spawned processes.

The entry point is read from pyproject.toml and put on the path as the metadata of an installed package, so that the
test does not depend on how, or whether, this checkout is installed.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eigenprune import EigenpruneConfig, prune_, save_model
from tests.helpers.tiny_models import tiny_model, token_windows

REPOSITORY = Path(__file__).resolve().parent.parent
PLUGIN = "eigenprune.integrations.transformers"
# Hides what is installed in the environment that runs the tests.
WITHOUT_METADATA = (
    "import importlib.metadata as metadata\n"
    "real = metadata.entry_points\n"
    "metadata.entry_points = lambda **query: [e for e in real(**query) if e.name != 'eigenprune']\n"
)
REPORT = "import json, sys; print(json.dumps({}))"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the metadata that pip would write."""
    folder = tmp_path_factory.mktemp("site")
    metadata = folder / "eigenprune-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: eigenprune\nVersion: 0.1.0\n")
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'\[project\.entry-points\."torch\.backends"\]\neigenprune = "(.+)"', project)
    assert found is not None
    (metadata / "entry_points.txt").write_text(f"[torch.backends]\neigenprune = {found.group(1)}\n")
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("llama")
    prune_(model, EigenpruneConfig(keep=0.6), windows=token_windows(), progress=False)
    return save_model(model, tmp_path_factory.mktemp("pruned") / "model")


def run(code: str, *path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "EIGENPRUNE_AUTOLOAD"}
    variables["PYTHONPATH"] = os.pathsep.join(map(str, [*path, REPOSITORY]))
    return subprocess.run(
        [sys.executable, "-c", code],
        env=variables | environment,
        cwd=REPOSITORY.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def output(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_pruned_model_loads_without_importing_the_package_also_in_spawned_processes(
    installed: Path, pruned: Path, tmp_path: Path
) -> None:
    (tmp_path / "loads.py").write_text(
        "import json, multiprocessing, sys\n"
        "def factored(folder):\n"
        "    import torch\n"
        f"    lazy = 'eigenprune' in sys.modules and {PLUGIN!r} not in sys.modules\n"
        "    from transformers import AutoModelForCausalLM\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "    return lazy, sum(type(module).__name__ == 'LowRankLinear' for module in model.modules())\n"
    )
    code = (
        "import json, multiprocessing, loads\n"
        f"folder = {str(pruned)!r}\n"
        "with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "    print(json.dumps([loads.factored(folder), pool.apply(loads.factored, [folder])]))\n"
    )
    expected = len(json.loads((pruned / "config.json").read_text())["quantization_config"]["modules"])
    assert expected > 0
    assert output(run(code, installed, tmp_path)) == [[True, expected], [True, expected]]


@pytest.mark.parametrize("variable", ["EIGENPRUNE_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_variable_turns_it_off(variable: str, installed: Path) -> None:
    code = "import torch\n" + REPORT.format("'eigenprune' in sys.modules")
    assert output(run(code, installed, **{variable: "0"})) is False


def test_without_installed_metadata_torch_imports_and_nothing_is_registered() -> None:
    code = WITHOUT_METADATA + "import torch\n" + REPORT.format("'eigenprune' in sys.modules")
    assert output(run(code)) is False


@pytest.mark.parametrize("error", ["ValueError('broken')", "ImportError('broken')", "SyntaxError('broken')"])
def test_package_that_fails_to_import_does_not_break_torch(error: str, installed: Path, tmp_path: Path) -> None:
    (tmp_path / "eigenprune").mkdir()
    (tmp_path / "eigenprune" / "__init__.py").write_text(f"raise {error}\n")
    code = "import torch\n" + REPORT.format("[torch.ones(2).sum().item(), 'eigenprune' in sys.modules]")
    done = run("import warnings; warnings.simplefilter('error', ImportWarning)\n" + code, tmp_path, installed)
    assert output(done) == [2.0, False]
    assert done.stderr == ""


def test_plugin_that_fails_to_import_does_not_break_transformers(installed: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    code = (
        f"import sys; sys.modules[{PLUGIN!r}] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'dense')!r})\n"
        + REPORT.format("type(model).__name__")
    )
    done = run(code, installed)
    assert output(done) == "LlamaForCausalLM"
    assert "pruned models will not load" in done.stderr
