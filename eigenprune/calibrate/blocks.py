# SPDX-License-Identifier: Apache-2.0
"""The chain of blocks of a model, run one block at a time over the hidden states of all windows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eigenprune.calibrate.objective import model_inputs

Hidden = list[Tensor]  # one [1, window, width] for each window


class _Stop(Exception):
    """Leaves a forward pass whose rest nobody needs."""


@dataclass
class _Call:
    """One call of a block: everything it was given, and the hidden state it gave back."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class BlockChain:
    """Blocks that run one after another, each on the hidden state of the one before.

    Attributes:
        names: of the blocks, in the order in which they run.
        orders: of each block, its linear layers that run exactly once over all tokens of a window, in that order.
        rest: what each block is called with after the hidden state: (positional, by name), the same for every window.
        tails: what each block gives back after the hidden state; None where it gives back that alone.
    """

    names: tuple[str, ...]
    orders: tuple[tuple[str, ...], ...]
    rest: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = field(repr=False)
    tails: tuple[tuple[Any, ...] | None, ...] = field(repr=False)

    def first_hidden(self, model: nn.Module, windows: Tensor) -> Hidden:
        """What the first block reads, for each of `windows` [windows, window]."""
        found: Hidden = []

        def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0].detach())
            raise _Stop

        with _hooked([model.get_submodule(self.names[0]).register_forward_pre_hook(keep)]):
            for ids in windows.split(1):
                _until_stopped(model, **model_inputs(model, ids))
        return found

    @contextmanager
    def ended_with(self, model: nn.Module, hidden: Tensor) -> Iterator[None]:
        """While inside, `model` skips its blocks and goes on with `hidden` [1, window, width] behind the last."""
        with ExitStack() as stack:
            for name, tail in zip(self.names, self.tails, strict=True):
                block = model.get_submodule(name)
                own = block.__dict__.get("forward")  # set by accelerate's hooks
                stack.callback(_put_forward, block, own)
                block.forward = partial(_skip, hidden if name == self.names[-1] else None, tail)
            yield

    def run(
        self,
        model: nn.Module,
        block: int,
        hidden: Hidden,
        watch: Sequence[tuple[str, Callable[[Tensor], None]]] = (),
        stop: str | None = None,
    ) -> Hidden:
        """Run `block` over `hidden`, and give back what the next one reads.

        Args:
            watch: modules by name, each with what is to be done with its input [1, window, in], window by window.
            stop: a watched layer after whose input the rest of the block is left out; then nothing is given back.
        """
        found: Hidden = []
        module = model.get_submodule(self.names[block])
        args, kwargs = self.rest[block]
        handles = [
            model.get_submodule(name).register_forward_pre_hook(_watcher(act, name == stop)) for name, act in watch
        ]
        with _hooked(handles):
            for state in hidden:
                output = _until_stopped(module, state, *args, **kwargs)
                if output is not None:
                    found.append(_hidden_of(output))
        return found


def find_chain(model: nn.Module, windows: Tensor, layers: Mapping[str, nn.Module]) -> BlockChain | None:
    """The chain that holds most of `layers`, or None where the blocks of `model` cannot be run on their own.

    They can if each runs once, on the very output of the one before, and if whatever else it is given (masks,
    positions) is the same for the first and the last of `windows`.
    """
    names = _block_names(model, layers)
    if not names:
        return None
    inside = {name: [layer for layer in layers if layer.startswith(f"{name}.")] for name in names}
    (calls, order), (others, _) = (_probe(model, ids, inside) for ids in (windows[:1], windows[-1:]))
    if not all(len(calls[name]) == 1 and len(others[name]) == 1 for name in names) or not _is_chained(names, calls):
        return None
    rest = [(calls[name][0].args[1:], calls[name][0].kwargs) for name in names]
    if not all(_same(rest[i], (others[name][0].args[1:], others[name][0].kwargs)) for i, name in enumerate(names)):
        return None
    whole = tuple(calls[names[0]][0].args[0].shape[:-1])
    seen = [layer for layer, _ in order]
    orders = [
        tuple(layer for layer, shape in order if layer in inside[name] and shape == whole and seen.count(layer) == 1)
        for name in names
    ]
    tails = [output[1:] if isinstance(output, tuple) else None for output in (calls[name][0].output for name in names)]
    return BlockChain(tuple(names), tuple(orders), tuple(rest), tuple(tails))


def _probe(
    model: nn.Module, ids: Tensor, inside: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[_Call]], list[tuple[str, tuple[int, ...]]]]:
    """Run one window: the calls of each block, and the layers `inside` them as they ran, with [1, window] or what else
    they ran on."""
    calls: dict[str, list[_Call]] = {name: [] for name in inside}
    order: list[tuple[str, tuple[int, ...]]] = []

    def note(layer: str) -> Callable[..., None]:
        return lambda _module, args: order.append((layer, tuple(args[0].shape[:-1])))

    handles = [
        model.get_submodule(name).register_forward_hook(_recorder(calls[name]), with_kwargs=True) for name in inside
    ]
    handles += [
        model.get_submodule(layer).register_forward_pre_hook(note(layer)) for name in inside for layer in inside[name]
    ]
    with _hooked(handles):
        model(**model_inputs(model, ids))
    return calls, order


def _block_names(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """The items of that outermost `ModuleList` which holds most of `layers`."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outermost:
        return []
    fullest = max(outermost, key=lambda name: sum(layer.startswith(f"{name}.") for layer in layers))
    return [f"{fullest}.{child}" for child, _ in model.get_submodule(fullest).named_children()]


def _is_chained(names: Sequence[str], calls: Mapping[str, list[_Call]]) -> bool:
    previous: Any = None
    for name in names:
        call = calls[name][0]
        if not call.args or not isinstance(call.args[0], Tensor) or call.args[0].ndim != 3:
            return False
        if previous is not None and call.args[0] is not previous:
            return False
        previous = _hidden_of(call.output)
        if not isinstance(previous, Tensor):
            return False
    return True


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are the same for a block; what cannot be compared is not."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, tuple | list):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
        )
    return (one is None and other is None) or (isinstance(one, bool | int | float | str) and one == other)


def _hidden_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _skip(hidden: Tensor | None, tail: tuple[Any, ...] | None, state: Tensor, *_args: Any, **_kwargs: Any) -> Any:
    """The forward of a block that gives back `hidden`, or what it reads."""
    output = state if hidden is None else hidden
    return output if tail is None else (output, *tail)


def _put_forward(block: nn.Module, own: Any) -> None:
    if own is None:
        del block.__dict__["forward"]
    else:
        block.forward = own


def _recorder(calls: list[_Call]) -> Callable[..., None]:
    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(_Call(args, kwargs, output))

    return record


def _watcher(act: Callable[[Tensor], None], last: bool) -> Callable[..., None]:
    def watch(_module: nn.Module, args: tuple[Any, ...]) -> None:
        act(args[0])
        if last:
            raise _Stop

    return watch


def _until_stopped(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    try:
        return module(*args, **kwargs)
    except _Stop:
        return None


@contextmanager
def _hooked(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
