# SPDX-License-Identifier: Apache-2.0
"""Refit of the left factors in closed form, on the inputs that the pruned model itself gives them.

The update of SVD-LLM (arXiv 2403.07378), towards the outputs in the dense model (AA-SVD; DESIGN 5.1).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from eigenprune.layers import LowRankLinear, low_rank_layers
from eigenprune.recover.blocks import BlockPair
from eigenprune.spectral import pivot_factors

RIDGE = 1e-3  # of the mean square of an inner activation


def refit_block_(pair: BlockPair, dense_inputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Refit every factored layer of the pruned block, in place, by sums over the tokens of all windows.

    Layers that read one input are refitted together, and the next ones on the inputs that these then give them: else
    each would make up for errors that are no longer made. A layer that does not run once for each token in both models
    (an expert of a mixture) is left alone.
    """
    layers = low_rank_layers(pair.pruned)
    for names in _groups(pair, layers, inputs[0]):
        sums = {name: _Sums(layers[name]) for name in names}
        for ours, theirs in zip(inputs, dense_inputs, strict=True):
            wanted = _seen(pair, pair.dense, theirs, names, outputs=True)
            given = _seen(pair, pair.pruned, ours, names[:1], outputs=False)
            for name, total in sums.items():
                total.add_(given[names[0]], wanted[name])
        for name, total in sums.items():
            if total.usable:
                set_left_(layers[name], refitted(total.gram, total.cross, full_left(layers[name])))


def refitted(gram: Tensor, cross: Tensor, left: Tensor, ridge: float = RIDGE) -> Tensor:
    """The L that minimises `sum |L z - y|^2 + lambda |L - left|^2`, lambda being `ridge` x the mean of diag(gram).

    Directions of z that the text does not reach keep the present factor, so no Gram is too poor in rank.

    Args:
        gram: sum z z^T, [rank, rank] float64.
        cross: sum y z^T, [out, rank] float64.
        left: the present factor, [out, rank].

    Returns:
        [out, rank] float64.
    """
    mean = float(gram.diagonal().mean())
    regular = gram + (ridge * mean or 1.0) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # Solved for the change, so that what is not moved is not rounded either.
    change: Tensor = torch.linalg.solve(regular, (cross - left.double() @ gram).t())
    return left.double() + change.t()


def full_left(layer: LowRankLinear) -> Tensor:
    """[out, rank] such that the weight is `full_left @ right`; in layout `pivot`, unit rows at the pivots."""
    left = layer.left.weight.detach().double()
    if layer.layout == "pivot":
        identity = torch.eye(layer.rank, dtype=left.dtype, device=left.device)
        left = torch.cat([identity, left]).index_select(0, layer.row_positions())
    return left


def set_left_(layer: LowRankLinear, left: Tensor) -> None:
    """Give `layer` the weight `left @ right`, left [out, rank]; in layout `pivot`, other rows may become pivots."""
    right = layer.right.weight.detach().double()
    if layer.layout == "pivot":
        left, right, pivots = pivot_factors(left, right)
        layer.pivots.copy_(pivots)
        layer.right.weight.copy_(right)
    layer.left.weight.copy_(left)


class _Sums:
    """Second moments of the inner activations z of one layer, and with the outputs y of its dense twin, in float64."""

    def __init__(self, layer: LowRankLinear) -> None:
        self.layer, self.usable = layer, False
        weight = layer.right.weight
        self.gram = torch.zeros(layer.rank, layer.rank, dtype=torch.float64, device=weight.device)
        self.cross = torch.zeros(layer.out_features, layer.rank, dtype=torch.float64, device=weight.device)

    def add_(self, x: Tensor, y: Tensor) -> None:
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        if len(x) != len(y):
            return
        with torch.autocast(x.device.type, enabled=False):
            z = functional.linear(x.float(), self.layer.right.weight.float())
            y = y.float() if self.layer.bias is None else y.float() - self.layer.bias.float()
            self.gram += (z.t() @ z).double()
            self.cross += (y.t() @ z).double()
        self.usable = True


class _Enough(Exception):
    pass


def _groups(pair: BlockPair, layers: Mapping[str, LowRankLinear], hidden: Tensor) -> list[list[str]]:
    """The layers of the pruned block in the order in which they run, those that read the same tensor together.

    Left out are those that do not run exactly once.
    """
    calls: list[tuple[str, Tensor]] = []  # the tensors are held, so that no address is used twice

    def note(name: str) -> Any:
        return lambda _module, args: calls.append((name, args[0]))

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        pair.run(pair.pruned, hidden)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[Any, ...], list[str]] = {}
    names = [name for name, _ in calls]
    for name, x in calls:
        if names.count(name) == 1:
            groups.setdefault((x.data_ptr(), x.shape, x.stride(), x._version), []).append(name)
    return list(groups.values())


def _seen(
    pair: BlockPair, block: nn.Module, hidden: Tensor, names: Sequence[str], *, outputs: bool
) -> dict[str, Tensor]:
    """What goes into, or comes out of, the modules of those names when `block` runs, which it does no further."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], *output: Tensor) -> None:
            found[name] = output[0] if outputs else args[0]
            if len(found) == len(names):
                raise _Enough

        return hook

    modules = [block.get_submodule(name) for name in names]
    handles = [
        module.register_forward_hook(note(name)) if outputs else module.register_forward_pre_hook(note(name))
        for name, module in zip(names, modules, strict=True)
    ]
    try:
        pair.run(block, hidden)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found
