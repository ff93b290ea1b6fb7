# SPDX-License-Identifier: Apache-2.0
"""Second moments of layer inputs on the pruned prefix: block by block, while the caller prunes what was measured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eigenprune.calibrate.blocks import BlockChain, Hidden, find_chain
from eigenprune.calibrate.collect import calibration_mode
from eigenprune.calibrate.gram import GramSum
from eigenprune.calibrate.residual import residual_bases
from eigenprune.errors import WeightError
from eigenprune.layers import dense_weight, replace_module_
from eigenprune.memory import release_unused


@dataclass(frozen=True)
class ShiftedMoments:
    """Means over calibration tokens, with x the input of the dense model and x~ that of the pruned one.

    Attributes:
        layers: that read this input.
        gram: C~ = mean x~ x~^T, [in, in] float32, symmetric.
        cross: D = mean x x~^T, [in, in] float32.
        residual: E = mean d x~^T, [out, in] float32, where the layer's output is added to a residual stream which is
            by d smaller in the pruned model than in the dense one; None for other layers.
        tokens: how many.
    """

    layers: tuple[str, ...]
    gram: Tensor
    cross: Tensor
    residual: Tensor | None
    tokens: int


def sequential_moments(
    model: nn.Module,
    windows: Tensor,
    layers: Mapping[str, nn.Module],
    groups: Mapping[str, str],
    *,
    done: Mapping[str, nn.Module] | None = None,
    progress: bool = True,
) -> Iterator[ShiftedMoments]:
    """The moments of one input after another, in the order in which a dense `model` reads them.

    The caller replaces the layers of each yielded group in `model` before asking for the next, whose x~ then comes
    from a prefix that is pruned. Layers outside the chain of blocks, and those that do not run once on all tokens
    (experts, say), are never yielded. Nothing is yielded where the blocks cannot run on their own, see `find_chain`.

    Memory: the hidden states of all windows twice, the inputs of one block's layers, and the moments of one input.

    Args:
        windows: [windows, window] int64 token ids.
        layers: the dense layers that will be replaced, by name; a generator that is left half-way changes none.
        groups: layer name to the first layer that reads the same input, as `Statistics.input_group`.
        done: replacements known already, from a run that was interrupted. A block of which all layers are there is not
            measured: its layers are put in.
        progress: show a bar on standard error.

    Raises:
        WeightError: a layer saw NaN or infinity.
    """
    done = done or {}
    windows = windows.to(next(model.parameters()).device)
    with calibration_mode(model, backward=False), torch.no_grad():
        chain = find_chain(model, windows, layers)
        if chain is None:
            return
        dense = chain.first_hidden(model, windows)
        bases = residual_bases(model, chain, dense[0], layers)
    pruned = dense  # the same list, until the first layer has changed
    bar = tqdm(total=len(chain.names), desc="sequential", unit="block", disable=not progress, leave=False)
    with bar:
        for block, order in enumerate(chain.orders):
            wanted = _inputs(order, layers, groups)
            known = all(layer in done for members in wanted for layer in members)
            kept: dict[str, list[Tensor]] = {members[0]: [] for members in wanted}
            with calibration_mode(model, backward=False) as dtype, torch.no_grad():
                streams = {bases[leader]: list[Tensor]() for leader in kept if leader in bases}
                watch = [(leader, _Keeper(inputs, dtype)) for leader, inputs in kept.items() if not known]
                watch += [(base, _Keeper(states, None)) for base, states in streams.items() if not known]
                dense_next = chain.run(model, block, dense, watch)
            for members in wanted:
                if known:
                    for layer in members:
                        replace_module_(model, layer, done[layer])
                    continue
                with calibration_mode(model, backward=False), torch.no_grad():
                    base = bases.get(members[0]) if len(members) == 1 else None
                    stream = None if base is None else (base, streams[base])
                    moments = _measure(model, chain, block, pruned, members, kept.pop(members[0]), stream)
                yield moments
                del moments
            if pruned is dense and not wanted:
                pruned = dense_next
            else:
                with calibration_mode(model, backward=False), torch.no_grad():
                    pruned = chain.run(model, block, pruned)
            dense = dense_next
            release_unused()
            bar.update()


def _inputs(order: Sequence[str], layers: Mapping[str, nn.Module], groups: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The `layers` of a block by the input they read, in the order in which they run."""
    members: dict[str, list[str]] = {}
    for layer in order:
        if layer in layers:
            members.setdefault(groups[layer], []).append(layer)
    return [tuple(names) for names in members.values()]


class _Keeper:
    """Keeps the inputs [1, window, in] that a layer sees, in the dtype in which it multiplies them."""

    def __init__(self, inputs: list[Tensor], dtype: torch.dtype | None) -> None:
        self.inputs, self.dtype = inputs, dtype

    def __call__(self, x: Tensor) -> None:
        self.inputs.append(x.detach().flatten(0, -2).to(self.dtype or x.dtype))


def _measure(
    model: nn.Module,
    chain: BlockChain,
    block: int,
    pruned: Hidden,
    members: Sequence[str],
    dense_inputs: list[Tensor],
    stream: tuple[str, list[Tensor]] | None,
) -> ShiftedMoments:
    """Run the pruned block up to the input of `members`; `stream` names the module that reads the residual stream to
    which they add, with what it read in the dense model."""
    height, width = dense_weight(model.get_submodule(members[0])).shape
    device = dense_inputs[0].device
    gram = GramSum(width, device)
    cross = torch.zeros(width, width, device=device)
    residual = None if stream is None else torch.zeros(height, width, device=device)
    waiting, bases = iter(dense_inputs), iter([] if stream is None else stream[1])
    missing: list[Tensor] = []  # d of the window at work
    tokens = 0

    def add(x: Tensor) -> None:
        nonlocal tokens
        with torch.autocast(x.device.type, enabled=False):
            rows = x.detach().flatten(0, -2).float()
            gram.add(rows)
            cross.addmm_(next(waiting).float().t(), rows)
            if residual is not None:
                residual.addmm_(missing.pop().t(), rows)
        tokens += rows.shape[0]

    def compare(state: Tensor) -> None:
        missing.append(next(bases).float() - state.detach().flatten(0, -2).float())

    watch = [(members[0], add)] if stream is None else [(stream[0], compare), (members[0], add)]
    chain.run(model, block, pruned, watch, stop=members[0])
    sums = [cross, *gram.blocks] + ([] if residual is None else [residual])
    if not all(torch.isfinite(total).all() for total in sums):
        raise WeightError(
            f"{members[0]}: NaN or infinity in its input once the layers before it are pruned; "
            "check the weights, or prune without sequential"
        )
    mean_residual = None if residual is None else residual / tokens
    return ShiftedMoments(tuple(members), gram.dense() / tokens, cross / tokens, mean_residual, tokens)
