# SPDX-License-Identifier: Apache-2.0
"""The model card: what it says is true, and nothing that a file says can change its form (row G15)."""

import getpass
import json
import re
import shlex
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, eval_result_entries_to_yaml
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from eigenprune import PruneReport
from eigenprune.cli.main import app
from eigenprune.errors import CheckpointError, HubError
from eigenprune.hub import build_card, hash_weights, write_card
from eigenprune.hub.eval_results import eval_result_files
from eigenprune.hub.facts import FactoredLayer, read_facts
from eigenprune.hub.measured import read_measured
from eigenprune.hub.picture import rank_picture
from tests.hub.shared import BASE, pruned_folder

REPO = "me/tiny_70"
HOSTILE = (
    "x\n---\nlicense: mit",
    "x: y\n- z",
    "'\"\n...\n",
    "!!python/object/apply:os.system ['true']",
    "*anchor &anchor",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<!-- comment",
    "</code></pre><h1>x</h1>",
    "`code` ``more`` ```\n# heading\n```",
    "# heading\n\n## another",
    "[link](https://example.org) ![image](https://example.org/a.png)",
    "| a | b |\n| --- | --- |",
    "a|b||c",
    "{{ 7 * 7 }} {% for x in y %} {# comment #}",
    "{{ cycler.__init__.__globals__ }}",
    "\u202eevil\u202c \u2066hidden\u2069 \u200b",
    "\x00\x1b[31mred\x07",
    "https://example.org www.example.org @someone #1",
    "'; touch owned; echo '",
    "$(touch owned) `touch owned` \\",
    "x" * 5000,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PruneReport]:
    return pruned_folder(tmp_path_factory.mktemp("card"), "pruned")


@pytest.fixture
def folder(made: tuple[Path, PruneReport], tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return shutil.copytree(made[0], tmp_path / "pruned")


def edit(folder: Path, **provenance: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["provenance"] |= provenance
    path.write_text(json.dumps(config))


def front_matter(card: str) -> dict[str, Any]:
    _, block, _ = card.split("---\n", 2)
    data: dict[str, Any] = yaml.safe_load(block)
    return data


def form(card: str) -> list[str]:
    """The Markdown structure below the front matter, tables and HTML included, without the text in it."""
    tokens = MarkdownIt("commonmark", {"linkify": False}).enable("table").parse(card.split("---\n", 2)[2])
    inner = [child for token in tokens for child in (token.children or [])]
    return [token.type for token in [*tokens, *inner] if token.type not in ("text", "softbreak")]


def test_card_says_what_is_in_the_files(made: tuple[Path, PruneReport]) -> None:
    folder, report = made
    card = build_card(folder, REPO)
    for before, after in (report.model_parameters, report.model_bytes):
        assert f"| {before:,} | {after:,} | {after / before:.3f} |" in card
    factored = [layer for layer in report.layers if layer.layout != "dense"]
    assert f"{len(factored)} weight matrices are\nstored as low-rank factors" in card
    assert f"kept {report.keep:.4f}, removed {1 - report.keep:.4f}" in card
    assert report.calibration["texts_hash"] in card
    assert "was not measured for this card" in card
    assert "import eigenprune\nfrom transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM" in card
    assert f'from_pretrained("{REPO}")' in card
    assert "pip install eigenprune\n" in card


def test_front_matter_has_the_keys_of_the_hub(made: tuple[Path, PruneReport]) -> None:
    data = front_matter(build_card(made[0], REPO, base_model="org/base"))
    assert data == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "language": ["en", "de"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["eigenprune", "low-rank", "svd", "pruned"],
    }
    assert f"| pruned from the local copy | `{BASE}` |" in build_card(made[0], REPO, base_model="org/base")
    assert "base_model" not in front_matter(build_card(made[0], REPO))  # a folder's name is no id on the Hub
    assert ModelCard(build_card(made[0], REPO)).data.license == "apache-2.0"


def test_card_is_the_same_every_time_and_names_nothing_local(made: tuple[Path, PruneReport]) -> None:
    folder = made[0]
    card = write_card(folder, REPO).read_text(encoding="utf-8")
    assert card == build_card(folder, REPO)
    (folder / "README.md").unlink()
    assert "\r" not in card
    for private in (str(folder.parent), str(Path.home()), socket.gethostname()):
        assert private not in card, private
    assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", card)


@pytest.mark.parametrize(
    "field", ["base_model", "source", "texts", "texts_hash", "versions", "base_revision", "base_card"]
)
def test_hostile_value_leaves_keys_and_form_unchanged(field: str, folder: Path) -> None:
    provenance = json.loads((folder / "config.json").read_text())["quantization_config"]["provenance"]
    calibration = provenance["calibration"]
    plain_card = build_card(folder, REPO)
    for value in HOSTILE:
        change: dict[str, Any] = {
            "base_model": {"base_model": value},
            "source": {"calibration": calibration | {"source": value}},
            "texts": {"texts": [value]},
            "texts_hash": {"calibration": calibration | {"texts_hash": value}},
            "versions": {"versions": {**provenance["versions"], value: "1", "torch": value}},
            "base_revision": {"base_revision": value},
            "base_card": {"base_card": dict.fromkeys(("license", "language", "pipeline_tag", "tags", "x"), value)},
        }[field]
        edit(folder, **provenance | change)
        card = build_card(folder, REPO)
        keys = set(front_matter(plain_card)) - ({"license", "language"} if field == "base_card" else set())
        assert set(front_matter(card)) == keys, value
        if field != "base_card":
            assert front_matter(card) == front_matter(plain_card), value
        assert form(card) == form(plain_card), value
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\x00\x1b\x07]", card), value
        if field in ("base_model", "source", "texts_hash") and "7 * 7" in value:
            assert "{{ 7 * 7 }} {% for x in y %}" in card


def test_hostile_skip_pattern_stays_in_its_place(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for value in HOSTILE:
        config["quantization_config"]["skip"] = [value]
        path.write_text(json.dumps(config))
        card = build_card(folder, REPO)
        assert form(card).count("heading_open") == 6
        command = card.split("```sh\n")[2].split("\n```")[0].replace("\\\n", "")
        words = shlex.split(command)
        assert words[:2] == ["eigenprune", "prune"]
        assert words[words.index("--skip") + 2] == "--seed", value


@pytest.mark.parametrize(
    "repo",
    [
        "",
        "name",
        "a/b/c",
        "../b",
        "a/..",
        "/a/b",
        "a/b\n",
        "a\\b",
        "C:/x",
        "a b/c",
        "a/b;c",
        "a/" + "b" * 200,
        "a/.b",
        "a/b.git",
        "a/b--c",
    ],
)
def test_bad_repository_name_is_refused(repo: str, made: tuple[Path, PruneReport]) -> None:
    with pytest.raises(HubError):
        build_card(made[0], repo)
    with pytest.raises(HubError):
        build_card(made[0], REPO, base_model=repo)


@pytest.fixture(scope="module")
def results(made: tuple[Path, PruneReport], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `eigenprune eval --json` says of the base and of the pruned model."""
    folder = made[0]
    scratch = tmp_path_factory.mktemp("results")
    found = {}
    for name, model in (("dense", folder.parent / BASE), ("pruned", folder)):
        command = ["eval", str(model), "--texts", str(folder.parent / "cal.txt"), "--window", "32", "--json", "--quiet"]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        found[name] = scratch / f"{name}.json"
        found[name].write_text(done.stdout[done.stdout.index("{") :])
    return found


def test_results_of_eval_come_into_table_and_front_matter(
    made: tuple[Path, PruneReport], results: dict[str, Path]
) -> None:
    card = build_card(made[0], REPO, results=results.values())
    dense, pruned = (json.loads(results[name].read_text()) for name in ("dense", "pruned"))
    ratio = pruned["perplexity"] / dense["perplexity"]
    assert f"| perplexity, `cal.txt` | {dense['perplexity']:.3f} | {pruned['perplexity']:.3f} | {ratio:.3f} |" in card
    assert f"{pruned['tokens']:,} tokens predicted in windows of 32" in card
    result, elsewhere = front_matter(card)["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "perplexity", "value": round(pruned["perplexity"], 4)}]
    dense, pruned = dense["other_domain"], pruned["other_domain"]
    ratio = pruned["perplexity"] / dense["perplexity"]
    assert (
        f"| perplexity, `python-docs` | {dense['perplexity']:.3f} | {pruned['perplexity']:.3f} | {ratio:.3f} |" in card
    )
    assert elsewhere["metrics"] == [{"type": "perplexity", "value": round(pruned["perplexity"], 4)}]
    assert "not measured |" in build_card(made[0], REPO, results=[results["pruned"]])


def test_result_on_a_data_set_of_the_hub_becomes_a_file_as_its_library_writes_it(
    made: tuple[Path, PruneReport], results: dict[str, Path], tmp_path: Path
) -> None:
    facts = read_facts(made[0])
    assert eval_result_files(read_measured(results.values(), facts)) == {}  # of any other text there is none
    named = tmp_path / "named.json"
    result = json.loads(results["pruned"].read_text())
    named.write_text(json.dumps(result | {"dataset": "Salesforce/wikitext", "task_id": "yes"}))
    ((path, content),) = eval_result_files(read_measured([named], facts)).items()
    assert path == ".eval_results/eigenprune-Salesforce_wikitext-yes.yaml"
    notes = f"perplexity, {result['tokens']} tokens predicted in windows of 32"
    entry = EvalResultEntry("Salesforce/wikitext", "yes", round(result["perplexity"], 4), notes=notes)
    assert yaml.safe_load(content) == eval_result_entries_to_yaml([entry])
    for change in ({"dataset": "wikitext"}, {"dataset": "a/b/../c"}, {"task_id": "x\ny"}, {"task_id": None}):
        named.write_text(json.dumps(result | {"dataset": "me/texts", "task_id": "all"} | change))
        with pytest.raises(CheckpointError, match="is no"):
            read_measured([named], facts)


def test_eval_notes_the_data_set_and_refuses_half_a_name(made: tuple[Path, PruneReport]) -> None:
    texts = ["--texts", str(made[0].parent / "cal.txt"), "--window", "32", "--windows", "2", "--json", "--quiet"]
    done = CliRunner().invoke(app, ["eval", str(made[0]), *texts, "--dataset", "me/texts", "--task-id", "all"])
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert (found["dataset"], found["task_id"]) == ("me/texts", "all")
    for half in (["--dataset", "me/texts"], ["--task-id", "all"], ["--dataset", "texts", "--task-id", "all"]):
        done = CliRunner().invoke(app, ["eval", str(made[0]), *texts, *half])
        assert done.exit_code == 1
        assert "is no" in done.output


def test_another_version_of_the_other_domain_is_no_mistake_and_a_damaged_one_is(
    made: tuple[Path, PruneReport], results: dict[str, Path], tmp_path: Path
) -> None:
    older = json.loads(results["dense"].read_text())
    older["other_domain"]["token_hash"] = "ab" * 32
    (tmp_path / "older.json").write_text(json.dumps(older))
    texts, elsewhere = read_measured([tmp_path / "older.json", results["pruned"]], read_facts(made[0]))
    assert (texts.texts, texts.dense) == (("cal.txt",), older["perplexity"])
    assert (elsewhere.texts, elsewhere.dense) == (("python-docs",), None)
    for change in ({"perplexity": "1"}, {"perplexity": 0.5}, {"token_hash": None}, {"text": 1}):
        damaged = older | {"other_domain": older["other_domain"] | change}
        (tmp_path / "older.json").write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError, match="is no result"):
            read_measured([tmp_path / "older.json"], read_facts(made[0]))


def task_result(made: tuple[Path, PruneReport], results: dict[str, Path], name: str, **change: Any) -> dict[str, Any]:
    """What `eigenprune eval --tasks tiny --json` says, without text."""
    result = json.loads(results[name].read_text())
    entry: dict[str, Any] = {"task": "tiny", "version": "1.0", "shots": 0, "items": 40, "items_hash": "ab" * 32}
    entry |= {"scores": {"acc": 0.5 if name == "pruned" else 0.55}, "intervals": {"acc": [0.35, 0.65]}}
    about = {key: result[key] for key in ("parameters", "factored_layers", "weights")}
    return about | {"tasks": [entry | change]}


def test_scores_in_tasks_come_into_the_table_beside_those_of_the_dense_model(
    made: tuple[Path, PruneReport], results: dict[str, Path], tmp_path: Path
) -> None:
    files = [tmp_path / "dense.json", tmp_path / "pruned.json"]
    for file in files:
        file.write_text(json.dumps(task_result(made, results, file.stem)))
    card = build_card(made[0], REPO, results=files)
    assert "| `tiny`, `acc` | 0.550 | 0.500 | -5.0 points |" in card
    assert "40 items, 0-shot, version `1.0` of lm-eval, 95 % from 0.350 to 0.650, hash of the items `abababab" in card
    assert "was not measured for this card" not in card
    assert "Perplexity predicts" not in card
    both = build_card(made[0], REPO, results=[*files, *results.values()])
    assert "| perplexity, `cal.txt` |" in both
    assert "-5.0 points |" in both
    assert "| `tiny`, `acc` | not measured | 0.500 |  |" in build_card(made[0], REPO, results=files[1:])


@pytest.mark.parametrize(
    "change",
    [
        {"task": "a|b"},
        {"task": "x](http://y)"},
        {"scores": {"acc": "0.5"}},
        {"scores": {"<b>": 0.5}},
        {"scores": {"acc": float("nan")}},
        {"scores": None},
        {"items": -1},
        {"items": True},
        {"items_hash": "x"},
        {"intervals": {"acc": [0]}},
        {"intervals": None},
        {"version": 1},
    ],
)
def test_task_result_that_is_not_one_is_refused(
    change: dict[str, Any], made: tuple[Path, PruneReport], results: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "odd.json"
    file.write_text(json.dumps(task_result(made, results, "pruned", **change)))
    with pytest.raises(CheckpointError, match=r"no result of this version's.*tasks"):
        build_card(made[0], REPO, results=[file])


def test_task_result_of_another_model_or_other_items_is_refused(
    made: tuple[Path, PruneReport], results: dict[str, Path], tmp_path: Path
) -> None:
    other, dense, pruned = (tmp_path / f"{name}.json" for name in ("other", "dense", "pruned"))
    other.write_text(json.dumps(task_result(made, results, "pruned") | {"weights": "0" * 64}))
    with pytest.raises(CheckpointError, match="another model"):
        build_card(made[0], REPO, results=[other])
    dense.write_text(json.dumps(task_result(made, results, "dense", items_hash="cd" * 32)))
    pruned.write_text(json.dumps(task_result(made, results, "pruned")))
    with pytest.raises(CheckpointError, match="same items"):
        build_card(made[0], REPO, results=[dense, pruned])


@pytest.mark.parametrize(
    ("which", "change", "says"),
    [
        ("pruned", {"weights": "0" * 64}, "another model"),
        ("pruned", {"weights": None}, "another model"),
        ("dense", {"parameters": 5}, "another model"),
        ("dense", {"token_hash": "0" * 64}, "same tokens"),
        ("pruned", {"perplexity": "20"}, "no result"),
        ("pruned", {"perplexity": "Infinity"}, "no result"),
        ("pruned", {"perplexity": float("nan")}, "no result"),
        ("pruned", {"texts": [1]}, "no result"),
    ],
)
def test_result_that_does_not_belong_is_refused(
    which: str,
    change: dict[str, Any],
    says: str,
    made: tuple[Path, PruneReport],
    results: dict[str, Path],
    tmp_path: Path,
) -> None:
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(json.loads(results[which].read_text()) | change))
    other = results["dense" if which == "pruned" else "pruned"]
    with pytest.raises(CheckpointError, match=says):
        build_card(made[0], REPO, results=[changed, other])


def test_command_in_the_card_rebuilds_the_weight_files(
    made: tuple[Path, PruneReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made[0]
    shutil.copytree(folder.parent / BASE, tmp_path / BASE)
    shutil.copy(folder.parent / "cal.txt", tmp_path)
    card = build_card(folder, REPO)
    assert "This command rebuilds it, given the folder of the base model and the calibration texts:" in card
    words = shlex.split(card.split("```sh\n")[2].split("\n```")[0].replace("\\\n", ""))
    assert words[words.index("--seed") + 1] == "0"
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*words[1:], "--quiet"])
    assert done.exit_code == 0, done.output
    assert hash_weights(tmp_path / "rebuilt") == hash_weights(folder)
    assert f"{read_facts(folder).files['model.safetensors']}  model.safetensors" in card


def test_no_command_where_none_can_rebuild(folder: Path) -> None:
    provenance = json.loads((folder / "config.json").read_text())["quantization_config"]["provenance"]
    del provenance["texts"]
    edit(folder, texts=None, calibration=provenance["calibration"] | {"source": "texts given by the caller"})
    card = build_card(folder, REPO)
    assert "no command rebuilds it" in card
    assert "eigenprune prune" not in card


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("dense", "no model pruned by eigenprune"),
        ("no weights", "holds no model.safetensors"),
        ("cut", "cut short"),
        ("rank", "with rank"),
        ("index outside", "no safetensors file beside it"),
        ("index missing", "not there"),
        ("keep", "of the parameters were kept"),
    ],
)
def test_folder_that_contradicts_itself_gets_no_card(damage: str, says: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if damage == "dense":
        del config["quantization_config"]
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "rank":
        config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"][1] += 1
    elif damage == "index outside":
        index.write_text(json.dumps({"weight_map": {"a": "../pruned/model.safetensors"}}))
    elif damage == "index missing":
        index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    else:
        config["quantization_config"]["provenance"]["keep"] = "0.5\n# x"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        build_card(folder, REPO)


def test_picture_has_a_mark_for_each_block() -> None:
    layers = [FactoredLayer(f"h.{i}.attn.q", (64, 64), "pair", rank) for i, rank in ((0, 4), (1, 16), (3, 31))]
    layers.append(FactoredLayer("h.2.mlp.up", (64, 128), "pivot", 8))
    assert rank_picture(layers).splitlines() == [
        "attn.q  ▁▄█▇  rank 4 to 31 of 64",
        "mlp.up  ██▂█  rank 8 of 64",
    ]
    assert rank_picture([]) == ""


def test_command_line_writes_and_prints_the_card(folder: Path) -> None:
    printed = CliRunner().invoke(app, ["card", str(folder), REPO, "--stdout"])
    assert (printed.exit_code, printed.stdout) == (0, build_card(folder, REPO))
    assert not (folder / "README.md").exists()
    assert CliRunner().invoke(app, ["card", str(folder), REPO]).exit_code == 0
    assert (folder / "README.md").read_text(encoding="utf-8") == build_card(folder, REPO)
    refused = CliRunner().invoke(app, ["card", str(folder), "no-owner"])
    assert refused.exit_code == 1
    assert CliRunner().invoke(app, ["card", str(folder)]).exit_code == 1


def check(folder: Path, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["card", str(folder), "--check", "--quiet", "--json", *options])
    return done.exit_code, done.output


def test_check_rebuilds_and_finds_a_single_changed_bit(made: tuple[Path, PruneReport], folder: Path) -> None:
    scratch = made[0].parent
    given = ["--base", str(scratch / BASE), "--texts", str(scratch / "cal.txt")]
    code, output = check(folder, *given)
    assert code == 0, output
    assert '"same": true' in output
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, output = check(folder, *given)
    assert code == 1
    assert '"differing": 1,' in output


def test_check_without_the_right_texts_says_so(made: tuple[Path, PruneReport], folder: Path, tmp_path: Path) -> None:
    base = ["--base", str(made[0].parent / BASE)]
    assert "cal.txt" in check(folder, *base)[1]
    (tmp_path / "cal.txt").write_text("another text. " * 300)
    code, output = check(folder, *base, "--texts", str(tmp_path / "cal.txt"))
    assert code == 1
    assert "are not those" in " ".join(output.split())
