# SPDX-License-Identifier: Apache-2.0
"""Tuners on the parts of factored layers: a matrix of family x layout x dtype x tuner, and what is done with each."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from eigenprune.layers import low_rank_layers
from tests.helpers.adapters import TARGETS, difference, pruned_model, trained_
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import logits

peft = pytest.importorskip("peft")

TUNERS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=["right", "left"]),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["right", "left"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["right", "left"]),
    "ia3": lambda: peft.IA3Config(target_modules=["right", "left"], feedforward_modules=[]),
}
SAME = {
    # A merge computes the same in another order of sums.
    torch.float32: 1e-5,
    # As in test_peft_lora, for the two roundings more that every factor of a layer takes when a change is added to it.
    torch.bfloat16: 6 * (2 * 15) ** 0.5 * 2.0**-9,
}


@pytest.mark.parametrize("dtype", SAME, ids=str)
@pytest.mark.parametrize("layout", ["pair", "pivot"])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("tuner", TUNERS)
def test_a_tuner_on_the_parts(tuner: str, kind: str, layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = pruned_model(kind, layout, dtype)
    plain, same = logits(base), SAME[dtype]
    model = peft.get_peft_model(copy.deepcopy(base), TUNERS[tuner]())
    assert difference(logits(model), plain) <= same
    trained = logits(trained_(model))
    assert difference(trained, plain) > 0.05
    with model.disable_adapter():
        # Not to the bit: a wrapped part is called by itself, and in bfloat16 its output is rounded before the bias.
        assert difference(logits(model), plain) <= same

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(again), trained)

    merged = model.merge_and_unload()
    assert difference(logits(merged), trained) <= same
    assert type(merged) is type(base)
    ranks = {name: layer.rank for name, layer in low_rank_layers(base).items()}
    assert {name: layer.rank for name, layer in low_rank_layers(merged).items()} == ranks  # it never grows
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(base).from_pretrained(tmp_path / "merged")
    assert state_hashes(loaded) == state_hashes(merged)
