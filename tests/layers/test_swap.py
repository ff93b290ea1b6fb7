# SPDX-License-Identifier: Apache-2.0
"""Into a model and back to dense."""

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from eigenprune.layers import LAYOUTS, LowRankLinear, dense_like, low_rank_layers, replace_module_, to_dense_

OUT, IN, RANK = 20, 18, 6


def factored(layout: str, bias: bool = True, conv1d: bool = False) -> LowRankLinear:
    module = LowRankLinear(IN, OUT, RANK, layout=layout, bias=bias, conv1d=conv1d)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return module


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("conv1d", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_back_to_dense_is_the_stock_layer_of_the_same_weight(
    layout: str, bias: bool, conv1d: bool, training: bool
) -> None:
    model = nn.Sequential(nn.Identity(), nn.ModuleDict({"x": factored(layout, bias, conv1d)})).train(training)
    before: LowRankLinear = model[1]["x"]
    assert to_dense_(model) is model
    after = model[1]["x"]
    assert type(after) is (Conv1D if conv1d else nn.Linear)
    assert after.training is training
    assert torch.equal(after.weight, before.weight)
    assert after.weight.is_contiguous()
    assert isinstance(after.weight, nn.Parameter)
    if bias:
        assert torch.equal(after.bias, before.bias)
    else:
        assert after.bias is None or (conv1d and not after.bias.any())
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(0))
    # The same sums in another order: `in` and `rank` terms of float32.
    size = float(x.norm(dim=-1).max() * before.left.weight.norm() * before.right.weight.norm())
    assert float((after(x) - before(x)).abs().max()) <= (IN + RANK) * torch.finfo(torch.float32).eps * size
    assert low_rank_layers(model) == {}


def test_a_dense_layer_can_be_printed_saved_and_trained() -> None:
    model = to_dense_(nn.Sequential(factored("pivot")))
    fresh = nn.Sequential(nn.Linear(IN, OUT))
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert repr(fresh) == repr(model)
    model(torch.ones(2, IN)).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("frozen", [True, False])
def test_the_gradient_flags_survive_the_way_back(frozen: bool) -> None:
    model = nn.Sequential(factored("pair")).requires_grad_(not frozen)
    to_dense_(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == [not frozen] * 2


@pytest.mark.parametrize("training", [True, False])
def test_a_replacement_takes_the_training_mode_of_what_it_replaces(training: bool) -> None:
    model = nn.Sequential(nn.ModuleList([nn.Linear(IN, OUT)])).train(training)
    new = factored("pair").train(not training)
    replace_module_(model, "0.0", new)
    assert model[0][0] is new
    assert all(module.training is training for module in model.modules())


def test_a_name_that_is_not_there_is_an_error_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT))
    with pytest.raises(AttributeError):
        replace_module_(model, "1", factored("pair"))
    assert list(dict(model.named_modules())) == ["", "0"]


def test_factored_layers_are_listed_in_model_order() -> None:
    model = nn.ModuleDict({"b": factored("pair"), "a": nn.Sequential(nn.Linear(IN, OUT), factored("pivot"))})
    assert list(low_rank_layers(model)) == ["b", "a.1"]


@pytest.mark.parametrize("bias", [True, False])
def test_dense_like_shares_its_weight_and_keeps_the_dtype(bias: bool) -> None:
    weight, offset = torch.randn(OUT, IN).bfloat16(), torch.randn(OUT).bfloat16() if bias else None
    linear = dense_like(weight, offset, conv1d=False)
    assert linear.weight.data_ptr() == weight.data_ptr()
    assert (linear.in_features, linear.out_features) == (IN, OUT)
    conv = dense_like(weight, offset, conv1d=True)
    assert (conv.nx, conv.nf) == (IN, OUT)
    assert torch.equal(conv.weight, weight.t())
    assert {p.dtype for p in (*linear.parameters(), *conv.parameters())} == {torch.bfloat16}


def test_a_whole_gpt2_goes_there_and_back() -> None:
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    text = repr(model)
    name = "transformer.h.0.mlp.c_fc"
    dense = model.get_submodule(name)
    u, s, vh = torch.linalg.svd(dense.weight.detach().t(), full_matrices=False)
    full = LowRankLinear.from_factors(u * s, vh, bias=dense.bias, conv1d=True)
    ids = torch.arange(9).unsqueeze(0)
    wanted = model(ids).logits
    replace_module_(model, name, full)
    # A full-rank factorisation in float32: some sqrt(32) roundings of each of the few products after it.
    bound = 64 * torch.finfo(torch.float32).eps * 32**0.5 * float(wanted.abs().max())
    assert float((model(ids).logits - wanted).abs().max()) <= bound
    to_dense_(model)
    assert repr(model) == text
    assert float((model(ids).logits - wanted).abs().max()) <= bound
