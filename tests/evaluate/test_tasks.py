# SPDX-License-Identifier: Apache-2.0
"""Tasks: made rows, the literal templates, files of anyone, divisions that do not overlap."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from eigenprune.errors import CalibrationError, ConfigError
from eigenprune.evaluate.task_rows import TaskRow
from eigenprune.evaluate.tasks import SPLITS, TASKS, find_task
from tests.helpers.tiny_models import tiny_tokenizer


def jsonl(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def only_row(name: str, row: dict[str, Any], folder: Path) -> TaskRow:
    """A file of one row four times: two are the test, and one of the others is what we look at."""
    data = jsonl(folder / "rows.jsonl", [row] * 4)
    rows = find_task(name, data).rows("train")
    assert len(set(rows)) == 1
    return rows[0]


@pytest.mark.parametrize(
    ("name", "sizes", "sign", "result"),
    [
        ("int-sum", (6400, 1600, 2000), "+", lambda a, b: a + b),
        ("int-mult", (256, 64, 80), "x", lambda a, b: a * b),
    ],
)
def test_made_tasks_are_all_pairs_once_and_right(name: str, sizes: tuple[int, ...], sign: str, result: Any) -> None:
    rows = [find_task(name).rows(split) for split in SPLITS]
    assert tuple(map(len, rows)) == sizes
    everything = [row for part in rows for row in part]
    assert len({row.prompt for row in everything}) == len(everything)
    for row in everything:
        first, operator, second, equals = row.prompt.split(" ")
        assert (operator, equals) == (sign, "=")
        assert row.answer == f" {result(int(first), int(second))}"


def test_division_is_drawn_by_its_seed_and_the_test_does_not_depend_on_the_held_out_part() -> None:
    task = find_task("int-mult")
    assert task.rows("test") == task.rows("test")
    assert task.rows("test", held_out=0.5) == task.rows("test")
    assert task.rows("test", seed=1) != task.rows("test")
    firsts = {int(row.prompt.split(" ")[0]) for row in task.rows("train")[:40]}
    assert len(firsts) > 10  # an even sample from the start on, not the table's first rows


def test_cb_template_is_the_released_one(tmp_path: Path) -> None:
    row = only_row("cb", {"premise": "It rains.", "hypothesis": "it is wet", "label": 2, "idx": 0}, tmp_path)
    assert row.prompt == (
        "Premise: It rains.\n\nHypothesis: it is wet\n\n"
        "Does the premise entail, contradict or is neutral to the hypothesis?\n"
        "Answer (entails, contradicts, is neutral): The premise"
    )
    assert (row.answer, row.choices) == (" is neutral", (" entails", " contradicts", " is neutral"))


def test_rte_template_is_the_released_one(tmp_path: Path) -> None:
    row = only_row("rte", {"premise": "It rains.", "hypothesis": "It is dry.", "label": 1, "idx": 0}, tmp_path)
    assert row.prompt == (
        "Premise: It rains.\n\nHypothesis: It is dry.\n\n"
        "Does the premise entail or contradict to the hypothesis?\n"
        "Answer (entails or contradicts): The premise"
    )
    assert (row.answer, row.choices) == (" contradicts", (" entails", " contradicts"))


@pytest.mark.parametrize(
    ("question", "asked"), [("cause", "What was the cause of this?"), ("effect", "What happened as a result?")]
)
def test_copa_template_is_the_released_one(question: str, asked: str, tmp_path: Path) -> None:
    value = {"premise": "It rained.", "choice1": "Wet.", "choice2": "Dry.", "question": question, "label": 0}
    row = only_row("copa", value, tmp_path)
    assert row.prompt == (
        f"Premise: It rained.\n{asked}\n\nAlternative 1: Wet.\nAlternative 2: Dry.\n\n"
        "What is the correct alternative?\nThe correct alternative is alternative"
    )
    assert (row.answer, row.choices) == (" 1", (" 1", " 2"))


def test_arithmetic_answer_is_that_of_the_key(tmp_path: Path) -> None:
    value = {
        "question": "Calculate 7 - 88 =",
        "choices": {"text": ["-80", "81", "-82", "-81"], "label": ["A", "B", "C", "D"]},
        "answerKey": "D",
    }
    row = only_row("basic-arithmetic", value, tmp_path)
    assert row == TaskRow("Calculate 7 - 88 =", " -81", (" -80", " 81", " -82", " -81"))


def test_anyones_file_is_a_task_by_its_path(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{i}:", "answer": f" {i}"} for i in range(9)]
    rows.append({"prompt": "Which?", "answer": 1, "choices": [" a", " b"]})
    for name in ("own.jsonl", "own.jsonl.gz"):
        task = find_task(str(jsonl(tmp_path / name, rows)))
        parts = {split: task.rows(split) for split in SPLITS}
        assert {split: len(part) for split, part in parts.items()} == {"train": 6, "held_out": 2, "test": 2}
        found = {row for part in parts.values() for row in part}
        assert TaskRow("Which?", " b", (" a", " b")) in found
        assert len(found) == 10
        assert task.name == "own"


def test_folder_with_a_file_for_the_test_keeps_it_whole(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl.gz", [{"prompt": f"t{i}", "answer": " a"} for i in range(10)])
    jsonl(tmp_path / "validation.jsonl", [{"prompt": f"v{i}", "answer": " a"} for i in range(5)])
    jsonl(tmp_path / "test.jsonl", [{"prompt": "no label here"}])
    task = find_task("cb", tmp_path)
    task = type(task)("mine", "", data=tmp_path)
    assert {row.prompt for row in task.rows("test")} == {f"v{i}" for i in range(5)}
    assert len(task.rows("train")) == 8
    assert {row.prompt[0] for row in task.rows("train") + task.rows("held_out")} == {"t"}


def test_examples_are_the_rows_in_tokens_and_a_limit_takes_the_first() -> None:
    """The tiny vocabulary has one token a character."""
    tokenizer, task = tiny_tokenizer(), find_task("int-mult")
    rows, examples = task.rows("test"), task.examples(tokenizer, "test", limit=7)
    assert len(examples) == 7
    for row, example in zip(rows, examples, strict=False):
        assert example.prompt == tuple(map(ord, row.prompt))
        assert example.answer == tuple(map(ord, row.answer))


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("mine", {"prompt": "a"}, "'answer'"),
        ("mine", {"answer": "a"}, "'prompt'"),
        ("mine", {"prompt": "a", "answer": "  "}, "empty"),
        ("mine", {"prompt": "a", "answer": "c", "choices": ["a", "b"]}, "none of the 2 choices"),
        ("mine", {"prompt": "a", "answer": 2, "choices": ["a", "b"]}, "counted from 0"),
        ("mine", {"prompt": "a", "answer": True, "choices": ["a", "b"]}, "'answer'"),
        ("mine", {"prompt": "a", "answer": "a", "choices": ["a", "a"]}, "the same"),
        ("mine", {"prompt": "a", "answer": "a", "choices": "ab"}, "list of strings"),
        ("mine", ["a"], "no JSON object"),
        ("cb", {"premise": "a", "hypothesis": "b"}, "'label'"),
        ("cb", {"premise": "a", "hypothesis": "b", "label": -1}, "validation set"),
        ("cb", {"premise": "a", "label": 1}, "'hypothesis'"),
        ("copa", {"premise": "a", "choice1": "b", "choice2": "c", "question": "why", "label": 0}, "cause nor effect"),
        ("basic-arithmetic", {"question": "1 + 1 =", "choices": {"text": ["2"], "label": []}, "answerKey": "A"}, "one"),
        (
            "basic-arithmetic",
            {"question": "1 + 1 =", "choices": {"text": ["2"], "label": ["A"]}, "answerKey": "B"},
            "none of",
        ),
    ],
)
def test_bad_row_is_named_by_its_line(name: str, row: Any, says: str, tmp_path: Path) -> None:
    good = {
        "mine": {"prompt": "a", "answer": "b"},
        "cb": {"premise": "a", "hypothesis": "b", "label": 0},
        "copa": {"premise": "a", "choice1": "b", "choice2": "c", "question": "cause", "label": 0},
        "basic-arithmetic": {"question": "1 =", "choices": {"text": ["1"], "label": ["A"]}, "answerKey": "A"},
    }[name]
    path = jsonl(tmp_path / "rows.jsonl", [good, good, row])
    task = find_task(str(path)) if name == "mine" else find_task(name, path)
    with pytest.raises(CalibrationError, match="line 3") as error:
        task.rows("train")
    assert says in str(error.value)


def test_unknown_task_names_the_known_ones_and_files() -> None:
    with pytest.raises(ConfigError) as error:
        find_task("int-sums")
    assert all(name in str(error.value) for name in (*TASKS, ".jsonl"))


def test_missing_superfluous_and_empty_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="--data"):
        find_task("cb")
    with pytest.raises(ConfigError, match="takes no data"):
        find_task("int-sum", tmp_path)
    with pytest.raises(ConfigError, match="takes no data"):
        find_task("rows.jsonl", tmp_path)
    with pytest.raises(CalibrationError, match=r"holds no train\.jsonl"):
        find_task("cb", tmp_path).rows("test")
    with pytest.raises(CalibrationError, match="no text file at"):
        find_task(str(tmp_path / "none.jsonl")).rows("test")
    with pytest.raises(CalibrationError, match="holds no row"):
        find_task(str(jsonl(tmp_path / "empty.jsonl", []))).rows("test")
    with pytest.raises(ConfigError, match="held_out"):
        find_task("int-sum").rows("valid")
    with pytest.raises(ConfigError, match="held_out=1"):
        find_task("int-sum").rows("test", held_out=1)


def test_split_without_a_row_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "one.jsonl", [{"prompt": "a", "answer": "b"}])
    with pytest.raises(CalibrationError, match="no row is left for test of 1"):
        find_task(str(path)).rows("test")


@pytest.mark.parametrize(("name", "count"), [("cb", 56), ("copa", 100), ("basic_arithmetic", 3000)])
def test_real_files_are_read_whole(name: str, count: int, shared_dir: Path) -> None:
    data = shared_dir / "data" / name
    if not data.is_dir():
        pytest.skip(f"no {name} in the shared folder")
    task = find_task(name.replace("_", "-"), data)
    assert sum(len(task.rows(split)) for split in SPLITS) == count
