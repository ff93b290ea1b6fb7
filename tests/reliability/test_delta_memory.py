# SPDX-License-Identifier: Apache-2.0
"""Peak memory of deltas: some tensors, however many the model has (row G40). About 15 s on one core."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TENSORS, SIDE = 32, 1024
LARGEST = 4 * SIDE**2
MODEL = TENSORS * LARGEST
# A tensor of each model, a copy of the kept entries, their int64 numbers while they are gathered (at most twice as much
# as float32), and masks of a byte an entry.
BOUND = 6 * LARGEST
SLACK = 4 << 20  # pages and pieces that the allocator keeps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status"),
]


def test_encode_and_decode_hold_a_few_tensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "tuned"):
        tensors = {f"layers.{i}.weight": torch.randn(SIDE, SIDE, generator=generator) for i in range(TENSORS)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    command = [sys.executable, "-m", "tests.helpers.peak_delta", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print({step: {kind: f"{value / 1e6:.1f} MB" for kind, value in sizes.items()} for step, sizes in found.items()})
    # Between its two passes the writer keeps one bit for every entry: 1/32 of a float32 model.
    assert found["encode"]["anonymous"] <= BOUND + MODEL // 32 + SLACK < MODEL / 3
    assert found["decode"]["anonymous"] <= BOUND + SLACK < MODEL / 3
    mask = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(0)) < 0.75
    base, tuned, merged = (load_file(tmp_path / f"{name}.safetensors") for name in ("base", "tuned", "merged"))
    assert all(torch.equal(merged[name], torch.where(mask, tuned[name], base[name])) for name in base)
