# SPDX-License-Identifier: Apache-2.0
"""Measuring what an allocation needs beside the options."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from eigenprune.calibrate import Statistics
from eigenprune.calibrate.cache import cache_key, windows_hash
from eigenprune.errors import ConfigError
from eigenprune.layers import dense_weight
from eigenprune.spectral.allocation import ASVD_KEEPS, LEMS_RANK, Evidence
from eigenprune.spectral.decomposed import Decomposed
from eigenprune.spectral.ordered import first_order_changes
from eigenprune.spectral.probe import block_influence, probe_ranks
from eigenprune.spectral.worth import Options

GRADIENTS = {"fisher": "weight_gradient_square", "changes": "weight_gradient"}  # kinds of statistics, by need
FORWARD = ("influence", "probe-kl", "probe-loss")
PROBE_WINDOWS, PROBE_TOKENS = 4, 256  # every probe runs the model over these


def gather_evidence(
    need: str,
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    options: Mapping[str, Options],
    decomposed: Decomposed,
    *,
    layout: str,
    gradients: Statistics | None = None,
    windows: Tensor | None = None,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Evidence:
    """Evidence for an allocation with that `need`, see `AllocationRow`.

    Args:
        need: one word, or none.
        model: dense, in memory; it ends as it was.
        layers: that the budget counts, by name.
        options: theirs.
        decomposed: theirs, by the method at work.
        layout: of the layers that probes put in.
        gradients: statistics that hold the kind `GRADIENTS[need]`.
        windows: [windows, window] int64, for the needs in `FORWARD`.
        cache_dir: where probes are kept.
        progress: show bars on standard error.

    Raises:
        ConfigError: the need is of windows, and there are none.
        CalibrationError: the statistics do not hold what is needed.
    """
    tokens = decomposed.statistics.facts.tokens if decomposed.statistics is not None else 1
    if need in GRADIENTS:
        if gradients is None:
            raise ConfigError(f"this allocation needs the statistics {GRADIENTS[need]}: pass texts")
        if need == "fisher":
            heights = {name: dense_weight(module).shape[0] for name, module in layers.items()}
            sums = {name: float(gradients.weight_gradient_square(name).double().sum()) for name in layers}
            return Evidence(tokens, fisher={name: heights[name] * sums[name] for name in layers})
        return Evidence(tokens, changes={name: _changes(name, layers[name], decomposed, gradients) for name in layers})
    if need in FORWARD:
        if windows is None:
            raise ConfigError("this allocation runs the model: pass texts or windows")
        few = windows[:PROBE_WINDOWS, :PROBE_TOKENS]
        if need == "influence":
            return Evidence(tokens, influence=block_influence(model, few, list(layers)))
        measure = need.removeprefix("probe-")
        facts = "" if decomposed.statistics is None else decomposed.statistics.facts.texts_hash
        settings = [repr(decomposed.method), str(decomposed.seed), facts, layout, measure]
        key = cache_key(model, windows_hash(few), settings)
        probed = probe_ranks(
            model,
            layers,
            lambda name, rank: decomposed.layer(name, layers[name], rank, layout),
            {name: _ranks_to_probe(measure, dense_weight(layers[name]).shape, o) for name, o in options.items()},
            few,
            measure=measure,
            file=None if cache_dir is None else cache_dir / f"probes-{key}.jsonl",
            progress=progress,
        )
        return Evidence(tokens, probed=probed)
    return Evidence(tokens)


def _changes(name: str, module: nn.Module, decomposed: Decomposed, gradients: Statistics) -> Tensor:
    weight = dense_weight(module).detach()
    found = decomposed.components(name, module, min(weight.shape))
    return first_order_changes(weight, gradients.weight_gradient(name), found)


def _ranks_to_probe(measure: str, shape: tuple[int, ...], options: Options) -> list[int]:
    """LEMS: the rank nearest to a tenth of the break-even one. ASVD: the largest rank within each of its keeps."""
    ranks = [rank for rank in options.ranks.tolist() if rank]
    if not ranks:
        return []
    if measure == "kl":
        wanted = LEMS_RANK * shape[0] * shape[1] / (shape[0] + shape[1])
        return [min(ranks, key=lambda rank: abs(rank - wanted))]
    dense = int(options.costs[-1])
    costs = options.costs.tolist()
    within = [
        max((r for r, c in zip(ranks, costs, strict=False) if c <= keep * dense), default=0) for keep in ASVD_KEEPS
    ]
    return sorted({rank for rank in within if rank})
