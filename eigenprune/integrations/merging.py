# SPDX-License-Identifier: Apache-2.0
"""Add a low-rank change to a factored layer without loss, and cut the rank back afterwards.

A factored weight plus a LoRA is a factored weight again: `left @ right + B @ A = [left, B] @ [right; A]`. All is
computed in float64 and rounded once, to the dtype of the layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eigenprune.calibrate import Statistics
from eigenprune.errors import CalibrationError, ConfigError, WeightError
from eigenprune.layers import (
    LowRankLinear,
    dense_like,
    dense_weight,
    factored_parameters,
    is_conv1d,
    is_dense,
    is_quantised,
    plain_values,
    replace_module_,
)
from eigenprune.spectral import Metric, components, find_method, layer_metric, pivot_factors
from eigenprune.spectral.decompose import balance

# Of a merged layer: (layout, rank) before the first merge, for `truncate_merged_`. An attribute, so not saved.
MARK = "layout_before_merge"


@dataclass(frozen=True)
class Delta:
    """The change W -> diag(scale) (W + left @ right), b -> b + bias, in float64.

    left: [out, k]; right: [k, in]; scale: [out], or None for ones; bias: [out], or None for zeros.
    """

    left: Tensor
    right: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def of(cls, left: Tensor, right: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> "Delta":
        """From tensors of any floating dtype: copied, balanced for short dtypes, components that are zero left out."""
        left, right = balance(left.detach().double(), right.detach().double())
        alive = left.any(0) & right.any(1)
        return cls(left[:, alive], right[alive], _copy(scale), _copy(bias))

    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return [tensor for tensor in (self.left, self.right, self.scale, self.bias) if tensor is not None]


def full_factors(layer: LowRankLinear) -> tuple[Tensor, Tensor]:
    """`left [out, rank]`, `right [rank, in]` of either layout, float64: the weight [out, in] is their product."""
    left, right = (plain_values(part.weight).detach().double() for part in (layer.left, layer.right))
    if layer.layout == "pivot":
        rows = torch.cat([torch.eye(layer.rank, dtype=left.dtype, device=left.device), left])
        left = rows.index_select(0, layer.row_positions())
    return left, right


def merged_layout(rank: int, out_features: int, in_features: int, layout: str) -> str:
    """`pair`, `pivot` or `dense`: how a merged weight of `rank` is stored, never in more numbers than dense.

    A layer keeps its layout while that pays. A pair of a rank at which it no longer does becomes `pivot`, which pays at
    every rank below the smaller side; from there on the weight has full rank and is stored dense.
    """
    if rank >= min(out_features, in_features):
        return "dense"
    if factored_parameters(rank, out_features, in_features, layout) >= out_features * in_features:
        return "pivot"
    return layout


def merged_layer(base: LowRankLinear, deltas: Sequence[Delta]) -> nn.Module:
    """A new layer that computes `base` with the `deltas` applied in turn; `base` stays as it is.

    Its rank is the sum of the ranks, its layout that of `merged_layout`. In layout `pair` and without a scale, the old
    columns and rows are kept bit for bit.

    Raises:
        ConfigError: a delta has a bias and `base` has none.
        WeightError: a delta holds NaN or infinity.
    """
    if not all(torch.isfinite(tensor).all() for delta in deltas for tensor in delta.tensors()):
        raise WeightError("the adapter holds NaN or infinity; it is not merged")
    bias = _merged_bias(base, deltas)
    if all(delta.scale is None and delta.left.shape[1] == 0 for delta in deltas):  # nothing to add: nothing is rounded
        pivots = base.pivots if base.layout == "pivot" else None
        left, right = base.left.weight.detach(), base.right.weight.detach()
        new: nn.Module = LowRankLinear.from_factors(left, right, pivots=pivots, bias=bias, conv1d=base.conv1d)
    else:
        left, right = full_factors(base)
        for delta in deltas:
            left, right = torch.cat([left, delta.left], 1), torch.cat([right, delta.right])
            left = left if delta.scale is None else delta.scale.unsqueeze(1) * left
        layout = merged_layout(left.shape[1], base.out_features, base.in_features, base.layout)
        new = _layer(left, right, layout, bias, base.conv1d, base.right.weight.dtype)
    setattr(new, MARK, getattr(base, MARK, (base.layout, base.rank)))
    return _like(new, base)


def truncate_merged_(
    model: nn.Module,
    ranks: Mapping[str, int] | None = None,
    *,
    statistics: Statistics | None = None,
    method: str = "kfac",
) -> nn.Module:
    """Bring merged layers of `model` back to their old rank, in place, keeping their best components.

    Unlike the merge, this loses something. What counts as best is measured in the metric of `method` where `statistics`
    are given (those that the model was pruned with will do, collected on its dense form), else by plain singular
    values.

    Args:
        model: after `merge_and_unload`.
        ranks: {layer name: rank}; None takes each merged layer's rank before the merge, known until the model is saved
            and loaded again. A layer whose rank is no larger is left alone.
        statistics: of the inputs (and output gradients) of these layers.
        method: a row of the method table that says which of them make the metric.

    Returns:
        `model`.

    Raises:
        ConfigError: no layer was merged, a name is not that of a linear layer, or adapters are still around a layer.
        CalibrationError: the statistics do not hold what the method needs, or are of a layer that has lost hidden
            channels since (method `kfac-channels`).
    """
    wanted = _ranks_before_merge(model) if ranks is None else dict(ranks)
    if not wanted:
        raise ConfigError("no layer of this model was merged since it was loaded: say the ranks, {name: rank}")
    layers = {name: _mergeable(model, name) for name in wanted}
    if min(wanted.values()) < 1:
        raise ConfigError(f"a rank must be at least 1, not {min(wanted.values())}")
    found = {}  # all before any is replaced: an error leaves the model as it was
    for name, layer in layers.items():
        stored, rank = _stored(layer), wanted[name]
        if rank >= stored.rank:
            continue
        metric = Metric() if statistics is None else layer_metric(find_method(method), statistics, name)
        _check_sides(name, stored.weight, metric)
        left, right = components(stored.weight, metric, rank).truncated(rank)
        old_layout = getattr(layer, MARK, (stored.layout, 0))[0]
        layout = merged_layout(rank, stored.weight.shape[0], stored.weight.shape[1], old_layout)
        found[name] = _like(_layer(left, right, layout, stored.bias, stored.conv1d, stored.dtype), layer)
    for name, new in found.items():
        replace_module_(model, name, new)
    return model


def principal_split(layer: LowRankLinear, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `count` leading singular components of the weight and the rest, each as balanced factors, in float64.

    The SVD is that of a [rank, rank] core, never of the dense weight.

    Returns:
        left [out, count], right [count, in] of the leading part; left [out, rank - count], right [rank - count, in].
    """
    left, right = full_factors(layer)
    left_basis, left_core = torch.linalg.qr(left)
    right_basis, right_core = torch.linalg.qr(right.t())
    u, s, vh = torch.linalg.svd(left_core @ right_core.t())
    root = s.sqrt()
    left, right = left_basis @ (u * root), (root.unsqueeze(1) * vh) @ right_basis.t()
    return left[:, :count], right[:count], left[:, count:], right[count:]


def set_factors_(layer: LowRankLinear, left: Tensor, right: Tensor) -> None:
    """Give `layer` the weight `left [out, r] @ right [r, in]` (float64) in its own layout, at rank r, in place.

    The rank until now counts as its rank before a merge.
    """
    dtype = layer.right.weight.dtype
    setattr(layer, MARK, getattr(layer, MARK, (layer.layout, layer.rank)))
    if layer.layout == "pivot":
        left, right, layer.pivots = pivot_factors(left, right)
    for child, factor in ((layer.left, left), (layer.right, right)):
        child.weight.data = factor.to(dtype).contiguous()
        child.out_features, child.in_features = factor.shape


def _layer(
    left: Tensor, right: Tensor, layout: str, bias: Tensor | None, conv1d: bool, dtype: torch.dtype
) -> nn.Module:
    if layout == "dense":
        dense = dense_like((left @ right).to(dtype), bias, conv1d=conv1d)
        if isinstance(bias, nn.Parameter):
            dense.bias = bias  # the same object: it may be in an optimizer
        return dense
    pivots = None
    if layout == "pivot":
        left, right, pivots = pivot_factors(left, right)
    return LowRankLinear.from_factors(left.to(dtype), right.to(dtype), pivots=pivots, bias=bias, conv1d=conv1d)


def _like(new: nn.Module, old: nn.Module) -> nn.Module:
    """`new` in the training mode and with the gradient flag of `old`; a bias that they share keeps its own."""
    source = old.right if isinstance(old, LowRankLinear) else old
    flag = source.get_parameter("weight").requires_grad
    for name, parameter in new.named_parameters():
        if name != "bias":
            parameter.requires_grad_(flag)
    return new.train(old.training)


def _merged_bias(base: LowRankLinear, deltas: Sequence[Delta]) -> Tensor | None:
    added = [delta.bias for delta in deltas if delta.bias is not None]
    if not added:
        return base.bias
    if base.bias is None:
        raise ConfigError("an adapter with a bias (lora_bias) cannot be merged into a layer that has none")
    merged = base.bias.detach().double() + sum(added)
    return nn.Parameter(merged.to(base.bias.dtype), requires_grad=base.bias.requires_grad)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(torch.float64, copy=True)


def _ranks_before_merge(model: nn.Module) -> dict[str, int]:
    return {name: getattr(module, MARK)[1] for name, module in model.named_modules() if hasattr(module, MARK)}


def _mergeable(model: nn.Module, name: str) -> nn.Module:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ConfigError(f"the model has no layer {name!r} to truncate") from None
    if name.endswith(".base_layer") or hasattr(layer, "base_layer"):
        raise ConfigError(f"{name} still has adapters around it: call merge_and_unload first")
    if not (isinstance(layer, LowRankLinear) or is_dense(layer)):
        raise ConfigError(f"{name} is a {type(layer).__name__}, not a linear layer")
    parts = [layer.left, layer.right] if isinstance(layer, LowRankLinear) else [layer]
    if any(is_quantised(part.get_parameter("weight")) for part in parts):
        raise ConfigError(f"{name} is quantised: dequantize_ the model, truncate it, and quantise it again")
    return layer


def _check_sides(name: str, weight: Tensor, metric: Metric) -> None:
    for root, size, side in ((metric.output, weight.shape[0], "outputs"), (metric.inner, weight.shape[1], "inputs")):
        if root.size not in (None, size):
            raise CalibrationError(
                f"{name} has {size} {side}, and the statistics are of {root.size}: it has lost hidden channels since. "
                "Truncate without statistics"
            )


@dataclass(frozen=True)
class _Stored:
    """A linear layer's weight [out, in] in float64, and how it is kept."""

    weight: Tensor
    bias: Tensor | None
    rank: int
    layout: str
    conv1d: bool
    dtype: torch.dtype


def _stored(layer: nn.Module) -> _Stored:
    if isinstance(layer, LowRankLinear):
        left, right = full_factors(layer)
        return _Stored(left @ right, layer.bias, layer.rank, layer.layout, layer.conv1d, layer.right.weight.dtype)
    weight = dense_weight(layer).detach()
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    return _Stored(weight.double(), bias, min(weight.shape), "pivot", is_conv1d(layer), weight.dtype)
