# SPDX-License-Identifier: Apache-2.0
"""2:4 masks against a literal loop; PyTorch's sparse kernels where there are any, and the dense weight elsewhere."""

import pytest
import torch
from torch import nn

from eigenprune.entries.semi_structured import compress_, decompress_, is_two_of_four, two_of_four, why_dense
from eigenprune.errors import ConfigError, WeightError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_equals_a_literal_loop_also_with_ties(dtype: torch.dtype) -> None:
    scores = torch.randint(0, 3, (17, 24), generator=torch.Generator().manual_seed(0)).to(dtype)
    for row, kept in zip(scores.tolist(), two_of_four(scores).tolist(), strict=True):
        for start in range(0, 24, 4):
            group = range(start, start + 4)
            best = sorted(group, key=lambda i, row=row: (-row[i], i))[:2]
            assert [i for i in group if kept[i]] == sorted(best)


def test_view_gives_what_its_copy_gives() -> None:
    scores = torch.randn(16, 8).t()
    assert torch.equal(two_of_four(scores), two_of_four(scores.contiguous()))


def test_masked_weight_is_two_of_four_and_a_full_one_is_not() -> None:
    weight = torch.randn(8, 12)
    assert not is_two_of_four(weight)
    assert is_two_of_four(weight * two_of_four(weight.abs()))
    assert is_two_of_four(torch.zeros(3, 4))
    assert not is_two_of_four(torch.zeros(3, 6))
    assert not is_two_of_four(torch.zeros(8))


def test_what_has_no_groups_of_four_is_refused() -> None:
    for scores in (torch.ones(4), torch.ones(4, 6), torch.ones(2, 2, 4), torch.full((2, 4), torch.nan)):
        with pytest.raises(WeightError):
            two_of_four(scores)


def pruned_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64), nn.Linear(64, 6, bias=False)).to(dtype)
    for layer in (model[0], model[2]):
        layer.weight.data *= two_of_four(layer.weight.abs())
    return model.requires_grad_(False)


def test_without_a_gpu_weights_stay_dense_and_the_reason_is_given() -> None:
    model = pruned_model()
    before = [parameter.clone() for parameter in model.parameters()]
    assert compress_(model) == {"0": "dense: no sparse kernel for cpu", "2": "dense: no sparse kernel for cpu"}
    decompress_(model)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert why_dense(torch.empty(4, 4, device="meta")) == "no sparse kernel for meta"
    with pytest.raises(ConfigError, match="no linear layer"):
        compress_(nn.Sequential(nn.Linear(8, 8)))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="PyTorch's 2:4 kernels need an NVIDIA GPU of compute capability 8.0 or newer",
)
def test_on_a_gpu_the_kernels_give_what_the_dense_weight_gives() -> None:
    model = pruned_model(torch.float16).cuda()
    x = torch.randn(128, 128, dtype=torch.float16, device="cuda")
    dense = model(x)
    assert compress_(model) == {"0": "sparse", "2": "sparse"}
    # Sums of 64 and 32 products in another order, rounded to float16.
    assert float((model(x) - dense).abs().max()) <= 8 * 2.0**-11 * float(dense.abs().max())
    decompress_(model)
    assert torch.equal(model(x), dense)
