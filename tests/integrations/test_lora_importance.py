# SPDX-License-Identifier: Apache-2.0
"""LoRAPrune's importance on singular components, against the formula written out with whole matrices."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eigenprune import EigenpruneConfig, prune_
from eigenprune.errors import CalibrationError, ConfigError
from eigenprune.layers import low_rank_layers
from tests.helpers.adapters import trained_
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import tiny_model, token_windows

peft = pytest.importorskip("peft", reason="peft is not installed")

from eigenprune.integrations.lora_importance import DECAY, collect_lora_importance  # noqa: E402

RANK, SCALING = 4, 2.0
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_fc"]}
EXACT = 1e-5  # relative; components are kept in float32, the model runs in it


def adapted(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=int(RANK * SCALING), target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2"
    )
    return trained_(peft.get_peft_model(tiny_model(kind), config), steps=3)


def literal(model: Any, layer: Any, windows: Tensor, transposed: bool) -> Tensor:
    """Importances of one layer, from whole matrices, [out, in]."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base = layer.get_base_layer().weight.detach().double()
    weight = (base.t() if transposed else base) + SCALING * (b @ a).detach().double()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    mean = torch.zeros(len(s), dtype=torch.float64)
    for number, ids in enumerate(windows):
        model.zero_grad()
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
        da, db = a.grad.double(), b.grad.double()
        gradient = db @ a.detach().double() + b.detach().double() @ da - db @ da
        change = (s * torch.einsum("mi,mn,in->i", u, gradient, vh)).square()
        mean = change if number == 0 else DECAY * mean + (1 - DECAY) * change
    model.zero_grad()
    return mean


@pytest.mark.parametrize("kind", list(TARGETS))
def test_importance_is_the_formula(kind: str) -> None:
    model, windows = adapted(kind).eval(), token_windows(3, 16)
    statistics = collect_lora_importance(model, windows, progress=False)
    layers = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A") and name in statistics
    }
    assert len(layers) == sum(name.split(".")[-1] in TARGETS[kind] for name, _ in tiny_model(kind).named_modules())
    for name, layer in layers.items():
        wanted = literal(model, layer, windows, transposed=kind == "gpt2")
        got = statistics.component_importance(name)
        assert float((got - wanted).abs().max()) <= EXACT * float(wanted.max())


def test_model_and_its_gradients_are_as_before() -> None:
    model, ids = adapted().train(), token_windows(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    before = state_hashes(model), [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    collect_lora_importance(model, ids, progress=False)
    assert state_hashes(model) == before[0]
    assert model.training
    assert flags == [p.requires_grad for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), before[1], strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


def test_pruning_keeps_the_important_components_and_leaves_other_layers_dense() -> None:
    model, windows = adapted(), token_windows(3, 16)
    statistics = collect_lora_importance(model, windows, progress=False)
    merged = model.merge_and_unload()
    dense = {name: module.weight.detach().clone() for name, module in merged.named_modules() if name in statistics}
    config = EigenpruneConfig(method="lora-prune", keep=0.6, layout="pair", rank_multiple=1)
    report = prune_(merged, config, statistics=statistics, progress=False)
    pruned = low_rank_layers(merged)
    assert pruned
    assert set(pruned) <= set(dense)
    assert {layer.name for layer in report.layers if layer.reason and "calibration" in layer.reason}
    for name, layer in pruned.items():
        u, s, vh = torch.linalg.svd(dense[name].double(), full_matrices=False)
        kept = statistics.component_importance(name).argsort(descending=True)[: layer.rank]
        wanted = u[:, kept] * s[kept] @ vh[kept]
        # Components of nearly equal singular values may turn into each other: float32 weights, some hundred entries.
        assert float((layer.weight.detach().double() - wanted).norm()) <= 1e-4 * float(wanted.norm())


def test_what_cannot_work_is_refused() -> None:
    model, windows = adapted(), token_windows(2, 16)
    with pytest.raises(ConfigError, match="collect_lora_importance"):
        prune_(tiny_model("llama"), EigenpruneConfig(method="lora-prune"), windows=windows, progress=False)
    with pytest.raises(ConfigError, match="no LoRA named 'other'"):
        collect_lora_importance(model, windows, adapter="other", progress=False)
    with pytest.raises(CalibrationError, match="windows of shape"):
        collect_lora_importance(model, windows[:0], progress=False)
    dora = peft.LoraConfig(target_modules=TARGETS["llama"], use_dora=True)
    with pytest.raises(ConfigError, match="no plain LoRA"):
        collect_lora_importance(peft.get_peft_model(tiny_model("llama"), dora), windows, progress=False)
    model.merge_adapter()
    with pytest.raises(ConfigError, match="merged"):
        collect_lora_importance(model, windows, progress=False)
    with pytest.raises(ConfigError, match="no LoRA"):
        collect_lora_importance(nn.Sequential(nn.Linear(3, 3)), windows, progress=False)
