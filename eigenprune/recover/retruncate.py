# SPDX-License-Identifier: Apache-2.0
"""Cut the rank of factored layers in the middle of their training, and take the optimizer along."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eigenprune.errors import ConfigError
from eigenprune.layers import LowRankLinear, is_quantised, low_rank_layers
from eigenprune.recover.optimizer_state import check_state, mapped_states
from eigenprune.spectral import pivot_factors


@torch.no_grad()
def retruncate_(model: nn.Module, ranks: Mapping[str, int], *, optimizer: Any = None) -> nn.Module:
    """Bring factored layers to smaller ranks, in place, keeping the largest singular components of their weights.

    The factors become new parameters, which take the places of the old ones in the optimizer; wrap the model (DDP,
    FSDP) and compile it afterwards. In layout `pair` the optimizer's state goes along (`mapped_states`). In layout
    `pivot` other rows become pivots, for which there is no such map: the state of both factors is dropped and starts
    anew.

    Args:
        model: holds the layers.
        ranks: {layer name: new rank}, at least 1; a layer whose rank is no larger is left alone.
        optimizer: of torch, or wrapped by accelerate.

    Returns:
        `model`.

    Raises:
        ConfigError: a name is not that of a factored layer, or of a quantised one, a rank is below 1, or the optimizer
            keeps a state of the shape of a factor under a name that is unknown here; nothing is changed.
    """
    layers = low_rank_layers(model)
    for name, rank in ranks.items():
        if name not in layers or rank < 1:
            raise ConfigError(f"{name!r} at rank {rank}: name factored layers, and ranks from 1 on")
        if is_quantised(layers[name].right.weight):
            raise ConfigError(f"{name} is quantised: dequantize_ the model, truncate it, and quantise it again")
        check_state(optimizer, layers[name], name)
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
    states: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    if layer.layout == "pivot":
        new_left, new_right, layer.pivots = pivot_factors(new_left, new_right)
    else:
        states = mapped_states(optimizer, layer, left_map, right_map)
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
