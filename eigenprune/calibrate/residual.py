# SPDX-License-Identifier: Apache-2.0
"""Which layers add their output to a residual stream, and where that stream can be read just before."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from eigenprune.calibrate.blocks import BlockChain


def residual_bases(
    model: nn.Module, chain: BlockChain, hidden: Tensor, layers: Mapping[str, nn.Module]
) -> dict[str, str]:
    """{layer: module whose input is the residual stream to which the layer's output is then added}.

    Found by running every block once and comparing bits: a layer is one of these if some module of its block, or the
    next block, reads exactly `stream + output`, where `stream` is what another module or the block itself has read.

    Args:
        hidden: what the first block reads in one window.
    """
    bases: dict[str, str] = {}
    state = hidden
    for number, (block, order) in enumerate(zip(chain.names, chain.orders, strict=True)):
        read: dict[str, Tensor] = {}  # by module, in the order in which they start
        written: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name, module in model.get_submodule(block).named_modules(prefix=block):
                stack.callback(module.register_forward_pre_hook(_reader(name, read)).remove)
                if name in order:
                    stack.callback(module.register_forward_hook(_writer(name, written)).remove)
            (state,) = chain.run(model, number, [state])
        states = [*read.items(), ("", state)]
        starts = list(read)
        for layer in order:
            if layer in layers:
                start = starts.index(layer)
                found = _base(written[layer], states[:start], [later for _, later in states[start + 1 :]])
                bases |= {} if found is None else {layer: found}
    return bases


def _base(output: Tensor, earlier: Sequence[tuple[str, Tensor]], later: Sequence[Tensor]) -> str | None:
    """The first of the `earlier` states which, with `output` added, is one of the `later` ones."""
    for name, state in earlier:
        if state.shape == output.shape:
            total = state + output
            if any(other.shape == total.shape and torch.equal(other, total) for other in later):
                return name
    return None


def _reader(name: str, read: dict[str, Tensor]) -> Callable[..., None]:
    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            read.setdefault(name, args[0].detach())

    return keep


def _writer(name: str, written: dict[str, Tensor]) -> Callable[..., None]:
    def keep(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        written[name] = output.detach()

    return keep
