# SPDX-License-Identifier: Apache-2.0
"""What a layer costs in the unit of the budget of a run."""

from torch import Tensor

from eigenprune.evaluate import layer_times
from eigenprune.prune.run import Run
from eigenprune.spectral import Cost, layer_cost


def layer_price(run: Run, shape: tuple[int, int], weight: Tensor) -> Cost:
    """Of a layer of that `shape` (out, in), at each rank; in the dtype and on the device of `weight`."""
    if run.config.budget == "latency":
        times = layer_times(shape, run.config.layout, dtype=weight.dtype, device=weight.device, cache_dir=run.cache_dir)
        return times.cost
    return layer_cost(run.config.budget, shape, run.config.layout, weight.element_size())
