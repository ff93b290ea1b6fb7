# SPDX-License-Identifier: Apache-2.0
"""The relaxed start: gates mean what they say, the slope is the derivative, the mask keeps to its limit."""

import torch

from eigenprune.calibrate import passage_gradients
from eigenprune.removal import FrozenPieces
from eigenprune.removal.examples import judges_of
from eigenprune.removal.relaxed import PRESSURE, masks_of, pressure
from eigenprune.removal.search import SearchSettings, objective_slopes
from eigenprune.spectral import layer_views
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import logits, tiny_model, token_windows
from tests.removal.test_remove import examples, run

SETTINGS = SearchSettings(limit=5, bound=1.0, weight=0.7, checks=1, pooled=True, batch=8, steps=1, progress=False)


def test_gates_of_zero_are_a_mask_and_gates_of_one_are_the_base() -> None:
    model = tiny_model("qwen2").double()
    base = logits(model)
    frozen = FrozenPieces(model, layer_views(model))
    mean = {name: torch.full((view.shape[1],), 0.3).double() for name, view in frozen.views.items()}
    gates = {name: (~frozen.empty_mask(name)).double() for name in frozen.views}
    for name, gate in gates.items():
        frozen.blend_(name, gate, mean[name])
    assert torch.allclose(logits(model), base, atol=1e-10)
    for name, gate in gates.items():
        gate[:, ::3] = 0
        frozen.blend_(name, gate, mean[name])
    blended = logits(model)
    for name, gate in gates.items():
        mask = gate == 0
        frozen.set_(name, mask, frozen.delta(name, mask, mean[name]))
    assert torch.allclose(logits(model), blended, atol=1e-5)  # the bias of a mask is stored in float32


def test_the_slope_is_the_derivative_of_the_objective_at_any_gates() -> None:
    model = tiny_model("gpt2").double()
    judges = judges_of(examples(6, answer=2), examples(2, 1), token_windows(2, 8), 8, 0)
    frozen = FrozenPieces(model, layer_views(model))
    layers = {name: model.get_submodule(name) for name in frozen.views}
    mean = passage_gradients(model, judges.search.passages, layers).input_mean
    gates = {
        name: torch.rand(mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for name, mask in ((name, frozen.empty_mask(name)) for name in frozen.views)
    }

    def objective() -> float:
        for name, gate in gates.items():
            frozen.blend_(name, gate, mean[name])
        return judges.search.loss(model) + 0.7 * judges.retention.token_loss(model)

    objective()
    slopes = objective_slopes(frozen, judges, mean, SETTINGS)
    name = "transformer.h.1.mlp.c_fc"
    for piece in (0, 3, 20):
        step = 0.02
        gates[name][0, piece] += step
        above = objective()
        gates[name][0, piece] -= 2 * step
        below = objective()
        gates[name][0, piece] += step
        found = -float(slopes[name][0, piece])  # less frozen: the other way
        scale = float(slopes[name].abs().max())
        assert abs((above - below) / (2 * step) - found) < 0.02 * scale


def test_masks_hold_the_lowest_gates_below_a_half_and_no_more_than_the_limit() -> None:
    gates = {"a": torch.tensor([[0.0, 0.2, 0.6], [1.0, 0.4, 0.1]]), "b": torch.tensor([[0.3, 0.9]])}
    assert {name: mask.nonzero().tolist() for name, mask in masks_of(gates, 3).items()} == {
        "a": [[0, 0], [0, 1], [1, 2]]
    }
    assert sum(int(mask.sum()) for mask in masks_of(gates, 100).values()) == 5
    equal = {"a": torch.tensor([[0.0, 0.0, 0.0, 1.0]])}
    assert sum(int(mask.sum()) for mask in masks_of(equal, 2).values()) <= 2
    assert masks_of(gates, 0) == {}


def test_pressure_begins_late_and_grows() -> None:
    found = [pressure(step, 40) for step in range(40)]
    assert found[:6] == [0.0] * 6
    assert found[6] == PRESSURE[0]
    assert found == sorted(found)
    assert abs(found[-1] - PRESSURE[1]) < 1e-12


def test_with_steps_the_report_still_says_what_the_model_is() -> None:
    model = tiny_model("gpt2")
    before = state_hashes(model)
    report = run(model, steps=3, remove=0.02)
    assert report.before.removed == 0
    assert (state_hashes(model) == before) == (report.after.removed == 0)
    assert report.after.removed <= 0.02 * report.components
    assert report.settings["steps"] == 3
