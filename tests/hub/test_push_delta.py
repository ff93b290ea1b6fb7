# SPDX-License-Identifier: Apache-2.0
"""A sparse delta goes to the Hub with its card, and comes back over a base that is fetched from there too."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from eigenprune.errors import HubError
from eigenprune.hub import build_card, push_to_hub
from tests.helpers.compare import tensor_hash
from tests.helpers.delta_folders import delta_folder, merged_state, saved_tuned
from tests.helpers.tiny_models import saved_dense
from tests.hub.client import Client
from tests.hub.server import TOKEN, Hub

REPO, BASE = "me/delta", "org/tiny-base"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    scratch = tmp_path_factory.mktemp("delta")
    base, tuned = saved_dense("llama", scratch / "local-base"), saved_tuned("llama", scratch / "tuned")
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# base\n")
    delta_folder(base, tuned, scratch / "delta", base_model=BASE)
    return base, tuned, scratch / "delta"


def test_delta_is_pushed_and_pulled_with_its_base(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, delta = folders
    with Hub() as hub:
        with Client(hub.url, tmp_path, HF_TOKEN=TOKEN) as client:
            pushed = client("push", folder=str(delta), repo=REPO)
            assert "value" in pushed, pushed.get("traceback")
            lonely = client("pull", repo=REPO)
            assert lonely["error"] == "CheckpointError"
            assert BASE in lonely["message"]
            assert "EIGENPRUNE_BASE" in lonely["message"]
            hub.make(BASE, files={path.name: path.read_bytes() for path in base.iterdir()})
            pulled = client("pull", repo=REPO)
            assert "value" in pulled, pulled.get("traceback")
            words = ["delta", "apply", BASE, REPO, "--out", str(tmp_path / "whole"), "--json", "--quiet"]
            applied = client("command", words=words)["value"]
            assert applied["code"] == 0, applied["output"]
            wrong = {path.name: path.read_bytes() for path in tuned.iterdir()}
            hub.make("org/other", files=wrong)
            words = ["delta", "apply", "org/other", REPO, "--out", str(tmp_path / "none"), "--quiet"]
            refused = client("command", words=words)["value"]
            words = ["delta", "make", BASE, str(tuned), "--rule", "random", "--out", str(tmp_path / "made"), "--json"]
            made = client("command", words=[*words, "--quiet"])["value"]
            assert made["code"] == 0, made["output"]
        files, commit = hub.files(REPO), hub.repos[BASE].branches["main"]
        hub.shutdown()
    facts = json.loads(made["stdout"])
    assert (facts["base_model"], facts["base_revision"]) == (BASE, commit)
    expected = {name: tensor_hash(tensor) for name, tensor in merged_state(base, tuned).items()}
    assert expected.items() <= pulled["value"]["state"].items()
    assert refused["code"] == 1
    assert "not the base" in refused["output"]
    assert (tmp_path / "whole" / "tokenizer.json").is_file()
    assert set(files) == {path.name for path in delta.iterdir()} | {"README.md", ".gitattributes"}
    data = ModelCard(files["README.md"].decode()).data
    assert (data.base_model, data.base_model_relation, data.license) == (BASE, "finetune", "apache-2.0")


def test_card_says_what_it_is_and_how_to_get_the_model(folders: tuple[Path, Path, Path]) -> None:
    card = build_card(folders[2], REPO, revision="v2")
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}", revision="v2")' in card
    assert f"eigenprune delta apply {BASE} {REPO} --out model" in card
    assert "as fast as before" in card
    assert "50.0%" in card
    assert build_card(folders[2], REPO, revision="v2") == card
    assert str(folders[2].parent) not in card
    assert "{{" not in card
    assert "\n\n\n" not in card


def test_card_of_a_delta_over_a_local_model_names_no_hub_base(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, _ = folders
    delta_folder(base, tuned, tmp_path / "delta")
    card = build_card(tmp_path / "delta", REPO)
    assert ModelCard(card).data.base_model is None
    assert "set `EIGENPRUNE_BASE`" in card
    assert ModelCard(build_card(tmp_path / "delta", REPO, base_model=BASE)).data.base_model == BASE


def test_names_that_contradict_the_delta_and_results_are_refused(folders: tuple[Path, Path, Path]) -> None:
    with pytest.raises(HubError, match="--base-id"):
        build_card(folders[2], REPO, base_model="org/other")
    with pytest.raises(HubError, match="results"):
        build_card(folders[2], REPO, results=[Path("x.json")])


def test_damaged_delta_is_not_pushed(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, _ = folders
    delta_folder(base, tuned, tmp_path / "delta", base_model=BASE)
    file = tmp_path / "delta" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(Exception, match="SHA256SUMS"):
        push_to_hub(tmp_path / "delta", REPO, token="none")
