# SPDX-License-Identifier: Apache-2.0
"""An optimizer's state for the factors of a layer, carried to other factors of the same weight."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from eigenprune.errors import ConfigError
from eigenprune.layers import LowRankLinear

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def mapped_states(
    optimizer: Any, layer: LowRankLinear, left_map: Tensor, right_map: Tensor
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states of `left left_map` and `right_map right`, whose product is that of left [out, r] and right [r, in].

    With W = L R before and L' = L P, R' = Q R, the gradients of the same dense gradient G are G R'^T = (G R^T) Q^T and
    L'^T G = P^T (L^T G). First moments follow exactly so; second moments, sums of squares, with the squared entries of
    Q and P, as if the gradients of different components were uncorrelated.

    Args:
        optimizer: of torch, or wrapped by accelerate; None has no state.
        layer: of layout `pair`.
        left_map: P, [r, k].
        right_map: Q, [k, r].
    """
    return (
        _mapped(_state(optimizer, layer.left.weight), lambda moment, power: moment @ (right_map**power).t()),
        _mapped(_state(optimizer, layer.right.weight), lambda moment, power: (left_map**power).t() @ moment),
    )


def check_state(optimizer: Any, layer: LowRankLinear, name: str) -> None:
    """Refuse an optimizer whose state of the factors of `layer` could not be carried along.

    Raises:
        ConfigError: it keeps something of a factor's shape under a name that is unknown here.
    """
    known = FIRST_MOMENTS + SECOND_MOMENTS
    for child in (layer.left, layer.right):
        for key, value in _state(optimizer, child.weight).items():
            if isinstance(value, Tensor) and value.shape == child.weight.shape and key not in known:
                raise ConfigError(
                    f"the optimizer keeps {key!r} for {name}, which has no known form at another rank: clear its state "
                    f"(optimizer.state.clear()) or use one that keeps {', '.join(known)}"
                )


def _state(optimizer: Any, parameter: Tensor) -> dict[str, Any]:
    states = getattr(optimizer, "state", None)
    return states[parameter] if states is not None and parameter in states else {}


def _mapped(state: dict[str, Any], turned: Callable[[Tensor, int], Tensor]) -> dict[str, Any]:
    mapped = dict(state)
    for power, names in ((1, FIRST_MOMENTS), (2, SECOND_MOMENTS)):
        for key in names:
            if isinstance(state.get(key), Tensor):
                mapped[key] = turned(state[key].double(), power).to(state[key].dtype).contiguous()
    return mapped
