# SPDX-License-Identifier: Apache-2.0
"""What may leave: names on the closed list, no secret, nothing that names this user or machine (rows G11, G12, G14)."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from eigenprune import push_to_hub
from eigenprune.errors import CheckpointError, HubError
from eigenprune.hub.names import ALLOWED, check_revision
from eigenprune.hub.outgoing import collect
from eigenprune.hub.scan import refuse_secrets
from tests.hub.shared import pruned_folder

# Assembled here, so that no search for secrets stops at this file.
LETTERS = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7cF0"
SECRETS = {
    "Hugging Face token": "hf_" + LETTERS + "abcd",
    "GitHub token": "ghp_" + LETTERS + "abcdef",
    "GitHub fine-grained token": "github_" + "pat_" + LETTERS,
    "GitLab token": "glpat-" + LETTERS[:20],
    "AWS key": "AKIA" + "ABCDEFGH" * 2,
    "API key": "sk-" + "proj-" + LETTERS,
    "Google key": "AIza" + LETTERS + "abcde",
    "Slack token": "xoxb-" + "123456789012-abcdef",
    "JSON web token": "eyJ" + LETTERS + ".eyJ" + LETTERS + "." + LETTERS,
    "private key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "authorization header": "Authorization: Bearer " + LETTERS,
    "URL with a password": "https://someone:" + LETTERS + "@example.org/x",
    "home folder": "/home/someone/models/x",
    "home folder on a Mac": "/Users/someone/models/x",
    "home folder of root": "/root/models",
    "home folder on Windows": "C:\\Users\\someone\\models",
    "user name": "made by jane.doe-42 on a Friday",
    "machine name": "made on big-box-7.example",
    "working folder": "{cwd}/x",
    "token in use": "not-shaped-like-a-token",
}
FILES = ("README.md", "config.json", "generation_config.json", "prune_report.json")


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user, a machine and a working folder with names of their own."""
    monkeypatch.setenv("LOGNAME", "jane.doe-42")
    monkeypatch.setattr("platform.node", lambda: "big-box-7.example")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", SECRETS)
def test_planted_secret_stops_the_push_and_is_not_repeated(kind: str, name: str, identity: Path) -> None:
    secret = SECRETS[kind].replace("{cwd}", str(identity))
    value = {"a": "x" * 50, "note": [f"text {secret} text"]}
    content = json.dumps(value, indent=1) if name.endswith("json") else f"# card\n\ntext {secret} text\n"
    with pytest.raises(HubError, match=name.replace(".", "[.]") + ", line [34]") as caught:
        refuse_secrets({name: content.encode()}, tokens=["not-shaped-like-a-token"])
    assert secret not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in SECRETS if "name" not in kind and "working" not in kind])
def test_secret_in_a_vocabulary_or_template_stops_it_too(kind: str, identity: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "merges.txt"):
        content = json.dumps({"x": SECRETS[kind]}) if name.endswith("json") else SECRETS[kind]
        with pytest.raises(HubError, match="nothing was sent"):
            refuse_secrets({name: content.encode()}, tokens=["not-shaped-like-a-token"])


def test_escapes_of_json_hide_nothing(identity: Path) -> None:
    token = SECRETS["Hugging Face token"]
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in token)
    with pytest.raises(HubError, match=r"Hugging Face token in config\.json"):
        refuse_secrets({"config.json": b'{"a": "' + escaped.encode() + b'"}'})


def test_path_that_exists_here_is_found_in_what_is_written_about_the_run(identity: Path) -> None:
    with pytest.raises(HubError, match=r"a path on this machine in config\.json"):
        refuse_secrets({"config.json": json.dumps({"_name_or_path": str(identity.parent)}).encode()})


def test_ordinary_files_pass(identity: Path) -> None:
    ordinary = {
        "README.md": b"me/jane and https://example.org/home/x, see /usr/bin/env; ghp_ and hf_ are prefixes",
        "config.json": b'{"dtype": "float32", "model_type": "llama", "hash": "' + b"0123456789abcdef" * 4 + b'"}',
        "tokenizer.json": json.dumps(
            {"vocab": {"/home": 1, "/root": 2, "sk": 3, "Users": 4, "jane.doe-42": 5}}
        ).encode(),
    }
    refuse_secrets(ordinary, tokens=["not-shaped-like-a-token"])
    refuse_secrets({"README.md": b"from jane.doe-42/model"}, published=["jane.doe-42/model"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned_folder(tmp_path_factory.mktemp("scan"), "pruned", max_shard_size="60KB")[0]


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return shutil.copytree(made, tmp_path / "pruned")


def test_real_pruned_folder_is_found_clean_and_whole(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outgoing = collect(folder)
    assert outgoing.texts.keys() | outgoing.weights.keys() == {path.name for path in folder.iterdir()}
    refuse_secrets(outgoing.texts)


HOSTILE_NAMES = (
    *("../config.json", "a/../../config.json", "a/..", "..", "/config.json", "/etc/passwd", "C:config.json"),
    *("C:/config.json", "//server/share/config.json", "\\config.json", "..\\config.json", "a\\..\\config.json"),
    *("config.json\0", "config.json\n", "config.json.", "config.json ", " config.json", "x" * 300 + ".json", ""),
    *("config\u2024json", "\u2215config.json", "a\uff0fconfig.json", ".git/config", ".git/hooks/pre-commit"),
    *("con", "nul.json", "CONFIG.JSON", "config.json/x", "model-00001-of-00002.safetensors\n"),
    "model-\u0661\u0661\u0661\u0661\u0661-of-00002.safetensors",
    *("additional_chat_templates/../x.jinja", "additional_chat_templates/.jinja", "modeling_x.py", ".env", "id_rsa"),
    *("pytorch_model.bin", "model.pkl", "training_args.bin", "optimizer.pt"),
)
NO_GIT_NAMES = (
    "refs/heads/main",
    "refs/pr/1",
    "a.lock",
    "a b",
    "-x",
    "a..b",
    "a~1",
    "a^",
    "a:b",
    "a//b",
    "a/",
    "a@{1}",
)


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=repr)
def test_name_off_the_list_is_no_name_of_a_file_branch_or_weight(name: str, folder: Path) -> None:
    assert not ALLOWED.fullmatch(name)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["x"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"index\.json names"):
        collect(folder)


@pytest.mark.parametrize("name", [*HOSTILE_NAMES[:24], *NO_GIT_NAMES], ids=repr)
def test_bad_branch_name_is_refused(name: str) -> None:
    with pytest.raises(HubError, match="branch"):
        check_revision(name)


@pytest.mark.parametrize("name", ["main", "keep80", "v1.0", "feature/a_b-c"])
def test_good_branch_name_passes(name: str) -> None:
    check_revision(name)


def test_unlisted_files_stay_behind_with_a_warning(folder: Path) -> None:
    (folder / "modeling_x.py").write_text("print('x')")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / ".env").write_text("SECRET=1")
    (folder / "sub").mkdir()
    (folder / "sub" / "config.json").write_text("{}")
    with pytest.warns(UserWarning, match="3 files are not published") as caught:
        outgoing = collect(folder)
    assert ".env" not in str(caught[0].message)
    assert not {"modeling_x.py", "pytorch_model.bin", ".env", "sub/config.json"} & outgoing.texts.keys()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model-00001-of-00004.safetensors"])
def test_link_out_of_the_folder_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    name = name if name in names else next(n for n in names if n.endswith(".safetensors"))
    shutil.move(folder / name, tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(HubError, match="link out of the folder"):
        collect(folder)


def test_notes_in_a_weight_header_are_refused_before_anything_is_sent(folder: Path) -> None:
    weights = next(folder.glob("*.safetensors"))
    save_file(load_file(weights), weights, {"format": "pt", "note": SECRETS["Hugging Face token"]})
    with pytest.raises(CheckpointError, match="notes in its header"):
        push_to_hub(folder, "me/x")


def test_push_of_what_is_no_pruned_model_is_refused_before_anything_is_sent(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no model pruned"):
        push_to_hub(folder, "me/x")
    with pytest.raises(CheckpointError, match="no folder"):
        push_to_hub(tmp_path / "nowhere", "me/x")
    with pytest.raises(HubError, match="model in memory"):
        push_to_hub(folder, "me/x", tokenizer=object())


def test_push_without_network_says_so(made: Path) -> None:
    with pytest.raises(HubError, match=r"was not pushed; .*OfflineMode"):
        push_to_hub(made, "me/x", token="x" * 20)
