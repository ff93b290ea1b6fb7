# SPDX-License-Identifier: Apache-2.0
"""Put factored layers in the place of dense ones."""

from torch import nn

from eigenprune.layers import dense_weight, low_rank_layers, replace_module_
from eigenprune.memory import page_span, release_pages, release_unused
from eigenprune.prune.channels import reduced_layers
from eigenprune.prune.measure import Measured
from eigenprune.prune.run import Run
from eigenprune.spectral import Allocation, Decomposed, factor_sequentially_, layer_of_factors


def factor_(
    run: Run, dense: dict[str, nn.Module], found: Allocation, decomposed: Decomposed, measured: Measured
) -> None:
    """Replace the `dense` layers that have a rank, or lose channels, in place.

    Without `run.restore_on_error`, they are taken out of the dict one by one, so that their memory goes.
    """
    ranks = {name: choice.rank for name, choice in found.choices.items() if choice.rank}
    if run.method.shift is not None and measured.statistics is not None and measured.windows is not None:
        factor_sequentially_(
            run.model,
            dense,
            ranks,
            run.method,
            measured.statistics,
            measured.windows,
            run.config.layout,
            cache_dir=run.cache_dir,
            keep_dense=run.restore_on_error,
            progress=run.progress,
        )
    for group, kept in found.kept.items():
        own = {name: dense[name] if run.restore_on_error else dense.pop(name) for name in group.names}
        for name, layer in reduced_layers(group, own, kept, found, run, measured):
            replace_module_(run.model, name, layer)
            ranks.pop(name, None)
        release_unused()
    finished = low_rank_layers(run.model)
    for name in run.bar((name for name in ranks if name not in finished), "factors"):
        module = dense[name] if run.restore_on_error else dense.pop(name)
        left, right = decomposed.components(name, module, ranks[name]).truncated(ranks[name])
        replace_module_(run.model, name, layer_of_factors(module, left, right, run.config.layout))
        span = (0, 0) if run.restore_on_error else page_span(dense_weight(module))
        del module, left, right
        release_pages(span)
        release_unused()
