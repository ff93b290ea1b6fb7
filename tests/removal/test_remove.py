# SPDX-License-Identifier: Apache-2.0
"""`remove_`: what it says is what is there, the guard holds, bad input is refused and leaves the model alone."""

from typing import Any

import pytest
import torch
from torch import nn

from eigenprune.errors import CalibrationError, ConfigError, EigenpruneError, WeightError
from eigenprune.evaluate import accuracy, answer_losses
from eigenprune.evaluate.token_example import TokenExample
from eigenprune.removal import RemovalReport, RemovalRound, apply_, remove_
from eigenprune.removal.objective import OBJECTIVES
from eigenprune.removal.search import Search, best_round
from eigenprune.spectral import WORTHS
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import VOCABULARY, tiny_model, token_windows


def examples(count: int, seed: int = 0, answer: int = 1) -> list[TokenExample]:
    """Prompts of 3 to 6 tokens with answers of up to `answer` tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n in range(count):
        prompt = torch.randint(3, VOCABULARY, (3 + n % 4,), generator=generator).tolist()
        said = torch.randint(3, VOCABULARY, (1 + n % answer,), generator=generator).tolist()
        found.append(TokenExample(tuple(prompt), tuple(said)))
    return found


def run(model: nn.Module, **arguments: Any) -> RemovalReport:
    defaults: dict[str, Any] = {
        "examples": examples(12, answer=3),
        "retention": token_windows(2, 12),
        "remove": 0.05,
        "checks": 12,
        "retention_bound": 0.2,
        "progress": False,
    }
    chosen = defaults | arguments
    return remove_(model, chosen.pop("examples"), **chosen)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_report_says_what_the_model_is_and_the_removal_makes_it_again(kind: str, objective: str) -> None:
    held, retention = examples(6, 1, 2), examples(7, 2, 3)
    model = tiny_model(kind).train()
    report = run(model, held_out=held, retention=retention, retention_weight=0.0, objective=objective)
    assert model.training
    model.eval()
    assert report.after.held_out_loss == pytest.approx(float(answer_losses(model, held).mean()), rel=1e-5)
    assert report.after.held_out_accuracy == accuracy(model, held)
    tokens = sum(len(example.answer) for example in retention)
    assert report.after.retention_loss == pytest.approx(float(answer_losses(model, retention).sum()) / tokens, rel=1e-5)
    assert report.after.held_out_objective < report.before.held_out_objective
    assert (report.after.held_out_objective == report.after.held_out_loss) == (objective == "loss")
    assert report.after.retention_loss <= report.before.retention_loss + 0.2
    assert 0 < report.after.removed == len(report.pieces) == report.removal.count <= 0.05 * report.components
    assert state_hashes(apply_(tiny_model(kind), report.removal)) == state_hashes(model)
    assert report.to_dict()["chosen"] == report.chosen


@pytest.mark.parametrize("worth", WORTHS)
def test_every_rule_runs_on_every_kind_of_storage_and_keeps_to_its_bounds(worth: str) -> None:
    model = tiny_model("phi3" if worth == "laser" else "gpt2")
    before = state_hashes(model)
    report = run(model, worth=worth, remove=0.2, examples=examples(15), held_out=examples(5, 4))
    assert report.after.removed <= 0.2 * report.components
    assert report.after.retention_loss <= report.before.retention_loss + 0.2
    assert (state_hashes(model) == before) == (report.after.removed == 0)
    assert report.after.held_out_objective <= report.before.held_out_objective


def test_a_search_in_bfloat16_still_reports_the_model_as_it_is() -> None:
    held = examples(6, 1, 2)
    model = tiny_model("gpt2")
    report = run(model, held_out=held, autocast=True)
    assert report.settings["autocast"]
    assert report.after.held_out_loss == pytest.approx(float(answer_losses(model, held).mean()), rel=1e-5)
    assert model.transformer.h[0].mlp.c_fc.weight.dtype == torch.float32


def test_only_the_wanted_kinds_lose_components() -> None:
    report = run(tiny_model("gpt2"), kinds=["v", "down"], remove=0.2, retention_weight=0.0, retention_bound=9.0)
    assert report.pieces
    assert {piece.kind for piece in report.pieces} <= {"v", "down"}


def test_a_guard_that_allows_nothing_leaves_the_model_within_it() -> None:
    report = run(tiny_model("gpt2"), retention_bound=0.0)
    assert report.after.retention_loss <= report.before.retention_loss


def test_a_round_is_kept_only_within_the_guard_and_without_fewer_right_answers() -> None:
    def entry(accuracy: float, objective: float, retention: float) -> RemovalRound:
        return RemovalRound(0, 0.0, 0.0, objective, accuracy, retention, None, 0)

    start = entry(0.5, 2.0, 1.0)
    rounds = [start, entry(0.4, 0.1, 1.0), entry(0.6, 0.2, 1.3), entry(0.5, 1.0, 1.1), entry(0.9, 1.5, 1.2)]
    assert best_round(rounds, 0.2, lambda found: found.held_out_objective) == 3
    assert best_round(rounds[:2], 0.2, lambda found: found.held_out_objective) == 0


def test_same_seed_same_removal() -> None:
    pieces = [run(tiny_model("gpt2"), seed=3).pieces for _ in range(2)]
    assert pieces[0] == pieces[1]


REFUSED: dict[str, tuple[type[EigenpruneError], str, dict[str, Any]]] = {
    "an unknown kind": (ConfigError, "kinds", {"kinds": ["keys"]}),
    "an unknown view": (ConfigError, "view", {"view": "heads"}),
    "an unknown objective": (ConfigError, "objective", {"objective": "accuracy"}),
    "an unknown rule": (ConfigError, "worth", {"worth": "best"}),
    "a kind the model lacks": (ConfigError, "no layer of kind gate", {"kinds": ["gate"]}),
    "an empty task": (CalibrationError, "at least two", {"examples": []}),
    "a task of one": (CalibrationError, "at least two", {"examples": examples(1)}),
    "nothing held out": (CalibrationError, "at least one", {"held_out": []}),
    "nothing retained": (CalibrationError, "retention is empty", {"retention": []}),
    "retention that is no text": (CalibrationError, "retention|windows", {"retention": torch.zeros(3).long()}),
    "a fraction above one": (ConfigError, "remove=", {"remove": 1.5}),
    "no fraction": (ConfigError, "remove=", {"remove": 0.0}),
    "a bound below zero": (ConfigError, "retention_bound", {"retention_bound": -1.0}),
    "no checks": (ConfigError, "checks", {"checks": 0}),
    "ids outside the vocabulary": (CalibrationError, "vocabulary", {"examples": [TokenExample((5,), (999,))] * 4}),
    "partners in a batch of one": (CalibrationError, "own partner", {"worth": "paper", "batch": 1}),
    "released rule with a batch of one": (
        CalibrationError,
        "batch of one",
        {"worth": "compat", "examples": examples(6), "held_out": examples(2)},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_a_typed_error_and_the_model_stays_as_it_was(case: str) -> None:
    error, words, arguments = REFUSED[case]
    model = tiny_model("gpt2").train()
    before = state_hashes(model)
    with pytest.raises(error, match=words):
        run(model, **arguments)
    assert state_hashes(model) == before
    assert model.training


def test_a_model_without_answers_and_one_with_nan_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no causal language model"):
        run(tiny_model("bert"))
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] = torch.nan
    with pytest.raises(WeightError):
        run(model)


def test_an_interrupt_gives_the_model_back(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Search._losses, []

    def flaky(search: Search) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(search)

    monkeypatch.setattr(Search, "_losses", flaky)
    model = tiny_model("qwen2")
    before = state_hashes(model)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert len(calls) == 4
    assert state_hashes(model) == before


def test_a_batch_of_one_gives_what_larger_batches_give() -> None:
    one, many = (run(tiny_model("gpt2"), batch=batch, checks=4) for batch in (1, 8))
    for name, worth in one.worth.items():
        scale = float(worth.nan_to_num().abs().max())
        assert torch.allclose(worth, many.worth[name], atol=1e-4 * scale, equal_nan=True)
