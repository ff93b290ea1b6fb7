# SPDX-License-Identifier: Apache-2.0
"""Operators and layers called from many threads at once (row G41)."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from eigenprune.ops import low_rank_linear, pivot_linear

THREADS, CALLS = 8, 50


@pytest.fixture
def _hasty() -> Iterator[None]:
    """Threads take turns after a microsecond, so that nearly every order of things happens."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def _operator(name: str, seed: int, out: int, inner: int, rank: int, rows: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    right = torch.randn(rank, inner, generator=generator)
    bias, x = torch.randn(out, generator=generator), torch.randn(rows, inner, generator=generator)
    if name == "low_rank_linear":
        left = torch.randn(out, rank, generator=generator)
        return lambda: low_rank_linear(x, right, left, bias)
    mix = torch.randn(out - rank, rank, generator=generator)
    pivots = torch.randperm(out, generator=generator)[:rank].int()
    return lambda: pivot_linear(x, right, mix, pivots, bias)


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize("name", ["low_rank_linear", "pivot_linear"])
def test_g41_calls_from_eight_threads_are_bit_equal_to_calls_in_turn(name: str) -> None:
    calls = [_operator(name, seed, 64 + seed, 48, 16, 1 + seed) for seed in range(CALLS)]
    wanted = [call() for call in calls]
    start = threading.Barrier(THREADS)

    def all_in_turn(first: int) -> list[tuple[int, Tensor]]:
        start.wait()
        order = [(first + step) % CALLS for step in range(CALLS)]
        return [(number, calls[number]()) for number in order]

    with ThreadPoolExecutor(THREADS) as pool:
        results = [found for part in pool.map(all_in_turn, range(0, THREADS * 6, 6)) for found in part]
    assert len(results) == THREADS * CALLS
    assert [number for number, found in results if not torch.equal(found, wanted[number])] == []


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize("name", ["low_rank_linear", "pivot_linear"])
def test_g41_gradients_from_eight_threads_are_bit_equal_to_those_in_turn(name: str) -> None:
    def gradient(seed: int) -> Tensor:
        call = _operator(name, seed, 64, 48, 16, 4)
        x = call.__closure__[-1].cell_contents.clone().requires_grad_()  # type: ignore[index]
        right, left = torch.ones(16, 48) / (seed + 1), torch.ones(64, 16) / 7
        if name == "low_rank_linear":
            y = low_rank_linear(x, right, left, None)
        else:
            y = pivot_linear(x, right, left[:48], torch.arange(0, 64, 4, dtype=torch.int32), None)
        y.pow(2).sum().backward()
        return x.grad

    wanted = [gradient(seed) for seed in range(CALLS)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(gradient, [seed for seed in range(CALLS) for _ in range(THREADS)]))
    assert all(torch.equal(found[i], wanted[i // THREADS]) for i in range(len(found)))


@pytest.mark.parametrize("name", ["low_rank_linear", "pivot_linear"])
def test_g41_long_call_lets_other_threads_run(name: str) -> None:
    """The interpreter's lock is free meanwhile: another thread counts while one call runs."""
    call = _operator(name, 0, 2048, 2048, 1024, 2048)
    call()
    counted, ended, spans = [0], threading.Event(), []

    def count() -> None:
        while not ended.is_set():
            counted[0] += 1
            time.sleep(1e-4)

    before = sys.getswitchinterval()
    sys.setswitchinterval(30)  # no thread is made to give way: what runs meanwhile does so because it was let
    counter = threading.Thread(target=count)
    counter.start()
    try:
        for _ in range(3):
            start = counted[0]
            call()
            spans.append(counted[0] - start)
    finally:
        sys.setswitchinterval(before)
        ended.set()
        counter.join()
    assert max(spans) >= 3, spans
