# SPDX-License-Identifier: Apache-2.0
"""Measured times of layers: between grid points a straight line, kept per machine, and sound enough for a budget."""

import json
from pathlib import Path

import pytest
import torch

from eigenprune.errors import BudgetError, ConfigError
from eigenprune.evaluate import LayerTimes, layer_times
from eigenprune.spectral import Spectrum, rank_options, solve_allocation

TIMES = LayerTimes((64, 48), 8e-6, (8, 16, 32), (2e-6, 4e-6, 12e-6))


def test_times_lie_on_straight_lines_and_the_nearest_outside() -> None:
    expected = {0: 8e-6, 1: 2e-6, 8: 2e-6, 12: 3e-6, 16: 4e-6, 20: 6e-6, 32: 12e-6, 48: 12e-6}
    for rank, seconds in expected.items():
        assert TIMES.seconds(rank) == pytest.approx(seconds, rel=1e-12)
        assert TIMES.cost(rank) == round(seconds * 1e12)


def test_ranks_that_are_no_faster_are_no_choice() -> None:
    found = Spectrum(torch.linspace(2, 1, 48).double())
    options = rank_options((64, 48), found, "pivot", 4, cost=TIMES.cost)
    assert options.ranks.tolist() == [8, 12, 16, 20, 0]  # at 24 the time is that of dense; 4 costs what 8 does
    assert options.costs.tolist() == [2_000_000, 3_000_000, 4_000_000, 6_000_000, 8_000_000]
    choice = solve_allocation({"x": options}, 0.6, "global").choices["x"]
    assert choice.rank == 16


def test_where_nothing_is_faster_the_budget_error_says_so() -> None:
    slow = LayerTimes((64, 48), 1e-6, (8, 48), (2e-6, 3e-6))
    options = rank_options((64, 48), Spectrum(torch.ones(48).double()), "pivot", 8, cost=slow.cost)
    assert options.ranks.tolist() == [0]
    with pytest.raises(BudgetError, match="no rank is cheaper than the dense weights"):
        solve_allocation({"x": options}, 0.9, "global")


def test_a_measurement_is_kept_and_read_again(tmp_path: Path) -> None:
    first = layer_times((96, 64), "pivot", dtype=torch.float32, cache_dir=tmp_path)
    assert first.dense > 0
    assert first.ranks[-1] == 63
    assert len(first.ranks) == len(first.factored)
    assert all(seconds > 0 for seconds in first.factored)
    (file,) = (tmp_path / "layer-times").iterdir()
    file.write_text(json.dumps({"shape": [96, 64], "dense": 1.0, "ranks": [8], "factored": [0.5]}))
    assert layer_times((96, 64), "pivot", dtype=torch.float32, cache_dir=tmp_path).dense == 1.0
    file.write_text("{")
    assert layer_times((96, 64), "pivot", dtype=torch.float32, cache_dir=tmp_path).dense < 1.0
    for other in ({"layout": "pair"}, {"dtype": torch.bfloat16}, {"tokens": 4}):
        layer_times((96, 64), **({"layout": "pivot", "dtype": torch.float32, "cache_dir": tmp_path} | other))
    assert len(list((tmp_path / "layer-times").iterdir())) == 4


def test_a_layer_hundreds_of_times_as_large_takes_longer() -> None:
    small = layer_times((64, 64), "pivot", dtype=torch.float32)
    large = layer_times((2048, 1024), "pivot", dtype=torch.float32)
    assert large.dense > 2 * small.dense
    assert large.seconds(1024) > large.seconds(32)


def test_no_token_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="tokens=0 must be at least 1"):
        layer_times((8, 8), "pair", dtype=torch.float32, tokens=0)
