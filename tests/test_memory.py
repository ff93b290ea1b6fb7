# SPDX-License-Identifier: Apache-2.0
"""Giving memory back never changes a value, and does give it back."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from eigenprune.memory import page_span, release_pages, release_unused

MEGABYTES = 32
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")


def resident_file_bytes() -> int:
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["RssFile"].split()[0]) * 1024


def test_span_holds_whole_pages_inside_the_storage() -> None:
    tensor = torch.zeros(100_003)
    start, length = page_span(tensor)
    assert tensor.data_ptr() <= start
    assert start + length <= tensor.data_ptr() + tensor.numel() * 4
    assert length > tensor.numel() * 4 - 3 * 65536  # at most a page short at each end, pages are 64 kB at most


@pytest.mark.parametrize("tensor", [torch.zeros(0), torch.zeros(3), torch.zeros(4, device="meta")])
def test_small_empty_and_meta_tensors_are_left_alone(tensor: torch.Tensor) -> None:
    assert page_span(tensor)[1] == 0
    release_pages(page_span(tensor))


def test_anonymous_memory_keeps_its_values() -> None:
    tensor = torch.arange(1 << 20)
    release_pages(page_span(tensor))
    release_unused()
    assert torch.equal(tensor, torch.arange(1 << 20))


@linux
def test_mapped_weights_leave_residence_and_keep_their_values(tmp_path: Path) -> None:
    values = torch.randn(MEGABYTES << 18)
    save_file({"w": values}, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", framework="pt") as opened:
        mapped = opened.get_tensor("w")
        assert torch.equal(mapped, values)  # read, so resident
        before = resident_file_bytes()
        release_pages(page_span(mapped))
        freed = before - resident_file_bytes()
        assert torch.equal(mapped, values)
    assert freed >= 0.9 * (MEGABYTES << 20)
