# SPDX-License-Identifier: Apache-2.0
"""Weights that are NaN, huge, tiny, tied, shared, or too small to gain anything (rows G17, G18, G21, G22, G23)."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from eigenprune import EigenpruneConfig, prune_, save_model
from eigenprune.errors import WeightError
from eigenprune.layers import factored_parameters, low_rank_layers
from eigenprune.spectral import Spectrum, allocate, rank_options
from eigenprune.spectral.decompose import spectrum
from eigenprune.spectral.methods import find_method
from eigenprune.spectral.metric import layer_metric
from tests.helpers.compare import state_hashes, tied_groups
from tests.helpers.tiny_models import tiny_model, token_windows
from tests.reliability.tiny_checkpoint import ROUNDS

UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_g17_nan_and_infinity_are_found_first_and_named(value: float, place: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    weight = model.get_parameter(f"{UP}.weight")
    rows, columns = weight.shape
    spot = {"first": (0, 0), "middle": (rows // 2, columns // 3), "last": (rows - 1, columns - 1)}[place]
    with torch.no_grad():
        weight[spot] = value
    before = state_hashes(model)
    said = f"{UP} holds 1 NaN or infinite weights, the first at [{spot[0]}, {spot[1]}]"
    with pytest.raises(WeightError, match=re.escape(said)):
        prune_(model, EigenpruneConfig(keep=0.6), windows=token_windows(), progress=False)
    assert state_hashes(model) == before
    assert low_rank_layers(model) == {}


def test_g17_many_are_counted_and_the_first_is_named() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(f"{UP}.weight")[[5, 7], [3, 2]] = math.nan
    with pytest.raises(WeightError, match=r"2 NaN or infinite weights, the first at \[5, 3\]"):
        prune_(model, EigenpruneConfig(keep=0.6), windows=token_windows(), progress=False)


def _ranks(weights: dict[str, torch.Tensor], allocation: str) -> dict[str, int]:
    method = find_method("svd")
    options = {}
    for name, weight in weights.items():
        found = spectrum(weight, layer_metric(method, None, name, weight.device))
        options[name] = rank_options((weight.shape[0], weight.shape[1]), found, "pivot", 1)
    return {name: choice.rank for name, choice in allocate(options, 0.6, allocation).items()}


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_g18_a_power_of_two_changes_no_rank(allocation: str) -> None:
    weights = {name: p.detach() for name, p in tiny_model("llama").named_parameters() if name.endswith("proj.weight")}
    wanted = _ranks(weights, allocation)
    assert allocation == "uniform" or len(set(wanted.values())) > 2
    for power in (-100, -50, -10, -1, 1, 10, 50, 100):
        assert _ranks({name: weight * 2.0**power for name, weight in weights.items()}, allocation) == wanted, power


class Shared(nn.Module):
    """Two places for one block, a view of another weight, and one layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Linear(64, 64)
        self.again = self.block
        self.whole = nn.Linear(64, 128)
        self.part = nn.Linear(64, 64)
        self.part.weight = nn.Parameter(self.whole.weight[:64])
        self.own = nn.Linear(64, 64)


@pytest.mark.filterwarnings("ignore:method 'svd'")
def test_g22_shared_and_viewed_storage_is_found_by_storage_and_stays_shared() -> None:
    model = Shared()
    report = prune_(model, EigenpruneConfig(keep=0.6, method="svd", allocation="uniform"), progress=False)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert list(low_rank_layers(model)) == ["own"]
    assert all("tied" in reasons[name] for name in ("block", "whole", "part"))
    assert model.again is model.block
    assert model.part.weight.data_ptr() == model.whole.weight.data_ptr()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "albert"])
def test_g22_ties_survive_saving_and_loading_and_each_tensor_is_stored_once(kind: str, tmp_path: Path) -> None:
    auto: Any = AutoModelForCausalLM if kind in ("llama", "gpt2") else AutoModelForMaskedLM
    model = tiny_model(kind)
    prune_(model, EigenpruneConfig(keep=0.6), windows=token_windows(), progress=False)
    ties = tied_groups(model)
    assert ties
    folder = save_model(model, tmp_path / "model")
    loaded = auto.from_pretrained(folder)
    assert tied_groups(loaded) == ties
    assert state_hashes(loaded) == state_hashes(model)
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        stored = set(opened.keys())
    for names in ties:
        assert len(stored & set(names)) == 1
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert (folder / "model.safetensors").stat().st_size < size + 60_000  # pivots, buffers and the header


@settings(max_examples=200 * ROUNDS, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    layout=st.sampled_from(["pair", "pivot"]),
    multiple=st.integers(1, 40),
    keep=st.floats(0.05, 1.0),
    seed=st.integers(0, 1000),
)
def test_g23_a_layer_is_factored_only_where_that_saves_parameters(
    shape: tuple[int, int], layout: str, multiple: int, keep: float, seed: int
) -> None:
    m, n = shape
    energies = torch.rand(min(m, n), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    options = rank_options(shape, Spectrum(energies.sort(descending=True).values), layout, multiple)
    for rank, cost in zip(options.ranks.tolist(), options.costs.tolist(), strict=True):
        if rank:
            stored = (m - rank) * rank + rank * n if layout == "pivot" else rank * (m + n)
            assert cost == stored == factored_parameters(rank, m, n, layout) < m * n
            assert rank < (min(m, n) if layout == "pivot" else m * n / (m + n))
        else:
            assert cost == m * n
    smallest = min(options.costs.tolist())
    if keep * m * n >= smallest:
        choice = allocate({"x": options}, keep, "global")["x"]
        assert choice.cost <= keep * m * n
