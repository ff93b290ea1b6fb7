# SPDX-License-Identifier: Apache-2.0
"""Scales of estimated losses: against one deep copy of the model for every layer; between blocks; on disk."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eigenprune.calibrate import Statistics, collect_statistics
from eigenprune.errors import WeightError
from eigenprune.layers import dense_weight
from eigenprune.spectral import (
    METHODS,
    Options,
    components,
    layer_metric,
    probe_scale,
    probed_scales,
    rank_options,
    scaled,
    spectrum,
)
from tests.calibrate.tiny import EPS, albert, bert, gpt2, linears, llama, windows

METHOD = METHODS["kfac-probe"]


def _case(model: nn.Module, ids: Tensor) -> tuple[dict[str, nn.Module], Statistics, dict[str, Options]]:
    layers = linears(model)
    statistics = collect_statistics(model, ids, layers, progress=False)
    options = {}
    for name, module in layers.items():
        weight = dense_weight(module).detach()
        found = spectrum(weight, layer_metric(METHOD, statistics, name))
        options[name] = rank_options(tuple(weight.shape), found, "pivot", 8)
    return layers, statistics, options


def _scales(model: nn.Module, ids: Tensor, **settings) -> dict[str, float]:
    layers, statistics, options = _case(model, ids)
    return probed_scales(model, layers, options, METHOD, statistics, ids, progress=False, **settings)


def _rise(model: nn.Module, name: str, product: Tensor, ids: Tensor) -> float:
    """KL divergence in nats per position, token by token, of a copy with that weight."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        dense_weight(twin.get_submodule(name)).copy_(product)
        p, q = model(ids).logits.log_softmax(-1), twin(ids).logits.log_softmax(-1)
    terms = [
        sum(float(p[i, t, k].exp() * (p[i, t, k] - q[i, t, k])) for k in range(p.shape[-1]))
        for i in range(p.shape[0])
        for t in range(p.shape[1])
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_matches_a_copy_of_the_model_for_every_layer(make) -> None:
    ids = windows(5)
    model = make().double().eval()
    layers, statistics, options = _case(model, ids)
    got = probed_scales(model, layers, options, METHOD, statistics, ids, progress=False)
    assert got.keys() == layers.keys()
    tried = ids[[1, 3]]
    for name in list(layers)[:: len(layers) // 4]:
        losses = options[name].losses[:-1]
        index = min(range(len(losses)), key=lambda i, losses=losses: abs(math.log(float(losses[i]) / 0.005)))
        weight = dense_weight(layers[name]).detach()
        found = components(weight, layer_metric(METHOD, statistics, name), int(options[name].ranks[index]))
        rise = _rise(model, name, found.left @ found.right, tried)
        # Predictions are compared in float32: each term is off by some eps, of sums that are mostly cancelled.
        tolerance = 97 * EPS / rise
        assert tolerance < 0.05
        assert math.isclose(got[name], rise / float(losses[index]), rel_tol=tolerance)


def test_measures_few_blocks_of_a_deep_model_and_interpolates_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_scale, "MOST_BLOCKS", 3)
    scales = _scales(llama(num_hidden_layers=5).eval(), windows(2))
    for layer in ("self_attn.q_proj", "mlp.down_proj"):
        measured = [math.log(scales[f"model.layers.{block}.{layer}"]) for block in range(5)]
        for middle in (1, 3):
            assert math.isclose(measured[middle], (measured[middle - 1] + measured[middle + 1]) / 2, abs_tol=1e-12)
    assert len(set(scales.values())) == len(scales)


def test_layers_outside_the_chain_get_the_mean_and_models_without_one_get_ones() -> None:
    measured = {(0, "a.0.x"): 1.0, (1, "a.1.x"): 3.0}
    layers = dict.fromkeys(("a.0.x", "a.1.x", "before", "a.7.x"), nn.Identity())
    wanted = {"a.0.x": 1.0, "a.1.x": 3.0, "before": 2.0, "a.7.x": 3.0}
    found = probe_scale._between(measured, layers)
    assert {name: math.log(scale) for name, scale in found.items()} == pytest.approx(wanted)
    assert set(_scales(albert().eval(), windows(2)).values()) == {1.0}
    assert set(_scales(bert("BertModel").eval(), windows(2)).values()) == {1.0}


def test_model_is_as_before_and_the_result_is_kept_for_the_next_budget(tmp_path: Path) -> None:
    ids = windows(3)
    model = llama().train()
    before = {name: (id(module), module.training) for name, module in model.named_modules()}
    first = _scales(model, ids, cache_dir=tmp_path)
    assert before == {name: (id(module), module.training) for name, module in model.named_modules()}
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())
    (file,) = tmp_path.glob("scales-*")
    changed = file.stat().st_mtime_ns
    assert _scales(model, ids, cache_dir=tmp_path) == first
    assert file.stat().st_mtime_ns == changed
    file.write_bytes(b"damaged")
    assert _scales(model, ids, cache_dir=tmp_path) == first


def test_infinite_predictions_are_named_and_the_layer_is_put_back() -> None:
    ids = windows(2)
    model = llama().eval()
    layers, statistics, options = _case(model, ids)
    name = "model.layers.0.mlp.up_proj"
    down = model.model.layers[0].mlp.down_proj

    def overflow(module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output if model.get_submodule(name) is layers[name] else output * torch.inf

    down.register_forward_hook(overflow)
    with pytest.raises(WeightError, match=name):
        probed_scales(model, layers, options, METHOD, statistics, ids, progress=False)
    assert all(model.get_submodule(layer) is module for layer, module in layers.items())


def test_scaled_losses_keep_ranks_and_costs() -> None:
    options = {"a": Options(torch.tensor([8, 0]), torch.tensor([10, 20]), torch.tensor([0.5, 0.0]).double())}
    found = scaled(options, {"a": 3.0})["a"]
    assert (found.ranks.tolist(), found.costs.tolist(), found.losses.tolist()) == ([8, 0], [10, 20], [1.5, 0.0])
