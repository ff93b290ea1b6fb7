# SPDX-License-Identifier: Apache-2.0
"""Recovery on tiny models: each method gets loss back, nothing else changes, and a killed run ends as a whole one."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from eigenprune import EigenpruneConfig, collect_statistics, prune_, save_model
from eigenprune.entries import merge_entries, select_entries
from eigenprune.errors import CalibrationError, ConfigError, WeightError
from eigenprune.layers import low_rank_layers, select_layers
from eigenprune.recover import Course, RecoveryReport, blockwise, recover_, teacher_targets, training
from eigenprune.recover.closed import full_left, refitted, set_left_
from eigenprune.spectral import layer_of_factors
from tests.helpers.adapters import pruned_model
from tests.helpers.compare import state_hashes
from tests.helpers.killed import killed_after
from tests.helpers.tiny_models import logits, tiny_model, token_windows

WINDOWS = token_windows(24, 24)
MANY = token_windows(96, 24)  # random tokens: what is learned from few of them does not hold for others
HELD_OUT = [15]
# Enough for a random model of two blocks; a real one wants smaller steps and far fewer of them.
COURSES = {
    "distil": Course(rate=3e-3, passes=2),
    "block": Course(rate=3e-3, passes=2),
    "closed": None,
    "perp": Course(rate=1e-2, passes=2),
}


def recovered(model: nn.Module, method: str, **options: Any) -> RecoveryReport:
    values: dict[str, Any] = {"course": COURSES[method], "progress": False} | options
    return recover_(model, tiny_model("llama"), WINDOWS, method=method, **values)


def divergence(model: nn.Module, windows: Tensor) -> float:
    """From the dense model, over all classes, in float64 from the logits on."""
    with torch.no_grad():
        p, q = (m(input_ids=windows).logits.double().log_softmax(-1) for m in (tiny_model("llama"), model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_perp_recovers_what_pruning_single_entries_lost_and_zeros_stay(kind: str) -> None:
    dense, model = tiny_model(kind), tiny_model(kind)
    tuned = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    masks = select_entries(tuned, tuned, "magnitude", 0.5, reset="zero")
    model.load_state_dict(dict(merge_entries(None, tuned, masks)))
    pruned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = recover_(model, dense, WINDOWS, method="perp", course=COURSES["perp"], progress=False)
    assert report.kept
    assert report.after < report.before
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, pruned[name])}
    assert changed
    assert all(pruned[name].ndim == 1 for name in changed)


@pytest.mark.parametrize("method", list(COURSES))
def test_each_method_lowers_the_divergence_on_windows_it_does_not_learn_from(method: str) -> None:
    model = pruned_model()
    before = divergence(model, WINDOWS[HELD_OUT])
    report = recovered(model, method)
    after = divergence(model, WINDOWS[HELD_OUT])
    assert after < before
    assert report.kept
    # The report's figure knows 64 of 128 classes, and its products are of bfloat16: a tenth is far beyond both.
    assert report.before <= 1.1 * before
    assert report.after <= 1.1 * after
    assert report.after < report.before
    assert report.held_out_tokens == len(HELD_OUT) * WINDOWS.shape[1]
    passes = COURSES[method].passes if COURSES[method] else 1  # type: ignore[union-attr]
    assert report.tokens == passes * (len(WINDOWS) - len(HELD_OUT)) * WINDOWS.shape[1]


@pytest.mark.parametrize(("kind", "layout"), [("gpt2", "pair"), ("qwen2", "pivot")])
@pytest.mark.parametrize("method", ["distil", "closed"])
def test_other_architectures_and_layouts(method: str, kind: str, layout: str) -> None:
    model = pruned_model(kind, layout)
    report = recover_(model, tiny_model(kind), MANY, method=method, course=COURSES[method], progress=False)
    assert report.after < report.before


@pytest.mark.parametrize("method", ["closed", "block"])
def test_encoder_goes_through_its_blocks(method: str) -> None:
    model = pruned_model("bert")
    report = recover_(model, tiny_model("bert"), MANY, method=method, course=COURSES[method], progress=False)
    assert report.after < report.before


@pytest.mark.parametrize("layout", ["pair", "pivot"])
def test_closed_form_is_the_least_squares_written_out(layout: str) -> None:
    torch.manual_seed(0)
    # As many tokens as there are inner activations but two: the least squares alone has no single answer.
    inner, outer = torch.randn(10, 12, dtype=torch.float64), torch.randn(10, 20, dtype=torch.float64)
    left, ridge = torch.randn(20, 12, dtype=torch.float64), 1e-3
    found = refitted(inner.t() @ inner, outer.t() @ inner, left, ridge)
    # The ridge as rows of the problem: sqrt(lambda) L = sqrt(lambda) left.
    root = (ridge * inner.square().sum(0).mean()).sqrt()
    rows = torch.cat([inner, root * torch.eye(12, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(rows, torch.cat([outer, root * left.t()])).solution.t()
    # The normal equations square the condition of `rows`, which is at most sqrt(12 / ridge).
    assert (found - wanted).abs().max() <= 100 * (12 / ridge) * 2**-53 * wanted.abs().max()

    layer = layer_of_factors(nn.Linear(16, 20), left, torch.randn(12, 16, dtype=torch.float64), layout).double()
    product = found @ layer.right.weight.detach()
    with torch.no_grad():
        set_left_(layer, found)
    assert (layer.weight - product).abs().max() <= 1e-12 * product.abs().max()
    assert torch.allclose(
        full_left(layer) @ layer.right.weight, product, rtol=0, atol=1e-12 * float(product.abs().max())
    )


def test_layers_without_any_activation_keep_their_factor() -> None:
    left = torch.randn(4, 3, dtype=torch.float64)
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    assert torch.equal(refitted(nothing, torch.zeros(4, 3, dtype=torch.float64), left), left)


def test_perp_touches_biases_and_norms_only() -> None:
    model = pruned_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recovered(model, "perp")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in before.items() if p.ndim == 1}


def test_distil_leaves_embeddings_and_dense_layers_alone() -> None:
    model = pruned_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recovered(model, "distil")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    factors = {f"{name}.{part}.weight" for name in low_rank_layers(model) for part in ("left", "right")}
    assert changed == factors | {name for name, p in before.items() if p.ndim == 1}


@pytest.mark.parametrize("course", [Course(rate=3e-3, passes=0), Course(rate=3e-3, minutes=0)])
def test_no_steps_change_nothing(course: Course) -> None:
    model = pruned_model()
    hashes = state_hashes(model)
    report = recovered(model, "distil", course=course)
    assert state_hashes(model) == hashes
    assert (report.steps, report.kept, report.after) == (0, False, report.before)


def test_where_nothing_is_gained_the_model_stays() -> None:
    model = tiny_model("llama")
    layers = select_layers(model).chosen
    statistics = collect_statistics(model, WINDOWS, layers, progress=False)
    prune_(model, EigenpruneConfig(keep=0.95), statistics=statistics, progress=False)
    hashes = state_hashes(model)
    report = recovered(model, "distil", course=Course(rate=0.3))  # far too fast
    assert report.after > report.before
    assert not report.kept
    assert state_hashes(model) == hashes


@pytest.mark.parametrize("method", list(COURSES))
def test_failing_run_leaves_the_model_as_it_was(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned_model()
    hashes, modes = state_hashes(model), [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    calls = iter(range(1000))

    def failing(*_args: Any, **_options: Any) -> Any:
        if next(calls) >= 1:
            raise KeyboardInterrupt
        return real(*_args, **_options)

    owner, name = (blockwise, "refit_block_") if method == "closed" else (training, "_step")
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(KeyboardInterrupt):
        recovered(model, method)
    assert state_hashes(model) == hashes
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("method", ["distil", "closed", "block"])
def test_killed_run_goes_on_and_ends_with_the_same_bits(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in (training, blockwise):
        monkeypatch.setattr(part, "SECONDS_BETWEEN_SAVES", 0)
    wanted = pruned_model()
    whole = recovered(wanted, method)
    owner, name = (training, "_step") if method == "distil" else (blockwise, "_visited")
    for calls in (7, 13) if method == "distil" else (1, 0):
        assert killed_after(calls, owner, name, lambda: recovered(pruned_model(), method, checkpoint_dir=tmp_path))
    model = pruned_model()
    again = recovered(model, method, checkpoint_dir=tmp_path)
    assert state_hashes(model) == state_hashes(wanted)
    assert (again.after, again.steps, again.losses) == (whole.after, whole.steps, whole.losses)
    # The outcome outlives the run.
    calls = []
    monkeypatch.setattr(owner, name, lambda *_args, **_options: calls.append(1))
    model = pruned_model()
    recovered(model, method, checkpoint_dir=tmp_path)
    assert state_hashes(model) == state_hashes(wanted)
    assert not calls


def test_another_course_or_model_is_another_run(tmp_path: Path) -> None:
    recovered(pruned_model(), "distil", checkpoint_dir=tmp_path)
    files = set(tmp_path.glob("recovery-*"))
    recovered(pruned_model(), "distil", checkpoint_dir=tmp_path, course=Course(rate=1e-3))
    recovered(pruned_model(layout="pair"), "distil", checkpoint_dir=tmp_path)
    assert len(set(tmp_path.glob("recovery-*"))) == len(files) + 2
    assert len(list(tmp_path.glob("targets-*"))) == 1  # the teacher was asked once


def test_damaged_files_are_passed_over(tmp_path: Path) -> None:
    wanted = pruned_model()
    recovered(wanted, "distil", checkpoint_dir=tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:500])
    model = pruned_model()
    recovered(model, "distil", checkpoint_dir=tmp_path)
    assert state_hashes(model) == state_hashes(wanted)


def test_targets_kept_before_pruning_serve_as_the_teacher() -> None:
    wanted, model = pruned_model(), pruned_model()
    recovered(wanted, "distil")
    targets = teacher_targets(tiny_model("llama"), WINDOWS, progress=False)
    recover_(model, targets, course=COURSES["distil"], progress=False)
    assert state_hashes(model) == state_hashes(wanted)


def test_bfloat16_model_is_trained_in_float32_and_rounded_once() -> None:
    model = pruned_model(dtype=torch.bfloat16)
    report = recovered(model, "distil")
    assert report.kept
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_recovered_model_saves_and_reloads_plainly(tmp_path: Path) -> None:
    model = tiny_model("llama")
    dense = copy.deepcopy(model)
    layers = select_layers(model).chosen
    statistics = collect_statistics(model, WINDOWS, layers, progress=False)
    prune_(model, EigenpruneConfig(keep=0.6), statistics=statistics, progress=False)
    report = recover_(model, dense, WINDOWS, course=COURSES["distil"], progress=False)
    assert report.kept
    save_model(model, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert state_hashes(again) == state_hashes(model)
    assert torch.equal(logits(again), logits(model))
    recorded = again.config.quantization_config.provenance["recovery"]
    assert recorded["method"] == "distil"
    assert (recorded["tokens"], recorded["steps"]) == (report.tokens, report.steps)


def test_wrong_use_is_refused_before_anything_runs() -> None:
    model, dense = pruned_model(), tiny_model("llama")
    targets = teacher_targets(dense, WINDOWS, progress=False)
    hurried = Course(rate=1e-4, minutes=1)
    wrong: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ConfigError, "unknown", lambda: recover_(model, dense, WINDOWS, method="magic")),
        (ConfigError, "no factored layer", lambda: recover_(dense, dense, WINDOWS)),
        (ConfigError, "pruned itself", lambda: recover_(model, pruned_model(), WINDOWS)),
        (ConfigError, "windows", lambda: recover_(model, dense)),
        (ConfigError, "other windows", lambda: recover_(model, targets, WINDOWS[:4])),
        (ConfigError, "dense model itself", lambda: recover_(model, targets, method="closed")),
        (
            ConfigError,
            "minutes",
            lambda: recover_(model, dense, WINDOWS, method="block", course=hurried),
        ),
        (CalibrationError, "1 windows", lambda: recover_(model, dense, WINDOWS[:1])),
        (CalibrationError, "windows of shape", lambda: recover_(model, dense, WINDOWS[0])),
        (WeightError, "meta", lambda: recover_(copy.deepcopy(model).to("meta"), dense, WINDOWS)),
        (ConfigError, "rate", lambda: Course(rate=0)),
        (ConfigError, "batch", lambda: Course(rate=1e-4, batch=0)),
        (ConfigError, "minutes", lambda: Course(rate=1e-4, minutes=-1)),
    ]
    hashes = state_hashes(model)
    for kind, words, call in wrong:
        with pytest.raises(kind, match=words):
            call()
    assert state_hashes(model) == hashes
