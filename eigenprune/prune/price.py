# SPDX-License-Identifier: Apache-2.0
"""What a layer costs in the unit of the budget of a run."""

from torch import Tensor

from eigenprune.evaluate import LayerTimes, layer_times
from eigenprune.prune.run import Run
from eigenprune.spectral import Cost, layer_cost


def layer_price(run: Run, shape: tuple[int, int], weight: Tensor) -> Cost:
    """Of a layer of that `shape` (out, in), at each rank; in the dtype and on the device of `weight`.

    A rank that `config.faster_at` rules out costs as much as the dense layer, and so is no choice.
    """
    counted = _counted(run, shape, weight)
    measured = [_times(run, shape, weight, tokens) for tokens in run.config.faster_at]
    if not measured:
        return counted
    return lambda rank: counted(rank if all(times.seconds(rank) <= times.dense for times in measured) else 0)


def _counted(run: Run, shape: tuple[int, int], weight: Tensor) -> Cost:
    if run.config.budget == "latency":
        return _times(run, shape, weight, tokens=1).cost
    return layer_cost(run.config.budget, shape, run.config.layout, weight.element_size())


def _times(run: Run, shape: tuple[int, int], weight: Tensor, tokens: int) -> LayerTimes:
    return layer_times(
        shape, run.config.layout, dtype=weight.dtype, device=weight.device, tokens=tokens, cache_dir=run.cache_dir
    )
