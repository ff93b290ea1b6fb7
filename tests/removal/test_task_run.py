# SPDX-License-Identifier: Apache-2.0
"""A task from its splits to the report, on a tiny model."""

import json
from dataclasses import replace

import pytest
import torch

from eigenprune.errors import CalibrationError, ConfigError
from eigenprune.evaluate import answer_losses, right_answers
from eigenprune.evaluate.tasks import find_task
from eigenprune.removal import apply_
from eigenprune.removal.task_run import TaskSplits, run_task_, task_splits
from tests.helpers.tiny_models import tiny_model, tiny_tokenizer, token_windows

SETTINGS = {"remove": 0.05, "checks": 10, "progress": False}


def splits() -> TaskSplits:
    return task_splits(find_task("int-mult"), tiny_tokenizer(), train=24, held_out=12, test=16)


def test_report_is_of_the_models_before_and_after() -> None:
    model, examples = tiny_model("llama"), splits()
    report = run_task_(model, "int-mult", examples, token_windows(2, 16), **SETTINGS)
    assert report.answers[0] == tuple(right_answers(tiny_model("llama"), examples.test).tolist())
    assert report.answers[1] == tuple(right_answers(model, examples.test).tolist())
    again = apply_(tiny_model("llama"), report.removal.removal)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert report.removed == report.removal.removal.count / report.removal.components
    json.dumps(report.to_dict())


def test_views_hold_every_component_once_with_its_kind() -> None:
    report = run_task_(tiny_model("qwen2"), "int-mult", splits(), token_windows(2, 16), **SETTINGS, kinds=["k", "o"])
    views = report.views()
    # Two layers; keys of two heads and outputs of four, 16 components in each.
    assert len(views.components) == report.removal.components == 2 * (2 + 4) * 16
    heads = {(one.depth, one.kind, one.head) for one in views.components}
    assert heads == {(d, kind, h) for d in (0, 1) for kind, count in (("k", 2), ("o", 4)) for h in range(count)}
    assert sum(one.removed for one in views.components) == report.removal.removal.count
    assert views.path[0].removed == 0
    assert views.retention_bound == report.removal.before.retention_loss + 0.05


def test_held_out_questions_decide_and_test_questions_do_not() -> None:
    """Means of the same float32 losses, in batches of other sizes: a few roundings apart."""
    examples, base = splits(), tiny_model("llama")
    removal = run_task_(tiny_model("llama"), "t", examples, token_windows(2, 16), **SETTINGS).removal
    for found, used in (
        (removal.before.held_out_loss, examples.held_out),
        (removal.before.search_loss, examples.train),
    ):
        assert found == pytest.approx(float(answer_losses(base, used).double().mean()), rel=1e-5)
    assert removal.settings["examples"] == [len(examples.train), len(examples.held_out), 2]


def test_empty_test_and_bad_counts_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no test question"):
        run_task_(tiny_model("llama"), "t", replace(splits(), test=[]), token_windows(2, 16))
    with pytest.raises(ConfigError, match="held_out=0"):
        task_splits(find_task("int-mult"), tiny_tokenizer(), held_out=0)
