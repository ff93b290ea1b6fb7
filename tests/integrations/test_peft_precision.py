# SPDX-License-Identifier: Apache-2.0
"""What a merge costs in bfloat16, beside what computing in bfloat16 costs anyway: against the same model in float64."""

import copy

import pytest
import torch
from torch import Tensor

from tests.helpers.adapters import TARGETS, pruned_model, trained_
from tests.helpers.tiny_models import logits

peft = pytest.importorskip("peft")


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("layout", ["pair", "pivot"])
@pytest.mark.parametrize("dora", [False, True])
def test_bfloat16_merge_is_about_as_near_to_float64_as_the_unmerged_model(kind: str, layout: str, dora: bool) -> None:
    """Both round about 15 layers' values three times each; the merge rounds the factors of 2 in 7 layers once more.

    Independent roundings add as squares: sqrt(1 + 2 / 7 * 2 / 3) = 1.1 is to be expected; 1.5 leaves room for the
    spread of a sample.
    """
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=TARGETS[kind], r=4, lora_alpha=8, use_dora=dora)
    model = trained_(peft.get_peft_model(pruned_model(kind, layout, torch.bfloat16), config))
    exact = logits(copy.deepcopy(model).double())
    unmerged = distance(logits(model), exact)
    merged = distance(logits(model.merge_and_unload()), exact)
    assert 0 < unmerged < 2.0**-5
    assert merged <= 1.5 * unmerged
