# SPDX-License-Identifier: Apache-2.0
"""From statistics to a rank for every layer."""

from collections.abc import Mapping

from torch import nn

from eigenprune.calibrate.cache import cache_key
from eigenprune.layers import dense_weight
from eigenprune.memory import release_unused
from eigenprune.prune.channels import grouped_options
from eigenprune.prune.measure import Measured
from eigenprune.prune.price import layer_price
from eigenprune.prune.run import Run
from eigenprune.quantize import KeptLosses, options_with_bits
from eigenprune.spectral import (
    ALLOCATIONS,
    MOST_BYTES,
    Allocation,
    Decomposed,
    Options,
    component_bytes,
    gather_evidence,
    probed_scales,
    rank_options,
    scaled,
    solve_allocation,
)


def decompose(run: Run, layers: Mapping[str, nn.Module], measured: Measured) -> Decomposed:
    """The components of all layers, kept on disk for the next budget where they have a name there."""
    folder = None
    if measured.own and measured.statistics is not None and component_bytes(layers) <= MOST_BYTES:
        facts = measured.statistics.facts
        settings = [repr(run.method), str(run.config.seed), str(run.config.prior), *map(str, vars(facts).values())]
        folder = run.cache_dir / f"components-{cache_key(run.model, facts.texts_hash, settings)}"
    return Decomposed(run.method, measured.statistics, run.config.seed, folder)


def choose_ranks(run: Run, layers: Mapping[str, nn.Module], decomposed: Decomposed, measured: Measured) -> Allocation:
    """The ranks, after measuring what it takes to choose them.

    Raises:
        BudgetError: `keep` is below what the smallest ranks take.
    """
    grouped = grouped_options(run, layers, decomposed, measured)
    with run.clock("spectra"):
        alone = {name: layer for name, layer in layers.items() if name not in grouped.layers}
        options = _options(run, alone, decomposed) | grouped.options
    if run.method.probe and measured.statistics is not None and measured.windows is not None:
        with run.clock("probes"):
            scales = probed_scales(
                run.model,
                layers,
                options,
                run.method,
                measured.statistics,
                measured.windows,
                cache_dir=run.cache_dir,
                progress=run.progress,
            )
        options = scaled(options, scales)
    if run.config.bits is not None and run.config.budget == "bytes":
        with run.clock("quantisation losses"):
            options = _with_bits(run, layers, options, decomposed)
    with run.clock("allocation"):
        evidence = gather_evidence(
            ALLOCATIONS[run.allocation].needs,
            run.model,
            layers,
            options,
            decomposed,
            layout=run.config.layout,
            gradients=measured.gradients,
            windows=measured.windows,
            cache_dir=run.cache_dir,
            progress=run.progress,
        )
        found = solve_allocation(options, run.config.keep, run.allocation, evidence)
    return grouped.expanded(found, layers)


def _options(run: Run, layers: Mapping[str, nn.Module], decomposed: Decomposed) -> dict[str, Options]:
    """What every rank of every layer costs, in the unit of the budget, and loses."""
    options: dict[str, Options] = {}
    for name in run.bar(layers, "spectra"):
        found = decomposed.spectrum(name, layers[name])
        weight = dense_weight(layers[name])
        shape = (weight.shape[0], weight.shape[1])
        options[name] = rank_options(
            shape,
            found,
            run.config.layout,
            run.config.rank_multiple,
            cost=layer_price(run, shape, weight),
            min_keep=run.config.min_keep,
        )
        release_unused()
    return options


def _with_bits(
    run: Run, layers: Mapping[str, nn.Module], options: Mapping[str, Options], decomposed: Decomposed
) -> dict[str, Options]:
    """The options of every layer in the bits that `run` allows, with what rounding adds to the loss."""
    kept = KeptLosses(decomposed.folder)
    widened = {}
    for name in run.bar(layers, "quantisation losses"):
        widened[name] = options_with_bits(
            name, layers[name], options[name], decomposed, run.config.layout, run.config.bits, kept
        )
        release_unused()
    return widened
