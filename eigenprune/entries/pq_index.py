# SPDX-License-Identifier: Apache-2.0
"""How much of each tensor to keep by its PQ index (SAP: Diao et al., ICLR 2023, arXiv 2302.05601)."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from eigenprune.entries.budget import share_of

STEPS = 100  # of bisection; each halves the interval


def pq_index(blocks: Iterable[Tensor]) -> float:
    """`1 - d^(1/q - 1/p) ||w||_p / ||w||_q` with p = 1/2, q = 1: 0 for equal magnitudes, towards 1 for few large ones.

    At these norms the paper's bound on the entries that have to stay is `d (1 - index)`.

    Args:
        blocks: of the d entries w; a tensor of zeros has index 0.
    """
    entries, roots, total = 0, 0.0, 0.0
    for block in blocks:
        size = block.abs()
        entries += size.numel()
        total += float(size.sum(dtype=torch.float64))
        roots += float(size.sqrt().sum(dtype=torch.float64))
    return max(0.0, 1 - roots**2 / (entries * total)) if total else 0.0


def shares_by_index(sizes: Mapping[str, int], index: Mapping[str, float], keep: float) -> dict[str, int]:
    """{tensor: entries to keep}, together `keep` of all: of each the part `min(gamma index, beta)` is pruned.

    The paper prunes with a given gamma, again and again between epochs of training; here gamma is what meets the
    budget. beta, the most of one tensor that may go, is all but a tenth of `keep`.
    """
    budget = share_of(keep, sum(sizes.values()))
    most = 1 - keep / 10

    def wanted(gamma: float) -> dict[str, float]:
        return {name: size * (1 - min(gamma * max(index[name], 1e-9), most)) for name, size in sizes.items()}

    low, high = 0.0, 1e9
    for _ in range(STEPS):
        gamma = (low + high) / 2
        low, high = (gamma, high) if sum(wanted(gamma).values()) > budget else (low, gamma)
    exact = wanted(high)
    counts = {name: math.floor(share) for name, share in exact.items()}
    rest = sorted(exact, key=lambda name: counts[name] - exact[name])  # the largest remainder first
    missing = budget - sum(counts.values())
    while missing:
        step = 1 if missing > 0 else -1
        for name in rest:
            if missing and 0 <= counts[name] + step <= sizes[name]:
                counts[name] += step
                missing -= step
    return counts
