# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels behind both linears: exact on whole numbers for every size and instruction set, for any threads.

Inputs are small whole numbers whose every partial sum is representable, so that any correct order of summation
gives the same bits, and a dropped, repeated or misplaced element cannot hide in a tolerance.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from eigenprune.ops import extension_status
from tests.ops.helpers import run_python

low_rank = torch.ops.eigenprune.low_rank_linear
pivoted = torch.ops.eigenprune.pivot_linear

# Around every block of the kernels: 4 and 6 side by side, 16 and 32 in a register, 64 columns, 132 rows, 256 deep.
ROWS = (1, 2, 3, 5, 6, 7, 16, 17, 23, 64, 65, 131, 132, 133, 270)
SIZES = ((1, 1, 1), (3, 2, 5), (16, 7, 31), (65, 16, 64), (63, 33, 100), (130, 66, 129), (200, 64, 514), (40, 40, 33))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def whole_numbers(*shape: int, largest: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-largest, largest + 1, shape, generator=generator).double()


def sparse_signs(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """At most three entries of +-1 in a row, so that sums of whole numbers below 9 stay below 3^2 * 9 = 81 < 256."""
    matrix = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        places = torch.randint(columns, (3,), generator=generator)
        matrix[row, places] = torch.randint(0, 2, (3,), generator=generator).double() * 2 - 1
    return matrix


def case(out: int, rank: int, features: int, rows: int, *, pivot: bool, seed: int):
    generator = torch.Generator().manual_seed(seed)
    right = sparse_signs(rank, features, generator)
    left = sparse_signs(out - rank if pivot else out, rank, generator)
    x = whole_numbers(rows, features, largest=8, generator=generator)
    bias = whole_numbers(out, largest=16, generator=generator)
    return x, right, left, bias, torch.randperm(out, generator=generator)[:rank]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_low_rank_is_exact_on_whole_numbers(size, dtype):
    for rows, with_bias in itertools.product(ROWS, (False, True)):
        x, right, left, bias, _ = case(*size, rows, pivot=False, seed=rows)
        truth = x @ right.T @ left.T + bias * with_bias
        given = (t.to(dtype) for t in (x, right, left))
        y = low_rank(*given, bias.to(dtype) if with_bias else None)
        assert torch.equal(y.double(), truth), (rows, with_bias)


@pytest.mark.parametrize("ascending", [True, False], ids=["ascending", "any_order"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pivot_is_exact_on_whole_numbers(size, dtype, ascending):
    for rows, with_bias in itertools.product(ROWS, (False, True)):
        x, right, left, bias, pivots = case(*size, rows, pivot=True, seed=rows)
        pivots = pivots.sort().values if ascending else pivots
        truth = torch.zeros(rows, size[0], dtype=torch.float64)
        is_rest = torch.ones(size[0], dtype=torch.bool).index_fill(0, pivots, False)
        truth[:, pivots], truth[:, is_rest] = x @ right.T, x @ right.T @ left.T
        given = (t.to(dtype) for t in (x, right, left))
        y = pivoted(*given, pivots.int(), bias.to(dtype) if with_bias else None)
        assert torch.equal(y.double(), truth + bias * with_bias), (rows, with_bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 64, 270])
def test_nothing_is_read_past_the_inputs(rows, dtype):
    """What stands behind every input is NaN: one element too many of any of them would show."""

    def guarded(value: torch.Tensor) -> torch.Tensor:
        room = torch.full((value.numel() + 64,), float("nan"), dtype=dtype)
        room[: value.numel()] = value.flatten().to(dtype)
        return room[: value.numel()].view(value.shape)

    x, right, left, bias, pivots = case(61, 30, 46, rows, pivot=True, seed=rows)
    y = pivoted(*(guarded(t) for t in (x, right, left)), pivots.sort().values.int(), guarded(bias))
    assert torch.isfinite(y).all()


def test_infinity_and_nan_reach_only_their_own_row():
    x, right, left, bias, pivots = case(65, 30, 64, 9, pivot=True, seed=1)
    x[3, 5], x[7, 0] = float("inf"), float("nan")
    for dtype in DTYPES:
        given = (t.to(dtype) for t in (x, right, left))
        y = pivoted(*given, pivots.int(), bias.to(dtype))
        clean = [row for row in range(9) if row not in (3, 7)]
        assert torch.isfinite(y[clean]).all()
        assert not torch.isfinite(y[7]).any()  # zeros of the weight times NaN are NaN


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_company_within_a_kernel(dtype):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    right, left = draw(200, 576), draw(576, 200)
    on_tiles = dtype is torch.bfloat16 and extension_status().build.get("cpu_kernels") == "amx"
    for together, few in ((16, 2 if on_tiles else 1), (48, 17)):  # dots or tiles, then panels or tiles
        x = draw(together, 576)
        y = low_rank(x, right, left, None)
        assert torch.equal(low_rank(x[:few], right, left, None), y[:few])


CODE = """
import hashlib, torch
from eigenprune.ops import _build_info
torch.set_num_threads({threads})
digest, seen = hashlib.sha256(), 0
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for rows in (1, 16, 40, 64, 200):
        if _build_info.linear_path(str(dtype).removeprefix("torch."), rows, 128, 130) == "torch":
            continue  # torch's own products promise no such thing
        seen += 1
        g = torch.Generator().manual_seed(rows)
        r = lambda *s: torch.randn(*s, generator=g).to(dtype)
        p = torch.randperm(300, generator=g)[:130].sort().values.int()
        y = torch.ops.eigenprune.pivot_linear(r(rows, 128), r(130, 128), r(170, 130), p, r(300))
        digest.update(y.view(torch.uint8).numpy().tobytes())
print(seen, digest.hexdigest())
"""


@pytest.mark.parametrize("kernels", ["avx2", "avx512", "avx512_bf16", "amx"])
def test_threads_do_not_change_a_bit(kernels):
    if not extension_status().loaded:
        pytest.skip("the extension is not loaded")
    runs = [run_python(CODE.format(threads=threads), EIGENPRUNE_CPU_KERNELS=kernels) for threads in (1, 2, 3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert len({run.stdout for run in runs}) == 1
    if extension_status().build["cpu_kernels"] != "plain":
        assert int(runs[0].stdout.split()[0]) >= 6  # AVX2 has up to 16 rows of three dtypes, all others more


@pytest.mark.parametrize("kernels", ["plain", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_is_exact(kernels):
    """The same exact tests with fewer instructions than this processor has."""
    if not extension_status().loaded:
        pytest.skip("the extension is not loaded")
    code = (
        "import sys, pytest; from eigenprune.ops import extension_status\n"
        "print(extension_status().build['cpu_kernels'])\n"
        "sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', 'tests/ops/test_cpu_kernels.py', '-k', "
        "'whole_numbers or past_the_inputs or own_row']))"
    )
    result = run_python(code, EIGENPRUNE_CPU_KERNELS=kernels)
    assert result.returncode == 0, result.stdout + result.stderr
    levels = ("plain", "avx2", "avx512", "avx512_bf16", "amx")
    assert levels.index(result.stdout.split()[0]) <= levels.index(kernels)


def test_an_unknown_instruction_set_is_reported():
    code = "from eigenprune.ops import extension_status; print(extension_status().reason)"
    result = run_python(code, EIGENPRUNE_CPU_KERNELS="sse9")
    known = "plain, avx2, avx512, avx512_bf16, amx"
    assert f"EIGENPRUNE_CPU_KERNELS='sse9' is unknown (there are: {known})" in result.stdout
