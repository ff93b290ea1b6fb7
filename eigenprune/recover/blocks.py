# SPDX-License-Identifier: Apache-2.0
"""Going through a dense and a pruned model side by side, one block at a time, on the same text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eigenprune.calibrate.objective import model_inputs
from eigenprune.errors import ConfigError
from eigenprune.recover.compute import computing, device_of

# Two runs of one block on one input differ by the roundings of another choice of kernels at most.
SAME = 1e-2


@dataclass(frozen=True)
class BlockPair:
    """One block of both models.

    Attributes:
        name: of the block.
        dense, pruned: its modules.
        positional, named: what both are called with after the hidden state.
    """

    name: str
    dense: nn.Module
    pruned: nn.Module
    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden state after `module`, which is `dense` or `pruned`."""
        output = module(hidden, *self.positional, **self.named)
        after: Tensor = output[0] if isinstance(output, tuple) else output
        return after


Visit = Callable[[BlockPair, Sequence[Tensor], Sequence[Tensor]], None]


def walk_blocks_(
    dense: nn.Module,
    pruned: nn.Module,
    windows: Tensor,
    visit: Visit,
    *,
    finished: int = 0,
    progress: bool = True,
) -> int:
    """Call `visit(pair, dense inputs, pruned inputs)` for each block in order, which may change the pruned one.

    Each model sees its own hidden states: those of the pruned one come from its blocks as `visit` left them.

    Memory: the hidden states of all windows, of both models.

    Args:
        dense, pruned: of one architecture, whose blocks are one list, on one device.
        windows: [windows, window] int64 token ids.
        visit: inputs are lists of [1, window, width], one for each window.
        finished: so many blocks are gone through without a visit.
        progress: show a bar on standard error.

    Returns:
        The number of blocks.

    Raises:
        ConfigError: the model has no single list of blocks that can be run one by one.
    """
    with torch.no_grad(), computing(dense), computing(pruned):
        pairs = _pairs(dense, pruned, windows[:1])
        states = [[first_input(model, pairs[0].name, ids) for ids in windows.split(1)] for model in (dense, pruned)]
        for number, pair in enumerate(tqdm(pairs, desc="blocks", unit="block", disable=not progress, leave=False)):
            if number >= finished:
                visit(pair, states[0], states[1])
            for hidden, module in zip(states, (pair.dense, pair.pruned), strict=True):
                hidden[:] = [pair.run(module, state) for state in hidden]
    return len(pairs)


class _Reached(Exception):
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def first_input(model: nn.Module, block: str, ids: Tensor) -> Tensor:
    """The hidden state [1, window, width] that the module `block` of `model` is given for ids [1, window]."""

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    handle = model.get_submodule(block).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**model_inputs(model, ids.to(device_of(model))))
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise ConfigError(f"{block} does not run on token ids alone, so blocks cannot be gone through: use 'distil'")


def _pairs(dense: nn.Module, pruned: nn.Module, ids: Tensor) -> list[BlockPair]:
    """The blocks in the order in which they run, each shown to give alone what it gives inside the model."""
    found: list[BlockPair] = []
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    with _watched(dense, _block_names(dense)) as calls:
        dense(**model_inputs(dense, ids.to(device_of(dense))))
    for name, args, kwargs, output in calls:
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        if not args and "hidden_states" not in kwargs:
            raise ConfigError(f"{name} is not called with a hidden state: use 'distil'")
        found.append(BlockPair(name, dense.get_submodule(name), pruned.get_submodule(name), args[1:], rest))
        inputs.append(args[0] if args else kwargs["hidden_states"])
        outputs.append(output[0] if isinstance(output, tuple) else output)
    for pair, hidden, wanted in zip(found, inputs, outputs, strict=True):
        again = pair.run(pair.dense, hidden)
        if not (again - wanted).norm() <= SAME * wanted.norm():
            raise ConfigError(f"{pair.name} gives something else alone than inside the model: use 'distil'")
    for output, hidden in zip(outputs, inputs[1:], strict=False):
        if output.shape != hidden.shape or not torch.equal(output, hidden):
            raise ConfigError("the blocks of this model are no chain, each feeding the next: use 'distil'")
    return found


@contextmanager
def _watched(
    model: nn.Module, names: Sequence[str]
) -> Iterator[list[tuple[str, tuple[Any, ...], dict[str, Any], Any]]]:
    """(block, positional arguments, named arguments, output) of each call while inside."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []

    def note(name: str) -> Any:
        return lambda _module, args, kwargs, output: calls.append((name, args, kwargs, output))

    handles = [model.get_submodule(n).register_forward_hook(note(n), with_kwargs=True) for n in names]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _block_names(model: nn.Module) -> list[str]:
    """Items of the one outermost `ModuleList` of `model`."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise ConfigError(f"the model has {len(outer)} lists of blocks, where one can be gone through: use 'distil'")
    return [f"{outer[0]}.{number}" for number in range(len(model.get_submodule(outer[0])))]  # type: ignore[arg-type]
