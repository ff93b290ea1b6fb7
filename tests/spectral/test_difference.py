# SPDX-License-Identifier: Apache-2.0
"""Thin factors of a difference, against the SVD written out and against the optimum in a metric."""

import pytest
import torch
from torch import Tensor

from eigenprune.errors import ConfigError
from eigenprune.spectral import Metric
from eigenprune.spectral.difference import thin_difference
from eigenprune.spectral.metric import square_root

OUT, IN = 20, 14
# An SVD in float64 of values near one: some hundred roundings.
EXACT = 1e-12


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(size: int, seed: int) -> Tensor:
    samples = random(size, 3 * size, seed=seed)
    return samples @ samples.t() / (3 * size)


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
@pytest.mark.parametrize("rank", [1, 5, IN, 1000])
def test_plain_factors_are_the_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    difference = random(*shape)
    u, s, vh = torch.linalg.svd(difference, full_matrices=False)
    best = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    thin = thin_difference(difference, Metric(), rank=rank)
    assert thin.rank == min(rank, IN)
    assert float((thin.left @ thin.right - best).abs().max()) <= EXACT * float(s[0])
    assert thin.energy == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), rel=EXACT)
    assert torch.allclose(thin.left.norm(dim=0), thin.right.norm(dim=1))


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_energy_takes_the_least_rank_that_reaches_it(energy: float) -> None:
    difference = random(OUT, IN)
    kept = torch.linalg.svdvals(difference).square().cumsum(0)
    kept = kept / kept[-1]
    thin = thin_difference(difference, Metric(), energy=energy)
    assert kept[thin.rank - 1] >= energy - EXACT
    assert thin.rank == 1 or kept[thin.rank - 2] < energy
    assert thin_difference(difference, Metric(), rank=2, energy=energy).rank == min(2, thin.rank)


def test_full_energy_of_a_low_rank_difference_is_its_rank() -> None:
    thin = thin_difference(random(OUT, 3) @ random(3, IN, seed=1), Metric(), energy=1.0)
    assert thin.rank == 3


def test_in_a_metric_no_other_product_of_the_rank_is_nearer() -> None:
    difference = random(OUT, IN)
    metric = Metric(square_root(gram(OUT, 1)), square_root(gram(IN, 2)))

    def length(left_over: Tensor) -> float:
        return float(metric.inner.right_multiply(metric.output.transposed_multiply(left_over)).norm())

    thin = thin_difference(difference, metric, rank=4)
    lost = length(difference - thin.left @ thin.right)
    s = torch.linalg.svdvals(metric.inner.right_multiply(metric.output.transposed_multiply(difference)))
    assert lost == pytest.approx(float(s[4:].norm()), rel=1e-9)  # Eckart and Young: the optimum
    plain = thin_difference(difference, Metric(), rank=4)
    assert lost < length(difference - plain.left @ plain.right)


def test_nothing_differs_gives_factors_of_nothing() -> None:
    thin = thin_difference(torch.zeros(OUT, IN), Metric(), rank=3, energy=0.5)
    assert not (thin.left @ thin.right).any()
    assert thin.energy == 1


@pytest.mark.parametrize(
    ("rank", "energy", "says"),
    [(None, None, "say the rank"), (0, None, "at least 1"), (None, 0.0, "0, 1"), (3, 1.5, "0, 1")],
)
def test_settings_out_of_range_are_refused(rank: int | None, energy: float | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        thin_difference(random(OUT, IN), Metric(), rank=rank, energy=energy)
