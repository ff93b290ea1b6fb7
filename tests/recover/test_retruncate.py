# SPDX-License-Identifier: Apache-2.0
"""Cutting ranks during training: the weight against a float64 SVD, the optimizer against gradients taken anew."""

import pytest
import torch
from torch import Tensor, nn

from eigenprune.errors import ConfigError
from eigenprune.layers import LAYOUTS, LowRankLinear, low_rank_layers
from eigenprune.recover import retruncate_
from eigenprune.spectral import pivot_factors
from tests.helpers.adapters import pruned_model, trained_
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import token_windows

OUT, IN, RANK, LESS = 30, 22, 9, 5
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)
EXACT = 1e-10  # float64, values below 100, a few small factorisations


def model_of(layout: str) -> nn.Sequential:
    generator = torch.Generator().manual_seed(3)
    left, right, pivots = (
        torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((OUT, RANK), (RANK, IN), (1,))
    )
    if layout == "pivot":
        left, right, pivots = pivot_factors(left, right)
    return nn.Sequential(LowRankLinear.from_factors(left, right, pivots=pivots if layout == "pivot" else None))


@both_layouts
def test_weight_is_the_truncated_svd(layout: str) -> None:
    model = model_of(layout)
    layer = model[0]
    u, s, vh = torch.linalg.svd(layer.weight.detach())
    best = u[:, :LESS] @ torch.diag(s[:LESS]) @ vh[:LESS]
    assert retruncate_(model, {"0": LESS}) is model
    assert (layer.rank, layer.layout) == (LESS, layout)
    assert float((layer.weight.detach() - best).abs().max()) <= EXACT
    fresh = LowRankLinear(IN, OUT, LESS, layout=layout, bias=False, dtype=torch.float64)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(3, IN, dtype=torch.float64)
    assert float((layer(x).detach() - x @ best.t()).abs().max()) <= EXACT


def gradient_steps(model: nn.Module, optimizer: torch.optim.Optimizer, dense: list[Tensor]) -> None:
    """Feed the gradients that given gradients of the product have in the factors."""
    for gradient in dense:
        optimizer.zero_grad()
        (model[0].weight * gradient).sum().backward()
        optimizer.step()


def test_first_moment_is_the_one_of_the_new_factors() -> None:
    """At a learning rate of zero the factors stay, and the momentum is a sum of gradients in them."""
    dense = [torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    model, other = model_of("pair"), model_of("pair")
    moments = []
    for one, before in ((model, True), (other, False)):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.0, momentum=0.9)
        if before:
            gradient_steps(one, optimizer, dense)
            retruncate_(one, {"0": LESS}, optimizer=optimizer)
        else:
            retruncate_(one, {"0": LESS}, optimizer=optimizer)
            gradient_steps(one, optimizer, dense)
        moments.append([optimizer.state[p]["momentum_buffer"] for p in one.parameters()])
    for got, wanted in zip(*moments, strict=True):
        assert got.shape == wanted.shape
        assert float((got - wanted).abs().max()) <= EXACT * float(wanted.abs().max())


def test_second_moment_stays_positive_and_of_the_size_of_a_new_one() -> None:
    dense = [torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(300)]
    model, other = model_of("pair"), model_of("pair")
    optimizer, anew = (torch.optim.Adam(m.parameters(), lr=0.0, betas=(0.9, 0.99)) for m in (model, other))
    gradient_steps(model, optimizer, dense)
    retruncate_(model, {"0": LESS}, optimizer=optimizer)
    retruncate_(other, {"0": LESS}, optimizer=anew)
    gradient_steps(other, anew, dense)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        got, wanted = optimizer.state[one]["exp_avg_sq"], anew.state[two]["exp_avg_sq"]
        assert (got > 0).all()
        assert 0.5 < float(got.mean() / wanted.mean()) < 2  # without the correlations of the components


@both_layouts
def test_training_goes_on_with_the_same_optimizer(layout: str) -> None:
    model = trained_(pruned_model("llama", layout))
    ids = token_windows(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ranks = {name: max(1, layer.rank - 8) for name, layer in low_rank_layers(model).items()}
    losses = []
    for number in range(12):
        if number == 6:
            retruncate_(model, ranks, optimizer=optimizer)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert {name: layer.rank for name, layer in low_rank_layers(model).items()} == ranks
    assert losses[5] < losses[0]
    assert losses[11] < losses[6]
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    assert optimizer.state.keys() == set(model.parameters())
    for parameter in model.parameters():
        assert all(value.shape == parameter.shape for value in optimizer.state[parameter].values() if value.ndim)


def test_what_cannot_be_cut_is_refused_and_nothing_changes() -> None:
    model = pruned_model()
    name = next(iter(low_rank_layers(model)))
    before = state_hashes(model)
    optimizer = torch.optim.Adam(model.parameters())
    weight = model.get_submodule(name).left.weight
    optimizer.state[weight]["shampoo"] = torch.zeros_like(weight)
    for ranks, given, says in (
        ({"nowhere": 3}, None, "nowhere"),
        ({"model.norm": 3}, None, "model.norm"),
        ({name: 0}, None, "rank 0"),
        ({name: 3}, optimizer, "shampoo"),
    ):
        with pytest.raises(ConfigError, match=says):
            retruncate_(model, ranks, optimizer=given)
    retruncate_(model, {name: 1000})
    assert state_hashes(model) == before
