# SPDX-License-Identifier: Apache-2.0
"""The optional modelling file: loads a pruned model where eigenprune cannot be imported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from eigenprune import EigenpruneConfig, prune_, save_model
from eigenprune.errors import CheckpointError, HubError
from eigenprune.hub import build_card
from eigenprune.hub.modeling import modeling_text
from eigenprune.hub.names import MODELING_NAME
from eigenprune.hub.outgoing import collect
from eigenprune.layers import low_rank_layers
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import logits, tiny_model, token_windows

REPOSITORY = Path(__file__).resolve().parent.parent.parent
KINDS = {
    "llama": ("pivot", "AutoModelForCausalLM", "kfac"),
    "gpt2": ("pivot", "AutoModelForCausalLM", "kfac-channels"),
    "bert": ("pair", "AutoModelForMaskedLM", "kfac"),
}
# What a reader without the package runs. None in sys.modules makes its import fail; the checkout is not on the path.
READER = """
import json, sys
sys.modules["eigenprune"] = None
import torch, transformers
out = []
for entry in json.load(open(sys.argv[1])):
    auto = getattr(transformers, entry["auto"])
    try:
        model = auto.from_pretrained(entry["folder"], trust_remote_code=entry["trust"]).eval()
    except Exception as error:
        out.append({"error": f"{type(error).__name__}: {error}"})
        continue
    with torch.no_grad():
        found = model(input_ids=torch.tensor(entry["ids"])).logits
    torch.save({"logits": found, "state": model.state_dict()}, entry["out"])
    if entry.get("resave"):
        model.save_pretrained(entry["resave"])
    out.append({"class": type(model).__name__})
assert "eigenprune.config" not in sys.modules
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    found = {}
    for kind, (layout, _, method) in KINDS.items():
        model = tiny_model(kind)
        prune_(model, EigenpruneConfig(keep=0.6, layout=layout, method=method), windows=token_windows(), progress=False)
        folder = tmp_path_factory.mktemp("modeling") / kind
        found[kind] = model, save_model(model, folder, remote_code=True)
    return found


def read(plan: list[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    """What the reader saw."""
    (scratch / "plan.json").write_text(json.dumps(plan))
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", READER, str(scratch / "plan.json")],
        cwd=scratch,
        env=variables | {"HF_HOME": str(scratch / "hf-home")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_reader_without_the_package_gets_the_model_or_an_error(
    saved: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    """Loading, saving again, a file without a factor, and no trust: in one process, whose start costs seconds."""
    ids = token_windows(2, 12).tolist()
    damaged = Path(shutil.copytree(saved["llama"][1], tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("left.weight"))
    del tensors[lost]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    plan = [
        {
            "folder": str(folder),
            "auto": KINDS[kind][1],
            "trust": True,
            "ids": ids,
            "out": str(tmp_path / kind),
            "resave": str(tmp_path / f"{kind}-again"),
        }
        for kind, (_, folder) in saved.items()
    ]
    again = {"folder": str(tmp_path / "llama-again"), "auto": KINDS["llama"][1], "trust": True, "ids": ids}
    plan.append(again | {"out": str(tmp_path / "again")})
    plan.append(plan[0] | {"folder": str(damaged)})
    plan.append(plan[0] | {"trust": False})
    results = read(plan, tmp_path)
    for (kind, (model, _)), result in zip(saved.items(), results, strict=False):
        assert result == {"class": f"Eigenprune{type(model).__name__}"}
        seen = torch.load(tmp_path / kind, weights_only=True)
        wanted = model.state_dict()
        assert seen["state"].keys() == wanted.keys()
        assert all(torch.equal(seen["state"][name], tensor) for name, tensor in wanted.items())
        # The same products, summed in another order: a dozen of them one after the other, each right to the rounding.
        scale = float(logits(model).abs().max())
        assert float((seen["logits"] - logits(model)).abs().max()) <= 12 * 8 * torch.finfo(torch.float32).eps * scale
    assert results[3] == {"class": "EigenpruneLlamaForCausalLM"}
    assert torch.equal(*(torch.load(tmp_path / name, weights_only=True)["logits"] for name in ("llama", "again")))
    assert lost in results[4]["error"]
    assert results[5]["error"].startswith("RuntimeError")  # the tensor of size zero


@pytest.mark.parametrize("trust", [None, True])
@pytest.mark.parametrize("kind", KINDS)
def test_where_the_package_is_installed_it_loads_the_model_itself(
    kind: str, trust: bool | None, saved: dict[str, tuple[Any, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model, folder = saved[kind]
    auto: Any = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    loaded = auto.from_pretrained(folder, trust_remote_code=trust)
    assert state_hashes(loaded) == state_hashes(model)
    assert low_rank_layers(loaded).keys() == low_rank_layers(model).keys()


def test_file_is_written_only_when_asked_for_and_is_small_and_the_same_for_a_class(
    saved: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = saved["llama"]
    plain = save_model(model, tmp_path / "plain")
    assert not (plain / MODELING_NAME).exists()
    assert "auto_map" not in json.loads((plain / "config.json").read_text())
    text = (folder / MODELING_NAME).read_text()
    assert text == modeling_text("LlamaForCausalLM")
    assert len(text.splitlines()) <= 100
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert all(line.split()[1].partition(".")[0] in ("re", "torch", "transformers") for line in imports)
    assert "trust_remote_code=True" in build_card(folder, "me/x")
    assert "remote code" in build_card(plain, "me/x")
    assert "trust_remote_code" not in build_card(plain, "me/x")


@pytest.mark.parametrize(
    "name", ["", "os", "Llama ForCausalLM", "LlamaForCausalLM\nimport os", "NoSuchModel", "X" * 200]
)
def test_class_that_transformers_does_not_have_gets_no_file(name: str) -> None:
    with pytest.raises(CheckpointError, match="no model class"):
        modeling_text(name)


def test_only_the_file_as_it_is_written_is_published(saved: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved["llama"][1], tmp_path / "model"))
    assert MODELING_NAME in collect(folder, "LlamaForCausalLM").texts
    with (folder / MODELING_NAME).open("a") as opened:
        opened.write("import os\n")
    with pytest.raises(HubError, match="not the file"):
        collect(folder, "LlamaForCausalLM")
