# SPDX-License-Identifier: Apache-2.0
"""Rank and bits of a layer as one choice: what each pair costs in bytes, and what it loses.

A factored weight W' stands for W, and its rounded form W'' for W'. The rounding errors have no part in the direction of
what was cut off, so that in the metric `|| W - W'' ||^2` is about `|| W - W' ||^2 + || W' - W'' ||^2`. The first term
is the tail of the spectrum; the second is measured, by quantising for real, at a few ranks, and between them its
logarithm is taken to be linear in that of the rank.
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from math import exp, log
from pathlib import Path

import torch
from torch import Tensor, nn

from eigenprune.layers import BITS, dense_weight, quantised_bytes
from eigenprune.layers.quantised import INT4_GROUPS
from eigenprune.quantize.tensors import quantised_weight
from eigenprune.spectral import Decomposed, Metric, Options, layer_of_factors

MEASURED_RANKS = 4
FILE = "rounding.jsonl"


def rounding_loss(metric: Metric, before: Tensor, after: Tensor) -> float:
    """1/2 || R (before - after) S ||_F^2: what replacing one weight [m, n] by the other adds to the loss (kfac)."""
    error = before.double() - after.double()
    return 0.5 * float(metric.inner.right_multiply(metric.output.transposed_multiply(error)).square().sum())


class KeptLosses:
    """Measured losses in a file of `folder`, one line each, so that no run measures them twice; None keeps nothing.

    A line that is damaged is not used.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file = None if folder is None or not folder.is_dir() else folder / FILE
        self._known: dict[tuple[object, ...], float] = {}
        if self._file is not None and self._file.exists():
            for line in self._file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    *key, loss = json.loads(line)
                    self._known[tuple(key)] = float(loss)
                except (ValueError, TypeError):
                    continue

    def find(self, *key: str | int) -> float | None:
        """The loss under `key`, None where it was not measured."""
        return self._known.get(key)

    def keep(self, loss: float, *key: str | int) -> None:
        """Remember `loss` under `key`."""
        self._known[key] = loss
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps([*key, loss]) + "\n")


def options_with_bits(
    name: str,
    module: nn.Module,
    options: Options,
    decomposed: Decomposed,
    layout: str,
    asked: int | str | None,
    kept: KeptLosses | None = None,
) -> Options:
    """`options` of the dense layer `module`, which are in floating point and bytes, in the bits that are `asked` for.

    `asked` is 8 or 4, or `auto`: floating point, 8 and 4. The dense weight in floating point stays the last option, as
    what `keep` is a fraction of; where bits are asked for and the layer can have them, it is none to choose: its loss
    is infinite. In int4, ranks that full groups of 32 do not divide are left out where there are others.
    """
    allowed = BITS if not isinstance(asked, int) else (asked,)
    ranks = [int(rank) for rank in options.ranks if rank]
    losses = dict(zip(ranks, options.losses.tolist(), strict=False))
    costs = dict(zip(ranks, options.costs.tolist(), strict=False))
    rows: list[tuple[float, float, int, int]] = []  # cost, loss, rank, bits
    if asked not in BITS:
        rows += [(costs[rank], losses[rank], rank, 0) for rank in ranks]
    shape = dense_weight(module).shape
    dense_cost = float(options.costs[-1])
    measured = _Measured(name, module, decomposed, layout, kept or KeptLosses(None))
    for bits in allowed:
        usable = _usable(ranks, bits)
        added = measured.between(usable, bits)
        rows += [
            (float(factored_bytes(rank, shape, layout, bits)), losses[rank] + more, rank, bits)
            for rank, more in zip(usable, added, strict=True)
        ]
        if type(module) is nn.Linear:
            rows.append((float(quantised_bytes(bits, *shape)), measured.at(0, bits), 0, bits))
    rows = sorted(row for row in rows if row[0] < dense_cost)
    forbidden = asked in BITS and type(module) is nn.Linear
    rows.append((dense_cost, torch.inf if forbidden else 0.0, 0, 0))
    return Options(
        ranks=torch.tensor([row[2] for row in rows]),
        costs=torch.tensor([int(row[0]) for row in rows]),
        losses=torch.tensor([row[1] for row in rows], dtype=torch.float64),
        whole=options.whole,
        bits=torch.tensor([row[3] for row in rows]),
    )


def factored_bytes(rank: int, shape: Sequence[int], layout: str, bits: int) -> int:
    """What the factors of a weight `shape` [m, n] take on disk at `rank`, pivots included."""
    m, n = shape
    rows = m - rank if layout == "pivot" else m
    index = 4 * rank if layout == "pivot" else 0
    return quantised_bytes(bits, rows, rank) + quantised_bytes(bits, rank, n) + index


def _usable(ranks: list[int], bits: int) -> list[int]:
    """In int4 the ranks with the largest groups, the fewest scales; where there are none, all."""
    whole = [rank for rank in ranks if rank % INT4_GROUPS[0] == 0]
    return whole if bits == 4 and whole else ranks


class _Measured:
    """What rounding adds to the loss of one layer."""

    def __init__(self, name: str, module: nn.Module, decomposed: Decomposed, layout: str, kept: KeptLosses) -> None:
        self.name, self.module, self.decomposed, self.layout, self.kept = name, module, decomposed, layout, kept
        self._metric: Metric | None = None

    def between(self, ranks: list[int], bits: int) -> list[float]:
        """At all of `ranks`, rising: measured at a few, the others between them."""
        if not ranks:
            return []
        count = min(MEASURED_RANKS, len(ranks))
        places = sorted({round(i * (len(ranks) - 1) / max(1, count - 1)) for i in range(count)})
        known = [ranks[place] for place in places]
        values = [max(self.at(rank, bits), 1e-300) for rank in known]
        return [_interpolated(rank, known, values) for rank in ranks]

    def at(self, rank: int, bits: int) -> float:
        """At `rank`, 0 for the dense weight."""
        key = (self.name, self.layout if rank else "dense", bits, rank)
        found = self.kept.find(*key)
        if found is None:
            found = self._measure(rank, bits)
            self.kept.keep(found, *key)
        return found

    def _measure(self, rank: int, bits: int) -> float:
        if self._metric is None:
            self._metric = self.decomposed.metric(self.name, self.module)
        if rank == 0:
            weight = dense_weight(self.module).detach()
            return rounding_loss(self._metric, weight, quantised_weight(weight, bits).dequantize())
        found = self.decomposed.components(self.name, self.module, rank)
        layer = layer_of_factors(self.module, *found.truncated(rank), self.layout).requires_grad_(False)
        before = layer.weight.clone()
        for part in (layer.left, layer.right):
            if part.weight.numel():
                part.weight = nn.Parameter(quantised_weight(part.weight, bits).dequantize(), requires_grad=False)
        after = layer.weight
        if layer.conv1d:
            before, after = before.t(), after.t()
        return rounding_loss(self._metric, before, after)


def _interpolated(rank: int, known: list[int], values: list[float]) -> float:
    at = bisect_left(known, rank)
    if known[min(at, len(known) - 1)] == rank:
        return values[at]
    low, high = known[at - 1], known[at]
    part = (log(rank) - log(low)) / (log(high) - log(low))
    return exp(log(values[at - 1]) + part * (log(values[at]) - log(values[at - 1])))
