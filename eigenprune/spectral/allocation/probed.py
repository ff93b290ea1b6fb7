# SPDX-License-Identifier: Apache-2.0
"""Allocations by what the model did with one matrix pruned at a time (ASVD, LEMS)."""

import dataclasses
from collections.abc import Mapping

import torch

from eigenprune.errors import ConfigError
from eigenprune.spectral.allocation.case import Case
from eigenprune.spectral.allocation.knapsack import exact_choice
from eigenprune.spectral.allocation.shares import block_of
from eigenprune.spectral.allocation.table import Solution, fill

ASVD_KEEPS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LEMS_RANK = 0.1  # of the rank at which a pair of factors is as large as the weight
LEMS_ALPHA, LEMS_GAMMA = 1.0, 0.0  # the paper searches them on a validation set; a gamma of 0 leaves depth out


def asvd_search(case: Case) -> Solution:
    """ASVD, arXiv 2312.05821: one cut of the measured loss for all; each matrix the least probed rank below it.

    The cut is the lowest at which the budget is met; what whole ranks leave goes to the matrices furthest below dense.
    """
    losses = torch.full_like(case.table.losses, torch.inf)
    losses[torch.arange(len(losses)), [len(o.ranks) - 1 for o in case.options.values()]] = -torch.inf  # dense
    for row, (name, options) in enumerate(case.options.items()):
        ranks = options.ranks.tolist()
        if len(ranks) > 1:
            for rank, loss in _probed(case, name).items():
                if rank in ranks:
                    losses[row, ranks.index(rank)] = loss
    cuts = losses[losses.isfinite()].unique()
    if not len(cuts):  # nothing was probed, because no matrix has a rank to choose
        return Solution((losses <= 0).double().argmax(1))
    low, high = 0, len(cuts) - 1
    while low < high:
        middle = (low + high) // 2
        spent = case.table.spent((losses <= cuts[middle]).double().argmax(1))
        low, high = (low, middle) if spent <= case.budget else (middle + 1, high)
    chosen = (losses <= cuts[low]).double().argmax(1)
    if case.table.spent(chosen) > case.budget:  # below the least rank that was probed
        chosen = torch.zeros_like(chosen)
    dense = case.table.dense.unsqueeze(1)
    return Solution(fill(case.table, chosen, case.budget, (1 - case.table.costs / dense).clamp_min(0) ** 2 * dense))


def lems(case: Case, alpha: float = LEMS_ALPHA, gamma: float = LEMS_GAMMA) -> Solution:
    """LEMS (2026): the KL measured at one small rank, spread over the ranks by the spectrum, weighted by depth.

    cost(r) = KL_ref (1 - E(r)) / (1 - E(r_ref)) depth(b), E(r) the energy of the first r components; then the knapsack.
    depth(b) = 1 + gamma sum_{k >= b} (k + 1)^-alpha / sum_k (k + 1)^-alpha for block b.
    """
    blocks = [block_of(name) for name in case.options]
    weights = [(k + 1) ** -alpha for k in range(max(blocks) + 1)]
    scales = []
    for (name, options), block in zip(case.options.items(), blocks, strict=True):
        if len(options.ranks) == 1:  # dense is all there is
            scales.append(0.0)
            continue
        rank, kl = min(_probed(case, name).items())
        at = options.ranks.tolist().index(rank) if rank in options.ranks.tolist() else 0
        depth = 1 + gamma * sum(weights[block:]) / sum(weights)
        lost = float(options.losses[at])
        scales.append(max(0.0, kl) * depth / lost if lost > 0 else 0.0)
    losses = case.table.losses * torch.tensor(scales, dtype=torch.float64).unsqueeze(1)
    losses = torch.where(case.table.losses.isinf(), torch.inf, losses)
    table = dataclasses.replace(case.table, losses=losses)
    found = exact_choice(table, case.budget)
    # The bound is one of nats of this cost, not of the estimated losses: none is given.
    return Solution(fill(table, found.chosen, case.budget, losses))


def _probed(case: Case, name: str) -> Mapping[int, float]:
    found = case.evidence.probed.get(name)
    if not found:
        raise ConfigError(f"this allocation needs measurements of every matrix, and {name} has none: see probe_ranks")
    return found
