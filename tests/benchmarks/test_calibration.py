# SPDX-License-Identifier: Apache-2.0
"""Statistics of the curve: those of more windows are made of those of fewer ones."""

import runpy
from pathlib import Path

import pytest
import torch

from eigenprune.calibrate import collect_statistics
from eigenprune.layers import select_layers
from tests.helpers.tiny_models import tiny_model, token_windows

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "calibration.py"


def test_joined_statistics_are_those_of_all_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eigenprune.calibrate.collect.has_fast_bfloat16", lambda _device: False)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    joined = runpy.run_path(str(SCRIPT))["joined"]
    model, windows = tiny_model("llama"), token_windows(7)
    layers = select_layers(model).chosen
    first, second, whole = (
        collect_statistics(model, part, layers, progress=False) for part in (windows[:2], windows[2:], windows)
    )
    found = joined(first, second)
    assert found.tensors.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        # Sums of as many terms as there are tokens, in another order.
        bound = windows.numel() * torch.finfo(torch.float32).eps * float(tensor.abs().max())
        torch.testing.assert_close(found.tensors[name], tensor, rtol=0, atol=bound)
    for fact in ("windows", "tokens", "output_tokens", "window"):
        assert getattr(found.facts, fact) == getattr(whole.facts, fact), fact
