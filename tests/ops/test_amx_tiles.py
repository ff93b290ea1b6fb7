# SPDX-License-Identifier: Apache-2.0
"""bfloat16 linears on AMX tiles: right at every size, nothing read outside a tensor, the same bits in any company.

`test_cpu_kernels.py` compares the tiles with whole numbers where the processor has them; here is what is theirs alone.
Elsewhere every test is skipped, with the reason.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from eigenprune.ops import extension_status, grouped_linear, low_rank_linear, pivot_linear, pivot_linear_reference
from tests.ops.helpers import error_bound, factors, normal, pivots_of, relative_error, run_python

KERNELS = extension_status().build.get("cpu_kernels")
pytestmark = pytest.mark.skipif(
    KERNELS != "amx", reason=f"needs level amx: an Intel processor with AMX, and Linux that allows it; here {KERNELS}"
)

BF16 = torch.bfloat16
# out, rank, in: around 16 rows, 32 elements, 64 rows of a tile, pair of tiles and panel; odd; and one for many chunks.
SIZES = (
    (1, 1, 1),
    (17, 16, 15),
    (33, 31, 33),
    (64, 32, 96),
    (97, 65, 63),
    (130, 113, 257),
    (576, 200, 576),
    (96, 48, 9000),
)
ROWS = (2, 15, 16, 17, 33, 48, 100, 300)


def draw(out, rank, features, rows, *, pivot, seed=0):
    right, left = factors(out, rank, features, BF16, pivot=pivot, seed=seed)
    return normal(rows, features, dtype=BF16, seed=rows), right, left, normal(out, dtype=BF16, seed=seed + 5)


def exact_pivot(x, right, left, pivots, bias):
    wide = (t.double() for t in (x, right, left))
    return pivot_linear_reference(*wide, pivots, None if bias is None else bias.double())


def check(y, exact, plain):
    """1 u in all, and no entry further off than twice what plain torch is at its worst."""
    assert relative_error(y, exact) <= error_bound(BF16)
    worst = (plain.double() - exact).abs().max()
    assert (y.double() - exact).abs().max() <= 2 * worst + 1e-6 * exact.abs().max()  # plain may be exact by chance


def test_this_processor_multiplies_tiles_from_two_rows_on():
    from eigenprune.ops import _build_info

    paths = [_build_info.linear_path("bfloat16", rows, 63, 9) for rows in (1, 2, 16, 4096)]
    assert paths == ["dots", "tiles", "tiles", "tiles"]
    assert _build_info.linear_path("float16", 2, 64, 8) == "dots"


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pair_is_as_exact_as_torch(size):
    for rows, with_bias in itertools.product(ROWS, (False, True)):
        x, right, left, bias = draw(*size, rows, pivot=False)
        bias = bias if with_bias else None
        exact = x.double() @ right.double().T @ left.double().T + (0 if bias is None else bias.double())
        check(low_rank_linear(x, right, left, bias), exact, F.linear(F.linear(x, right), left, bias))


@pytest.mark.parametrize("ascending", [True, False], ids=["ascending", "any_order"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pivot_is_as_exact_as_torch(size, ascending):
    for rows, with_bias in itertools.product(ROWS, (False, True)):
        x, right, left, bias = draw(*size, rows, pivot=True)
        bias = bias if with_bias else None
        pivots = pivots_of(size[0], size[1], ascending=ascending)
        plain = pivot_linear_reference(x, right, left, pivots, bias)
        check(pivot_linear(x, right, left, pivots, bias), exact_pivot(x, right, left, pivots, bias), plain)


def test_strides_and_leading_shapes():
    x, right, left, bias = draw(97, 65, 63, 24, pivot=False)
    expected = low_rank_linear(x, right, left, bias)
    turned = [t.T.contiguous().T for t in (x, right, left)]
    assert torch.equal(low_rank_linear(*turned, bias.repeat_interleave(2)[::2]), expected)
    assert torch.equal(low_rank_linear(x.view(2, 3, 4, 63), right, left, bias), expected.view(2, 3, 4, 97))


def test_layers_of_a_group_have_the_bits_of_single_calls():
    x, right, left, bias = draw(97, 65, 63, 40, pivot=False)
    _, right2, left2, bias2 = draw(70, 33, 63, 40, pivot=True, seed=1)
    pivots = pivots_of(70, 33, ascending=False)
    together = grouped_linear(x, [right, right2, right], [left, left2, left], [None, pivots, None], [bias, bias2, None])
    alone = [
        low_rank_linear(x, right, left, bias),
        pivot_linear(x, right2, left2, pivots, bias2),
        low_rank_linear(x, right, left),
    ]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("features", [576, 9000])
def test_a_row_does_not_depend_on_its_company(features):
    x, right, left, bias = draw(130, 113, features, 600, pivot=True)
    pivots = pivots_of(130, 113, ascending=True)
    y = pivot_linear(x, right, left, pivots, bias)
    for begin, end in ((0, 2), (3, 20), (100, 133), (255, 600)):
        assert torch.equal(pivot_linear(x[begin:end], right, left, pivots, bias), y[begin:end])


def test_many_callers_at_once_get_the_bits_of_one():
    x, right, left, _ = draw(576, 200, 576, 300, pivot=False)
    expected = low_rank_linear(x, right, left)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: low_rank_linear(x, right, left), range(400)))
    assert all(torch.equal(y, expected) for y in found)


def test_torch_has_its_own_tiles_afterwards():
    x, right, left, _ = draw(576, 200, 576, 64, pivot=False)
    before = F.linear(x, right)
    low_rank_linear(x[:, :33].contiguous(), right[:, :33].contiguous(), left)
    assert torch.equal(F.linear(x, right), before)


THREADS = """
import hashlib, torch
import eigenprune.ops
torch.set_num_threads({threads})
digest = hashlib.sha256()
for rows, features in ((2, 576), (40, 576), (1000, 576), (200, 9000)):
    g = torch.Generator().manual_seed(rows)
    r = lambda *s: torch.randn(*s, generator=g).bfloat16()
    p = torch.randperm(300, generator=g)[:130].int()
    y = torch.ops.eigenprune.pivot_linear(r(rows, features), r(130, features), r(170, 130), p, r(300))
    digest.update(y.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_threads_do_not_change_a_bit():
    runs = [run_python(THREADS.format(threads=threads)) for threads in (1, 2, 3, 8)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert len({run.stdout for run in runs}) == 1


GUARDED = """
import ctypes, mmap, torch
import eigenprune.ops

libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

def guarded(value):
    size = value.numel() * value.element_size()
    room = (size + page - 1) // page * page
    start = libc.mmap(None, room + page, 3, 0x22, -1, 0)
    assert libc.mprotect(start + room, page, 0) == 0
    place = (ctypes.c_char * size).from_address(start + room - size)
    return torch.frombuffer(place, dtype=value.dtype).view(value.shape).copy_(value)

for out, rank, features in {sizes}:
    for rows in {rows}:
        g = torch.Generator().manual_seed(rows)
        r = lambda *s: torch.randn(*s, generator=g).bfloat16()
        x, right, left, bias = r(rows, features), r(rank, features), r(out - rank, rank), r(out)
        pivots = torch.randperm(out, generator=g)[:rank].int()
        given = (x, right, left, pivots, bias)
        expected = torch.ops.eigenprune.pivot_linear(*given)
        assert torch.equal(torch.ops.eigenprune.pivot_linear(*map(guarded, given)), expected)
print("right")
"""


def test_no_page_behind_an_input_is_touched():
    """Inputs that end where memory ends: one element too many, even one that is thrown away, ends the process."""
    sizes = [(out, rank, features) for out, rank, features in SIZES if out > rank and features < 9000]
    result = run_python(GUARDED.format(sizes=sizes, rows=(2, 17, 33, 100)))
    assert (result.returncode, result.stdout) == (0, "right\n"), result.stderr


def test_a_lower_level_does_without():
    code = "from eigenprune.ops import _build_info as b; print(b.cpu_kernels(), b.linear_path('bfloat16', 64, 64, 8))"
    assert run_python(code, EIGENPRUNE_CPU_KERNELS="avx512_bf16").stdout == "avx512_bf16 panels\n"
