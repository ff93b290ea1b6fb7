# SPDX-License-Identifier: Apache-2.0
"""truncated_svd: bad arguments, threads, determinism, interrupts."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eigenprune.errors import WeightError
from eigenprune.ops import truncated_svd, truncated_svd_reference
from tests.ops.helpers import DTYPES, ROOT, normal, run_python


@pytest.mark.parametrize("function", [truncated_svd, truncated_svd_reference])
def test_wrong_arguments_name_the_operator_and_the_rule(function):
    a = normal(3, 4, 5, dtype=torch.float32)
    for arguments, text in (
        ((normal(4), 1), r"at least a matrix \(a \[4\]\)"),
        ((a.long(), 1), "not torch.int64"),
        ((a, 5), r"rank 5 is outside \[0, 4\]"),
        ((a, -1), r"rank -1 is outside \[0, 4\]"),
        ((a, [1, 2]), "2 ranks for 3 matrices"),
        ((a, []), "0 ranks for 3 matrices"),
    ):
        with pytest.raises(RuntimeError, match="eigenprune::truncated_svd: .*" + text):
            function(*arguments)


def test_unknown_methods_bad_tolerances_and_gradients_are_refused():
    a = normal(4, 5, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="method 'fast' is unknown; use one of auto"):
        truncated_svd(a, 1, method="fast")
    for tolerance in (-0.1, float("nan"), float("inf")):
        with pytest.raises(RuntimeError, match=r"tolerance .* must be at least 0"):
            truncated_svd(a, 1, tolerance=tolerance)
    with pytest.raises(RuntimeError, match=r"has no gradient; pass a.detach\(\)"):
        truncated_svd(a.clone().requires_grad_(), 1)
    with torch.no_grad():
        assert not truncated_svd(a.clone().requires_grad_(), 1).U.requires_grad
    leaf = a.clone().requires_grad_()
    u = torch.ops.eigenprune.truncated_svd(leaf, [1], True, 0.005, 0, "auto")[0]
    with pytest.raises(RuntimeError, match="has no gradient"):
        u.sum().backward()


sizes = st.integers(0, 67)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_arguments_give_an_error_or_the_right_answer(data):
    lead = data.draw(st.lists(st.integers(0, 3), max_size=2))
    m, n = data.draw(sizes), data.draw(sizes)
    dtype = data.draw(st.sampled_from(DTYPES))
    step = data.draw(st.integers(1, 2))
    method = data.draw(st.sampled_from(["auto", "exact", "gram", "lapack", "rounded", "subspace"]))
    rank = data.draw(st.one_of(st.none(), st.integers(-2, min(m, n) + 2)))
    a = (
        normal(*lead, n, m * step, dtype=dtype)[..., ::step].mT
        if data.draw(st.booleans())
        else normal(*lead, m, n, dtype=dtype)
    )
    if rank is not None and not 0 <= rank <= min(m, n):
        with pytest.raises(RuntimeError, match="outside"):
            truncated_svd(a, rank, method=method)
        return
    found = truncated_svd(a, rank, method=method)
    kept = min(m, n) if rank is None else rank
    assert found.U.shape == (*lead, m, kept)
    assert found.S.shape == (*lead, kept)
    assert found.Vh.shape == (*lead, kept, n)
    rest = a.double() - (found.U.double() * found.S.double().unsqueeze(-2)) @ found.Vh.double()
    best = truncated_svd_reference(a, rank).error
    norm = a.double().square().sum((-2, -1)).sqrt()
    slack = 64 * torch.finfo(found.S.dtype).eps * norm * max(1, min(m, n)) ** 0.5
    assert (rest.square().sum((-2, -1)).sqrt() <= best * 1.005 + slack).all()


def test_global_random_state_is_left_alone_and_seeds_decide():
    a = normal(200, 200, dtype=torch.float32)
    state = torch.random.get_rng_state()
    one = truncated_svd(a, 20, method="subspace", seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(99)
    for _ in range(4):
        assert all(torch.equal(x, y) for x, y in zip(one, truncated_svd(a, 20, method="subspace", seed=1), strict=True))
    assert not torch.equal(one.S, truncated_svd(a, 20, method="subspace", seed=2).S)


def test_a_matrix_does_not_see_its_batch():
    a = normal(5, 90, 70, dtype=torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, a single matrix is spread over them, and its sums have another order
    try:
        for method in ("gram", "rounded", "subspace"):
            whole = truncated_svd(a, 10, method=method)
            alone = truncated_svd(a[3], 10, method=method)
            assert all(torch.equal(x[3], y) for x, y in zip(whole, alone, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_the_exact_gram_path_gives_the_same_to_float64_rounding_on_one_thread_and_on_two(tmp_path):
    """An eigenvector of G moves by eps |G| / gap; rounding to float32 adds half a unit on either side."""
    code = (
        "import os, torch; from eigenprune.ops import truncated_svd\n"
        "a = torch.randn(6, 130, 200, generator=torch.Generator().manual_seed(5))\n"
        "found = {}\n"
        "for run, threads in (('first', 1), ('again', 1), ('two', 2), ('two again', 2)):\n"
        "    torch.set_num_threads(threads)\n"
        "    found[run] = list(truncated_svd(a, None, method='gram')[:3])\n"
        "torch.save(found, os.environ['FOUND'])\n"
    )
    done = run_python(code, FOUND=str(tmp_path / "found.pt"), OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for run in ("first", "two"):
        again = found["again" if run == "first" else "two again"]
        assert all(torch.equal(x, y) for x, y in zip(found[run], again, strict=True))
    (u, s, vh), (u2, s2, vh2) = found["first"], found["two"]
    squares = s.double().square()
    gaps = torch.stack([(row[:, None] - row).abs().fill_diagonal_(torch.inf).amin(0) for row in squares])
    moved = 2**-52 * s.shape[-1] * squares[:, :1] / gaps
    unit = 2**-23
    assert ((s - s2).abs() <= unit * s).all()
    assert ((u - u2).abs().double() <= unit * u.abs() + moved[:, None, :]).all()
    assert ((vh - vh2).abs().double() <= unit * vh.abs() + moved[:, :, None]).all()


@pytest.mark.parametrize("method", ["gram", "lapack", "rounded", "subspace"])
def test_eight_threads_fifty_calls_are_bit_equal_to_serial(method):
    inputs = [normal(2, 24, 36, dtype=torch.float32, seed=seed) for seed in range(8)]
    serial = [truncated_svd(a, 6, method=method) for a in inputs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for turn in range(50):
                results = pool.map(lambda a: truncated_svd(a, 6, method=method), inputs)
                for expected, found in zip(serial, results, strict=True):
                    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True)), turn
    finally:
        sys.setswitchinterval(interval)


def test_the_interpreter_lock_is_released():
    # A counter in another thread goes on while one call works: with the lock held it would stand still.
    code = (
        "import threading, time, torch; from eigenprune.ops import gram_svd\n"
        "a = torch.randn(400, 64, 96); gram_svd(a[:2], 4); ticks = []; stop = threading.Event()\n"
        "def tick():\n"
        "    while not stop.is_set(): ticks.append(time.perf_counter()); time.sleep(0.001)\n"
        "thread = threading.Thread(target=tick); thread.start(); time.sleep(0.05)\n"
        "start = time.perf_counter(); gram_svd(a, 64); end = time.perf_counter(); stop.set(); thread.join()\n"
        "print(sum(start < t < end for t in ticks))\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5


def test_an_interrupt_stops_a_long_call():
    code = (
        "import signal, torch; from eigenprune.ops import truncated_svd\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs inherit another
        "a = torch.randn(2000, 400, 400); print('ready', flush=True)\n"
        "try: truncated_svd(a, 40, method='subspace')\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(2)
    out, _ = process.communicate(timeout=60)
    assert out == "interrupted\n"


def test_a_bad_matrix_deep_in_a_batch_leaves_nothing_behind():
    a = normal(40, 12, 12, dtype=torch.float32)
    a[37, 3, 3] = float("nan")
    with pytest.raises(WeightError, match="matrix 37"):
        truncated_svd(a, 3)
    assert torch.isfinite(truncated_svd(a[:37], 3).S).all()
