# SPDX-License-Identifier: Apache-2.0
"""Budgets in bytes, FLOPs and time, and a least keep for every layer, counted on the pruned model itself."""

import json
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
    with pytest.raises(BudgetError, match="lower rank_multiple or min_keep, or leave out faster_at"):
        pruned(cache, keep=0.5, min_keep=0.6)


def plant(cache: Path, slow: tuple[int, int]) -> None:
    """In the place of what was measured: factored layers slower from 3/4 of all ranks on, and those of the shape `slow`
    at all ranks, but only at one of the numbers of tokens."""
    files = sorted((cache / "layer-times").iterdir())
    assert len(files) > 3
    always = [file for file in files if json.loads(file.read_text(encoding="utf-8"))["shape"] == list(slow)]
    assert len(always) == 2
    for file in files:
        times = json.loads(file.read_text(encoding="utf-8"))
        side = min(times["shape"])
        ranks = [1, 3 * side // 4, 3 * side // 4 + 1, side]
        factored = [2.0] * 4 if file == always[0] else [0.5, 1.0, 1.5, 1.5]
        file.write_text(json.dumps({"shape": times["shape"], "dense": 1.0, "ranks": ranks, "factored": factored}))


@pytest.mark.parametrize("method", ["kfac", "kfac-channels"])
def test_no_layer_is_slower_than_dense_where_faster_at_forbids_it(tmp_path: Path, method: str) -> None:
    free = pruned(tmp_path, keep=0.8, method=method)[2]
    assert "faster_at" not in EigenpruneConfig().to_dict()
    with suppress(BudgetError):  # what was measured, on layers this small, may rule everything out
        pruned(tmp_path, keep=0.8, method=method, faster_at=[1, 4])
    slow = next(layer.shape for layer in free.layers if layer.name.endswith("q_proj"))
    plant(tmp_path, slow)
    report = pruned(tmp_path, keep=0.8, method=method, faster_at=[1, 4])[2]
    assert report.settings["faster_at"] == (1, 4)
    assert 0.78 < report.keep <= 0.8
    for layer in report.layers:
        shape = layer.kept_shape or layer.shape
        if layer.layout == "dense":
            assert shape != slow or layer.reason == "no rank is cheaper and as fast"
        else:
            assert shape != slow
            assert layer.rank <= 3 * min(shape) // 4
    assert any(layer.reason == "no rank is cheaper and as fast" for layer in report.layers)
    assert any(layer.rank > 3 * min(layer.shape) // 4 for layer in free.layers if layer.layout != "dense")


@pytest.mark.parametrize("value", [0, "512", [0], [1.0], [True], ["1"], None])
def test_faster_at_is_a_list_of_token_counts(value: object) -> None:
    with pytest.raises(ConfigError, match=r"faster_at=.* must be a list of positive integers"):
        EigenpruneConfig(faster_at=value)


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
