# SPDX-License-Identifier: Apache-2.0
"""What is kept of a teacher's predictions, on the way too."""

from pathlib import Path

import pytest
import torch

from eigenprune.recover import compute, targets, teacher_targets
from tests.helpers.tiny_models import tiny_model, token_windows


@pytest.mark.parametrize("fast", [False, True], ids=["float32", "autocast"])
def test_predictions_kept_after_every_window_are_those_of_one_go(
    fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "has_fast_bfloat16", lambda device: fast)  # products in bfloat16 run anywhere
    windows = token_windows(4, 16)
    wanted = teacher_targets(tiny_model("llama"), windows, progress=False)
    monkeypatch.setattr(targets, "SECONDS_BETWEEN_SAVES", -1)
    found = teacher_targets(tiny_model("llama"), windows, cache_dir=tmp_path, progress=False)
    assert torch.equal(found.log_probabilities, wanted.log_probabilities)
    assert torch.equal(found.classes, wanted.classes)


def test_a_killed_run_goes_on_behind_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows, model = token_windows(4, 16), tiny_model("llama")
    wanted = teacher_targets(model, windows, progress=False)
    calls: list[int] = []

    def stops(*_args: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(stops)
    with pytest.raises(KeyboardInterrupt):
        teacher_targets(model, windows, cache_dir=tmp_path, progress=False)
    found = teacher_targets(model, windows, cache_dir=tmp_path, progress=False)
    handle.remove()
    assert len(calls) == 3 + 2  # two were kept
    assert torch.equal(found.log_probabilities, wanted.log_probabilities)
