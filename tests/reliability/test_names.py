# SPDX-License-Identifier: Apache-2.0
"""Hostile names at every door: index, config, save, push; links out of a folder (rows G11, G12)."""

import json
import shutil
from pathlib import Path

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

from eigenprune import EigenpruneConfig, prune_, push_to_hub
from eigenprune.errors import CheckpointError, ConfigError, HubError
from eigenprune.hub.facts import weight_files
from eigenprune.hub.names import ALLOWED, check_repo, check_revision
from eigenprune.hub.outgoing import collect
from tests.helpers.tiny_models import tiny_model, token_windows
from tests.reliability.tiny_checkpoint import LAYER, write

# Parent steps, absolute, drives, UNC, backslashes, NUL and line ends, devices, dots and spaces, look-alikes, ...
STEMS = (
    *("../x", "../../x", "a/../x", "a/..", "..", "."),
    *("/x", "//server/share/x", "/etc/passwd", "C:x", "C:/x", "C:\\x"),
    *("\\x", "..\\x", "a\\..\\x", "\\\\server\\share\\x", "\\\\?\\C:\\x"),
    *("x\0", "x\n", "\nx", "x\r", "x\t", "x ", " x"),
    *("con", "NUL", "com1", "aux.x", "x" * 300),
    *("a\uff0fx", "\u2215x", "a\u2024\u2024x", "x\u202e", "\u0445"),
    *(".git/config", ".git/hooks/pre-commit", "-x", "~/x", "$HOME/x", "%TEMP%/x"),
)
WEIGHTS = (*(f"{stem}.safetensors" for stem in STEMS), "x.safetensors.", "x.safetensors ", ".safetensors", "")


def test_g11_there_are_enough_names() -> None:
    assert len(set(STEMS)) >= 30


def _index(folder: Path, name: str) -> Path:
    """The checkpoint in `folder`, its index naming `name`; the file is there if the name can be one."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    honest = content["weight_map"][f"{LAYER}.left.weight"]
    content["weight_map"] = dict.fromkeys(content["weight_map"], name)
    index.write_text(json.dumps(content))
    target = folder / name
    if name and "\0" not in name and len(name) < 200 and target.resolve().is_relative_to(folder.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / honest, target)
    return folder


@pytest.mark.parametrize("name", WEIGHTS, ids=repr)
def test_g11_index_of_a_checkpoint_names_files_beside_it_only(name: str, tmp_path: Path) -> None:
    folder = _index(write(tmp_path / "deep" / "model", index=True), name)
    with pytest.raises(CheckpointError, match="index"):
        weight_files(folder)


@pytest.mark.parametrize("name", WEIGHTS, ids=repr)
def test_g11_from_pretrained_takes_no_weights_from_elsewhere(name: str, pruned: Path, tmp_path: Path) -> None:
    """Every such file is there where the system allows the name, so that only the name can be what is refused."""
    folder = Path(shutil.copytree(pruned, tmp_path / "deep" / "model"))
    (folder / "model-00001-of-00001.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    names = {f"{LAYER}.left.weight": "model-00001-of-00001.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises((CheckpointError, OSError, ValueError)) as caught:
        AutoModelForCausalLM.from_pretrained(_index(folder, name))
    if "\0" not in name and len(name) < 200:  # Python, or the system, says so itself of those
        assert isinstance(caught.value, CheckpointError)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("llama")
    prune_(model, EigenpruneConfig(keep=0.6), windows=token_windows(), progress=False)
    model.save_pretrained(tmp_path_factory.mktemp("pruned") / "model")
    return tmp_path_factory.getbasetemp() / "pruned0" / "model"


WORDS = ("con", "NUL", "com1", "aux.x", "x" * 300)  # as good as any other where no file has that name


@pytest.mark.parametrize("stem", [*(stem for stem in STEMS if stem not in WORDS), "", "x.", ".x", "x" * 600], ids=repr)
def test_g11_config_names_layers_only(stem: str) -> None:
    with pytest.raises(ConfigError, match="layer name"):
        EigenpruneConfig(modules={stem: ["pair", 8]})


class Odd(nn.Module):
    """A module whose child has a name that no attribute could have."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(48, 48))


@pytest.mark.parametrize("stem", ["/x", "C:x", "\\x", "x\0", "x\n", "a/x", "~", "-x", "\u0445"], ids=repr)
def test_g11_model_with_such_a_layer_is_not_pruned_and_stays_as_it_was(stem: str) -> None:
    """Else it could be saved, and not be loaded."""
    model = tiny_model("llama")
    model.model.layers[0].odd = Odd(stem)
    before = {name: type(module) for name, module in model.named_modules()}
    config = EigenpruneConfig(keep=0.6, method="svd", allocation="uniform")
    with pytest.warns(UserWarning, match="no data"), pytest.raises(ConfigError, match="layer name"):
        prune_(model, config, progress=False)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("stem", STEMS, ids=repr)
def test_g11_push_takes_no_such_file_branch_or_repository(stem: str) -> None:
    for name in (stem, f"{stem}.json", f"{stem}.safetensors", f"additional_chat_templates/{stem}.jinja"):
        honest = stem in ("con", "NUL", "com1", "-x") and name.startswith("additional")
        assert honest or not ALLOWED.fullmatch(name)
    with pytest.raises(HubError):
        check_repo(stem)
    if stem not in ("con", "NUL", "com1", "aux.x"):
        with pytest.raises(HubError):
            check_revision(stem)


@pytest.mark.parametrize("target", ["parent", "absolute", "broken"])
def test_g12_link_out_of_the_folder_is_not_pushed(target: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    (tmp_path / "secret.json").write_text("{}")
    places = {"parent": Path("../secret.json"), "absolute": tmp_path / "secret.json", "broken": Path("nowhere")}
    (folder / "generation_config.json").symlink_to(places[target])
    with pytest.raises(HubError, match=r"link out of the folder"):
        push_to_hub(folder, "me/x")


def test_g12_linked_folder_stays_behind(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "x.jinja").write_text("secret")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "templates")
    with pytest.warns(UserWarning, match="1 files are not published"):
        assert list(collect(folder).texts) == ["config.json"]


def test_g12_folder_may_itself_be_a_link(tmp_path: Path) -> None:
    """As the snapshots of the hub library's cache are."""
    write(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert [path.name for path in weight_files(tmp_path / "link")] == ["model.safetensors"]
