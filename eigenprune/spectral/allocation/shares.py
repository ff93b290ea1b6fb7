# SPDX-License-Identifier: Apache-2.0
"""Allocations by share: each matrix a part of the budget that a formula names, and what whole ranks leave filled."""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from eigenprune.spectral.allocation.case import Case
from eigenprune.spectral.allocation.table import Solution, Table, fill

LEAST_PART = 0.5  # of the uniform share, for every matrix: Swift-SVD's delta, without which SVD-LLM v2's rule fails
SWIFT_ALPHA = 0.5


def uniform(case: Case) -> Solution:
    """Every matrix the same share of itself, what is left to those furthest below it."""
    return Solution(_by_share(case.table, case.budget, case.keep * case.table.dense, case.table.dense))


def fisher(case: Case) -> Solution:
    """Shares in proportion to the Fisher information of the weights (Palu, arXiv 2407.21118), none above dense."""
    weights = torch.tensor(case.of_all("Fisher information", case.evidence.fisher), dtype=torch.float64)
    return _weighted(case, weights, case.budget, torch.zeros_like(weights))


def swift(case: Case) -> Solution:
    """Swift-SVD, arXiv 2604.01609: half of the uniform share to all, the rest by importance and loss.

    score = importance^alpha log(e + eps)^(1 - alpha): `importance` the influence of the block, stretched to [1, 2] over
    the model; `eps` the error of the outputs over the calibration tokens at uniform ranks. The paper chooses alpha on a
    validation set of 11 candidates; here it is 0.5.
    """
    influence = torch.tensor(case.of_all("influence", case.evidence.influence), dtype=torch.float64)
    spread = float(influence.max() - influence.min())
    importance = 1 + (influence - influence.min()) / spread if spread > 0 else torch.ones_like(influence)
    errors = _errors_at_uniform(case)
    scores = importance**SWIFT_ALPHA * (math.e + errors).log() ** (1 - SWIFT_ALPHA)
    floor = LEAST_PART * case.keep * case.table.dense
    return _weighted(case, scores * case.table.dense, case.budget - float(floor.sum()), floor)


def svd_llm_v2(case: Case) -> Solution:
    """SVD-LLM v2, arXiv 2503.12340: within each type of matrix, the removed ratio goes as 1 / log(error).

    error: Frobenius norm of the outputs' error over the calibration tokens at uniform ranks, at least e^2 here, below
    which the rule turns round. Every matrix keeps half of its uniform share at least; the paper has no such guard.
    """
    inverse = 1 / _errors_at_uniform(case).clamp_min(math.e**2).log()
    kinds = [re.sub(r"\d+", "#", name) for name in case.options]
    removed = torch.empty_like(inverse)
    for kind in dict.fromkeys(kinds):
        rows = torch.tensor([row for row, other in enumerate(kinds) if other == kind])
        removed[rows] = len(rows) * (1 - case.keep) * inverse[rows] / inverse[rows].sum()
    floor = LEAST_PART * case.keep * case.table.dense
    above = ((1 - removed) * case.table.dense - floor).clamp_min(0)
    shares = floor + above * min(1.0, (case.budget - float(floor.sum())) / max(float(above.sum()), 1e-300))
    return Solution(_by_share(case.table, case.budget, shares, shares))


def energy(case: Case) -> Solution:
    """One threshold for all: every matrix the least rank that keeps the same part of its energy, as high as fits."""
    whole = torch.tensor([o.whole for o in case.options.values()], dtype=torch.float64).clamp_min(1e-300)
    lost = torch.where(case.table.costs.isinf(), torch.inf, case.table.losses / whole.unsqueeze(1))
    levels = lost[lost.isfinite()].unique()  # by rising loss, so by falling cost
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if case.table.spent(_cheapest_within(lost, float(levels[middle]))) <= case.budget:
            high = middle
        else:
            low = middle + 1
    chosen = _cheapest_within(lost, float(levels[low]))
    return Solution(fill(case.table, chosen, case.budget, lost))


def _cheapest_within(lost: Tensor, level: float) -> Tensor:
    """The first option of every matrix that loses at most `level`, [matrices]."""
    return (lost <= level).double().argmax(1)


def _errors_at_uniform(case: Case) -> Tensor:
    """[matrices]: Frobenius norm of each matrix' output error, in its metric, over all tokens, at uniform ranks."""
    chosen = uniform(case).chosen
    losses = case.table.losses.gather(1, chosen.unsqueeze(1)).squeeze(1)
    return (2 * losses * case.evidence.tokens).clamp_min(0).sqrt()


def _weighted(case: Case, weights: Tensor, budget: float, floor: Tensor) -> Solution:
    """Shares `floor` and `budget` in proportion to `weights`; what some cannot use, being dense, goes to the others."""
    dense = case.table.dense
    weights = weights.clamp_min(0) + 1e-12 * weights.max().clamp_min(1e-300)
    low, high = 0.0, float((dense / weights).max())
    for _ in range(200):
        middle = (low + high) / 2
        if float(torch.minimum(dense - floor, middle * weights).sum()) <= budget:
            low = middle
        else:
            high = middle
    shares = floor + torch.minimum(dense - floor, low * weights)
    return Solution(_by_share(case.table, case.budget, shares, shares))


def _by_share(table: Table, budget: float, shares: Tensor, aims: Tensor) -> Tensor:
    """The option nearest below its share in every matrix, and the rest to those furthest below their aims; [matrices].

    Args:
        shares: [matrices], the cost that each may have.
        aims: [matrices], the cost that filling strives for.
    """
    fits = table.costs <= shares.unsqueeze(1) * (1 + 1e-12)
    chosen = (fits.sum(1) - 1).clamp_min(0)
    if table.spent(chosen) > budget:  # small matrices whose smallest rank is above their share
        chosen = _cheapened(table, chosen, budget)
    # Fill by lowest kept part after the upgrade: as if every matrix lost the square of what it is short of its aim.
    short = (1 - table.costs / aims.clamp_min(1e-300).unsqueeze(1)).clamp_min(0) ** 2 * aims.unsqueeze(1)
    limited = torch.where(_at_most_one_above(fits), short, torch.inf)
    return fill(table, chosen, budget, limited)


def _cheapened(table: Table, chosen: Tensor, budget: float) -> Tensor:
    """`chosen` with all matrices taken down together, by the same number of options, until it fits."""
    while table.spent(chosen) > budget:
        chosen = (chosen - 1).clamp_min(0)
    return chosen


def _at_most_one_above(fits: Tensor) -> Tensor:
    """`fits` with the first option above it added."""
    shifted = torch.cat([torch.ones_like(fits[:, :1]), fits[:, :-1]], 1)
    return fits | shifted


def block_of(name: str) -> int:
    """The number of the block in a module's name: the first number in it, 0 where there is none."""
    found: Sequence[str] = re.findall(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[0]) if found else 0
