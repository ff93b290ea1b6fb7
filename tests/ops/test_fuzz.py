# SPDX-License-Identifier: Apache-2.0
"""Arguments drawn at random: the right answer or an error that names the operator, never anything else.

Sizes 0 to 67 stand on both sides of every block of the kernels (4, 6, 16, 32, 64). Half of the draws are damaged in one
place. The draws are those of a seed, so that a failure can be had again: its text names the draw.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import eigenprune.ops  # noqa: F401 - defines the operators
from tests.ops.helpers import DTYPES, error_bound

operators = torch.ops.eigenprune
DRAWS = 6000
CALLS, THREADS = 50, 8


class Draw:
    """The arguments of one call of an operator, and what is wrong with them."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice(DTYPES)
        leading = [self.size() for _ in range(self.random.choice((0, 1, 1, 1, 2)))]
        self.features = self.size()
        self.x = self.tensor(*leading, self.features)
        self.layers = [self.layer() for _ in range(self.random.randrange(4))]
        self.damage = self.break_something() if self.random.random() < 0.5 else None

    def size(self) -> int:
        return self.random.choice((0, 1, self.random.randrange(68), self.random.randrange(68)))

    def tensor(self, *shape: int) -> torch.Tensor:
        """Small normal numbers, in a buffer with strides of any kind."""
        value = (torch.randn(shape, generator=self.generator, dtype=torch.float64) / 8).to(self.dtype)
        kind = self.random.choice(("plain", "plain", "gaps", "backwards", "offset", "repeated"))
        if kind == "gaps":
            return torch.stack((value, torch.full_like(value, float("nan"))), -1)[..., 0]
        if kind == "backwards":  # last dimension outermost
            return value.permute(*reversed(range(value.dim()))).contiguous().permute(*reversed(range(value.dim())))
        if kind == "offset":  # by one element: no pointer is aligned to more than that
            room = torch.full((value.numel() + 1,), float("nan"), dtype=self.dtype)
            room[1:] = value.flatten()
            return room[1:].view(shape)
        if kind == "repeated" and shape[0]:
            return value[:1].expand(shape)
        return value

    def layer(self) -> list[torch.Tensor | None]:
        out, is_pivot = self.size(), self.random.random() < 0.6
        rank = self.random.randint(0, out) if is_pivot else self.size()
        pivots = torch.randperm(out, generator=self.generator)[:rank].to(torch.int32) if is_pivot else None
        if is_pivot and self.random.random() < 0.7:
            pivots = pivots.sort().values
        bias = self.tensor(out) if self.random.random() < 0.5 else None
        return [self.tensor(rank, self.features), self.tensor(out - rank if is_pivot else out, rank), pivots, bias]

    def break_something(self) -> str | None:
        """Damage one argument of one layer so that no meaning is left; the name of the damage, or None."""
        if not self.layers:
            return None
        layer = self.random.choice(self.layers)
        right, left, pivots, _ = layer
        kind = self.random.choice(("columns", "rank", "dtype", "dim", "bias", "pivot range", "pivot twice", "int64"))
        if kind == "columns":
            layer[0] = self.tensor(right.shape[0], self.features + self.random.randint(1, 3))
        elif kind == "rank":
            layer[1] = self.tensor(left.shape[0], left.shape[1] + self.random.randint(1, 3))
        elif kind == "dtype":
            layer[self.random.randrange(2)] = right.to(self.random.choice([d for d in DTYPES if d != self.dtype]))
        elif kind == "dim":
            layer[self.random.randrange(2)] = self.tensor(1, *left.shape)
        elif kind == "bias":
            out = left.shape[0] + (0 if pivots is None else right.shape[0])
            layer[3] = self.tensor(out + self.random.randint(1, 3))
        elif pivots is None or not len(pivots):
            return None
        elif kind == "pivot range":
            beyond = left.shape[0] + len(pivots)
            pivots[self.random.randrange(len(pivots))] = self.random.choice((-1, beyond, 2**31 - 1, -(2**31)))
        elif kind == "pivot twice" and len(pivots) > 1:
            pivots[0] = pivots[-1]
        elif kind == "int64":
            layer[2] = pivots.long()
        else:
            return None
        return kind

    def calls(self) -> dict[str, tuple]:
        """Every operator that these arguments fit, and how they fit it: the single ones take the first layer."""
        columns = [list(entries) for entries in zip(*self.layers, strict=True)] or [[], [], [], []]
        found: dict[str, tuple] = {"grouped_linear": (self.x, *columns)}
        for right, left, pivots, bias in self.layers[:1]:
            if pivots is None:
                found["low_rank_linear"] = self.x, right, left, bias
            else:
                found["pivot_linear"] = self.x, right, left, pivots, bias
        return found


def answer(name: str, arguments: tuple) -> tuple[list[torch.Tensor], str | None]:
    """The outputs of an operator, or what it says against its arguments."""
    try:
        outputs = getattr(operators, name)(*arguments)
    except RuntimeError as error:
        return [], str(error)
    return (outputs if isinstance(outputs, list) else [outputs]), None


def check_answers(draw: Draw, outputs: list[torch.Tensor]) -> None:
    for y, (right, left, pivots, bias) in zip(outputs, draw.layers, strict=False):
        z = draw.x.double() @ right.double().T
        # Every sum is at most the sum of the magnitudes, so an error is judged by those: a sum may cancel.
        size = draw.x.double().abs() @ right.double().abs().T
        truth, scale = z @ left.double().T, size @ left.double().abs().T
        if pivots is not None:
            columns, merged = pivots.long(), torch.empty(2, *y.shape, dtype=torch.float64)
            is_rest = torch.ones(y.shape[-1], dtype=torch.bool).index_fill(0, columns, False)
            merged[..., columns] = torch.stack((z, size))
            merged[..., is_rest] = torch.stack((truth, scale))
            truth, scale = merged
        if bias is not None:
            truth, scale = truth + bias.double(), scale + bias.double().abs()
        assert y.shape == (*draw.x.shape[:-1], truth.shape[-1])
        assert y.dtype == draw.dtype
        # error_bound is for the norm of many; a lone element may err by the three roundings of z, product and result
        # at once. Below the normal numbers of float16 a rounding is absolute.
        bound = 4 * error_bound(draw.dtype) * scale + 2 * torch.finfo(draw.dtype).smallest_normal
        assert bool(((y.double() - truth).abs() <= bound).all())


@pytest.mark.parametrize("start", range(0, DRAWS, 500))
def test_every_draw_is_refused_or_answered_rightly(start):
    refused = 0
    for seed in range(start, start + 500):
        draw = Draw(seed)
        for name, arguments in draw.calls().items():
            outputs, refusal = answer(name, arguments)
            if refusal is not None:
                assert draw.damage, f"draw {seed}, {name}: {refusal}"
                assert f"eigenprune::{name}: " in refusal, f"draw {seed}, {draw.damage}"
                refused += 1
                continue
            if name == "grouped_linear":  # a single operator may have been given another layer than the damaged one
                assert not draw.damage, f"draw {seed}: {draw.damage} went unnoticed"
            try:
                check_answers(draw, outputs)
            except AssertionError as error:
                raise AssertionError(f"draw {seed}, {name}, {draw.dtype}") from error
    assert 60 < refused < 440, "the draws are not what they are meant to be"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eight_threads_at_once_give_the_bits_of_one(dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    inputs = [draw(rows, 96) for rows in (1, 3, 16, 40, 128)]
    pivots = torch.randperm(160, generator=generator)[:70].to(torch.int32)
    lists = [draw(70, 96), draw(64, 96)], [draw(90, 70), draw(200, 64)], [pivots, None], [draw(160), None]

    def work(first: int) -> list[torch.Tensor]:
        chosen = (inputs[(first + i) % len(inputs)] for i in range(CALLS))
        return [y for x in chosen for y in operators.grouped_linear(x, *lists)]

    serial = [work(first) for first in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        parallel = list(pool.map(work, range(THREADS)))
    for one, other in zip(serial, parallel, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
