# SPDX-License-Identifier: Apache-2.0
"""Cut the rank of factored layers in the middle of their training, and take the optimizer along."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eigenprune.errors import ConfigError
from eigenprune.layers import LowRankLinear, low_rank_layers
from eigenprune.spectral import pivot_factors

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


@torch.no_grad()
def retruncate_(model: nn.Module, ranks: Mapping[str, int], *, optimizer: Any = None) -> nn.Module:
    """Bring factored layers to smaller ranks, in place, keeping the largest singular components of their weights.

    The factors become new parameters, which take the places of the old ones in the optimizer; wrap the model (DDP,
    FSDP) and compile it afterwards. In layout `pair` the optimizer's state goes along: with W = L R before and
    L' = L P, R' = Q R after, the gradients of the same dense gradient G are G R'^T = (G R^T) Q^T and
    L'^T G = P^T (L^T G). First moments follow exactly so; second moments, sums of squares, with the squared entries of
    Q and P, as if the gradients of different components were uncorrelated. In layout `pivot` other rows become pivots,
    for which there is no such map: the state of both factors is dropped and starts anew.

    Args:
        model: holds the layers.
        ranks: {layer name: new rank}, at least 1; a layer whose rank is no larger is left alone.
        optimizer: of torch, or wrapped by accelerate.

    Returns:
        `model`.

    Raises:
        ConfigError: a name is not that of a factored layer, a rank is below 1, or the optimizer keeps a state of the
            shape of a factor under a name that is unknown here; nothing is changed.
    """
    layers = low_rank_layers(model)
    for name, rank in ranks.items():
        if name not in layers or rank < 1:
            raise ConfigError(f"{name!r} at rank {rank}: name factored layers, and ranks from 1 on")
        _check_state(optimizer, layers[name], name)
    for name, rank in ranks.items():
        if rank < layers[name].rank:
            _retruncate_layer_(layers[name], rank, optimizer)
    return model


def _retruncate_layer_(layer: LowRankLinear, rank: int, optimizer: Any) -> None:
    left, right = layer.left.weight.double(), layer.right.weight.double()
    if layer.layout == "pivot":
        identity = torch.eye(layer.rank, dtype=left.dtype, device=left.device)
        left = torch.cat([identity, left]).index_select(0, layer.row_positions())
    left_map, right_map = _maps(left, right, rank)
    new_left, new_right = left @ left_map, right_map @ right
    states: list[dict[str, Any]] = [{}, {}]
    if layer.layout == "pivot":
        new_left, new_right, layer.pivots = pivot_factors(new_left, new_right)
    else:
        states = [
            _mapped(_state(optimizer, layer.left.weight), lambda moment, power: moment @ (right_map**power).t()),
            _mapped(_state(optimizer, layer.right.weight), lambda moment, power: (left_map**power).t() @ moment),
        ]
    for child, factor, state in zip((layer.left, layer.right), (new_left, new_right), states, strict=True):
        old = child.weight
        # Not `old.data = ...`: a graph that is still alive remembers the old shape.
        child.weight = nn.Parameter(factor.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
        child.out_features, child.in_features = factor.shape
        _hand_over_(optimizer, old, child.weight, state)


def _hand_over_(optimizer: Any, old: Tensor, new: Tensor, state: dict[str, Any]) -> None:
    for group in getattr(optimizer, "param_groups", ()):
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if optimizer is not None:
        optimizer.state.pop(old, None)
        if state:
            optimizer.state[new] = state


def _maps(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """P [r, rank] and Q [rank, r]: `(left P) (Q right)` is the best product of `rank`, balanced.

    With left = A X and right = Y B^T (A, B orthonormal) and X Y = U S V^T: P = Y V S^-1/2, Q = S^-1/2 U^T X.
    """
    _, left_core = torch.linalg.qr(left)
    _, right_core = torch.linalg.qr(right.t())
    u, s, vh = torch.linalg.svd(left_core @ right_core.t())
    root = s[:rank].clamp_min(torch.finfo(s.dtype).eps * s[0].clamp_min(1e-300)).sqrt()
    return right_core.t() @ (vh[:rank].t() / root), (u[:, :rank].t() @ left_core) / root.unsqueeze(1)


def _state(optimizer: Any, parameter: Tensor) -> dict[str, Any]:
    states = getattr(optimizer, "state", None)
    return states[parameter] if states is not None and parameter in states else {}


def _check_state(optimizer: Any, layer: LowRankLinear, name: str) -> None:
    known = FIRST_MOMENTS + SECOND_MOMENTS
    for child in (layer.left, layer.right):
        for key, value in _state(optimizer, child.weight).items():
            if isinstance(value, Tensor) and value.shape == child.weight.shape and key not in known:
                raise ConfigError(
                    f"the optimizer keeps {key!r} for {name}, which has no known form at another rank: clear its state "
                    f"(optimizer.state.clear()) or use one that keeps {', '.join(known)}"
                )


def _mapped(state: dict[str, Any], turned: Callable[[Tensor, int], Tensor]) -> dict[str, Any]:
    mapped = dict(state)
    for power, names in ((1, FIRST_MOMENTS), (2, SECOND_MOMENTS)):
        for key in names:
            if isinstance(state.get(key), Tensor):
                mapped[key] = turned(state[key].double(), power).to(state[key].dtype).contiguous()
    return mapped
