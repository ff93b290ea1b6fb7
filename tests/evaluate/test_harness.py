# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-eval on tiny models: our way against sums of log probabilities written out, and against lm-eval alone."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from eigenprune import EigenpruneConfig, prune_, save_model
from eigenprune.errors import CalibrationError, ConfigError
from eigenprune.evaluate import harness as hook
from tests.helpers.tiny_models import saved_dense, tiny_model, tiny_tokenizer, token_windows

REPOSITORY = Path(__file__).resolve().parents[2]
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install '.[lm-eval]'"
)
ITEMS = [
    {"question": f"{a} and {b}", "choices": [f"{a + b}", f"{a}{b}{b}", "x" * (1 + b % 5)], "label": (a * b) % 3}
    for a in range(1, 6)
    for b in range(3, 9)
]
TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    validation: data/items.jsonl
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{question}} is"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3.0
"""
# Goes over lm-eval's own ARC, as task files for offline work do.
GROUP = """\
group: tiny_group
task:
  - task: arc_easy
    dataset_path: json
    dataset_name: null
    training_split: null
    validation_split: null
    dataset_kwargs:
      data_files:
        test: data/arc.jsonl
"""


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tasks/*.yaml`, whose data lies in `data/` beside their folder."""
    root = tmp_path_factory.mktemp("harness")
    (root / "tasks").mkdir()
    (root / "data").mkdir()
    (root / "tasks" / "tiny.yaml").write_text(TASK)
    (root / "tasks" / "group.yaml").write_text(GROUP)
    (root / "data" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    arc = [
        {"question": item["question"], "choices": {"text": item["choices"], "label": list("ABC")}, "answerKey": "B"}
        for item in ITEMS
    ]
    (root / "data" / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in arc))
    return root / "tasks"


@pytest.fixture(scope="module")
def pruned() -> PreTrainedModel:
    model = tiny_model("llama")
    prune_(model, EigenpruneConfig(keep=0.6), windows=token_windows(), progress=False)
    return model


def answers_written_out(model: PreTrainedModel, items: list[dict[str, Any]], prompt: str) -> dict[str, list[int]]:
    """Which items are right, by the log probability of each choice, and by that divided by its bytes."""
    tokenizer = tiny_tokenizer()
    found: dict[str, list[int]] = {"acc": [], "acc_norm": []}
    for item in items:
        context = tokenizer(prompt.format(**item))["input_ids"]
        sums = []
        for choice in item["choices"]:
            ids = context + tokenizer(" " + choice)["input_ids"]
            with torch.no_grad():
                rows = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(rows[at - 1, ids[at]]) for at in range(len(context), len(ids))))
        by_byte = [value / len(choice) for value, choice in zip(sums, item["choices"], strict=True)]
        found["acc"].append(int(sums.index(max(sums)) == item["label"]))
        found["acc_norm"].append(int(by_byte.index(max(by_byte)) == item["label"]))
    return found


@needs_lm_eval
@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_those_of_log_probabilities_written_out(
    batch_size: int, task_files: Path, pruned: PreTrainedModel
) -> None:
    tasks = hook.load_tasks(["tiny_choice"], task_files=task_files, progress=False)
    (score,) = hook.run_tasks(pruned, tiny_tokenizer(), tasks, limit=25, batch_size=batch_size, progress=False)
    expected = answers_written_out(pruned, ITEMS[:25], "{question} is")
    assert score.answers == expected
    assert 0 < sum(expected["acc"]) < 25  # else anything would pass
    assert (score.task, score.items, score.shots, score.version) == ("tiny_choice", 25, 0, "3.0")
    for metric, answers in expected.items():
        share = sum(answers) / 25
        assert score.scores[metric] == pytest.approx(share)
        assert score.stderr[metric] == pytest.approx((share * (1 - share) / 24) ** 0.5)
        low, high = score.intervals[metric]
        assert low < share < high


@needs_lm_eval
def test_entry_of_a_group_goes_over_lm_evals_own_task(task_files: Path, pruned: PreTrainedModel) -> None:
    """The prompt is lm-eval's, the items are ours; asked by the group's name or by the task's, it is the same."""
    alone = hook.load_tasks(["arc_easy"], task_files=task_files, progress=False)
    group = hook.load_tasks(["tiny_group"], task_files=task_files, progress=False)
    assert list(alone) == list(group) == ["arc_easy"]
    found = [hook.run_tasks(pruned, tiny_tokenizer(), tasks, progress=False)[0] for tasks in (alone, group)]
    assert found[0].items_hash == found[1].items_hash
    assert found[0].answers == found[1].answers
    items = [item | {"label": 1} for item in ITEMS]
    assert found[0].answers == answers_written_out(pruned, items, "Question: {question}\nAnswer:")


@needs_lm_eval
def test_hash_of_items_tells_items_and_prompts_apart(task_files: Path, pruned: PreTrainedModel) -> None:
    tasks = hook.load_tasks(["tiny_choice"], task_files=task_files, progress=False)

    def hash_of(model: PreTrainedModel, limit: int) -> str:
        return hook.run_tasks(model, tiny_tokenizer(), tasks, limit=limit, progress=False)[0].items_hash

    assert hash_of(pruned, 5) == hash_of(tiny_model("qwen2"), 5)
    assert hash_of(pruned, 5) != hash_of(pruned, 6)


@needs_lm_eval
def test_missing_data_and_unknown_names_say_what_to_do(task_files: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no_such_task"):
        hook.load_tasks(["no_such_task"], task_files=task_files, progress=False)
    with pytest.raises(ConfigError, match="no folder with task files"):
        hook.load_tasks(["arc_easy"], task_files=tmp_path, progress=False)
    with pytest.raises(CalibrationError, match=r"winogrande.*task_files"):
        hook.load_tasks(["winogrande"], progress=False)  # its data is on the Hub, and the tests are offline
    (tmp_path / "broken.yaml").write_text(TASK.replace("items.jsonl", "none.jsonl"))
    with pytest.raises(CalibrationError, match=r"none\.jsonl"):
        hook.load_tasks(["tiny_choice"], task_files=tmp_path, progress=False)
    with pytest.raises(ConfigError, match="writes no text"):
        hook.run_tasks(tiny_model("bert"), tiny_tokenizer(), {}, progress=False)


def test_without_lm_eval_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"eigenprune\[lm-eval\]"):
        hook.load_tasks(["arc_easy"])


def installed_metadata(folder: Path) -> Path:
    """What pip would write, so that the entry point is there however this checkout is installed."""
    metadata = folder / "eigenprune-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: eigenprune\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\neigenprune = _eigenprune_autoload:register\n")
    return folder


@needs_lm_eval
def test_plain_lm_eval_runs_a_pruned_folder(task_files: Path, pruned: PreTrainedModel, tmp_path: Path) -> None:
    """lm-eval's own command, which knows nothing of this package, finds it by its entry point."""
    folder = save_model(pruned, tmp_path / "pruned", tokenizer=tiny_tokenizer())
    paths = [installed_metadata(tmp_path / "site"), REPOSITORY]
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32"]
    command += ["--tasks", "tiny_choice", "--include_path", str(task_files), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HOME": str(tmp_path / "home")},
        cwd=task_files.parent,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(file.read_text())["results"]["tiny_choice"]
    expected = answers_written_out(pruned, ITEMS, "{question} is")
    assert scores["acc,none"] == pytest.approx(sum(expected["acc"]) / len(ITEMS))
    assert scores["acc_norm,none"] == pytest.approx(sum(expected["acc_norm"]) / len(ITEMS))


@needs_lm_eval
def test_command_line_gives_scores_with_intervals(task_files: Path, tmp_path: Path) -> None:
    dense = saved_dense("llama", tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("a matrix of low rank " * 20)
    command = [sys.executable, "-m", "eigenprune.cli", "eval", str(dense), "--texts", str(text), "--window", "32"]
    command += ["--tasks", "tiny_choice", "--task-files", str(task_files), "--limit", "9", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    (task,) = result["tasks"]
    assert (task["items"], len(task["answers"]["acc"]), len(task["intervals"]["acc"])) == (9, 9, 2)
    assert task["answers"] == answers_written_out(tiny_model("llama"), ITEMS[:9], "{question} is")
    assert result["perplexity"] > 1
