# SPDX-License-Identifier: Apache-2.0
"""Budgets in bytes, FLOPs and time, and a least keep for every layer, counted on the pruned model itself."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from eigenprune import EigenpruneConfig
from eigenprune.errors import BudgetError, ConfigError
from eigenprune.layers import dense_weight, low_rank_layers, select_layers
from eigenprune.prune import prune_
from eigenprune.spectral import Spectrum, layer_cost, rank_options
from tests.helpers.tiny_models import tiny_model, token_windows


def pruned(cache: Path, dtype: torch.dtype = torch.float32, **settings):
    model = tiny_model("llama", dtype)
    before = {name: dense_weight(module).clone() for name, module in select_layers(model).chosen.items()}
    config = EigenpruneConfig(rank_multiple=4, **settings)
    report = prune_(model, config, windows=token_windows(), cache_dir=cache, progress=False)
    return model, before, report


def size(module: nn.Module) -> int:
    tensors = module.state_dict()
    return sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if name != "bias")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("layout", ["pivot", "pair"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_budget_in_bytes_holds_for_the_tensors_that_are_saved(cache: Path, dtype: torch.dtype, layout: str) -> None:
    model, before, report = pruned(cache, dtype, keep=0.7, budget="bytes", layout=layout)
    whole = sum(weight.numel() * weight.element_size() for weight in before.values())
    kept = sum(size(model.get_submodule(name)) for name in before)
    largest_step = 4 * 160 * dtype.itemsize + 4 * 4  # four rows and columns of the widest layer, and their index
    assert 0.7 * whole - largest_step <= kept <= 0.7 * whole
    assert len(low_rank_layers(model)) > 3
    parameters = sum(sum(p.numel() for p in model.get_submodule(n).parameters()) for n in before)
    assert sum(layer.parameters for layer in report.chosen) == parameters  # the report counts parameters all the same
    assert report.settings["budget"] == "bytes"


def test_flops_are_counted_as_multiplications_and_additions_of_every_parameter(cache: Path) -> None:
    by_parameters, by_flops = (pruned(cache, keep=0.7, budget=budget)[2] for budget in ("parameters", "flops"))
    assert [layer.rank for layer in by_parameters.layers] == [layer.rank for layer in by_flops.layers]
    assert layer_cost("flops", (10, 20), "pair", 4)(3) == 3 * (2 * 20) + 10 * (2 * 3)
    assert layer_cost("flops", (10, 20), "pair", 4)(0) == 10 * (2 * 20)


def test_a_latency_budget_is_met_by_measured_times_or_refused(cache: Path) -> None:
    # On layers this small no rank may be faster: then there is an error, and the model is as it was.
    with suppress(BudgetError):
        model, _, report = pruned(cache, keep=0.9, budget="latency")
        assert low_rank_layers(model)
        assert report.settings["budget"] == "latency"


@pytest.mark.parametrize("method", ["kfac", "svd-llm"])
def test_no_layer_keeps_less_than_min_keep(cache: Path, method: str) -> None:
    _, before, report = pruned(cache, keep=0.7, min_keep=0.6, method=method)
    assert len(report.chosen) == len(before)
    kept = [layer.parameters / layer.dense_parameters for layer in report.chosen]
    assert min(kept) >= 0.6
    assert report.keep <= 0.7
    free = pruned(cache, keep=0.7)[2]
    assert min(layer.parameters / layer.dense_parameters for layer in free.chosen) < 0.6


def test_a_least_keep_above_the_budget_is_a_budget_error(cache: Path) -> None:
    with pytest.raises(BudgetError, match="or lower rank_multiple or min_keep"):
        pruned(cache, keep=0.5, min_keep=0.6)


@pytest.mark.parametrize("value", [-0.1, 1.1, "0.5", True, None])
def test_settings_out_of_range_are_config_errors(value: object) -> None:
    for name in ("min_keep", "prior"):
        with pytest.raises(ConfigError, match=rf"{name}=.* must be in \[0, 1\]"):
            EigenpruneConfig(**{name: value})
    with pytest.raises(ConfigError, match="there are: parameters, bytes, flops, latency"):
        EigenpruneConfig(budget=value)


def test_a_budget_that_is_measured_is_not_counted() -> None:
    with pytest.raises(ConfigError, match="there are: parameters, bytes, flops"):
        layer_cost("latency", (8, 8), "pair", 4)


def test_min_keep_leaves_dense_where_no_rank_is_large_enough() -> None:
    options = rank_options((16, 16), Spectrum(torch.ones(16).double()), "pair", 4, min_keep=0.6)
    assert options.ranks.tolist() == [0]  # at rank 4 half of the parameters, at 8 all of them
