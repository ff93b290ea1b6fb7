# SPDX-License-Identifier: Apache-2.0
"""KL curvature (IO-SVD) and squared weight gradients (FWSVD), against Jacobians and gradients taken one by one."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from eigenprune.calibrate import collect_statistics
from eigenprune.calibrate.kl_curvature import TOP_TOKENS, TOP_TOKENS_KL, top_tokens_kl
from eigenprune.errors import CalibrationError
from tests.calibrate import tiny
from tests.calibrate.tiny import FLOAT32_RUN, error, linears

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eigenprune.calibrate.collect.has_fast_bfloat16", lambda device: False)


class Table(nn.Module):
    """A model whose logits are its parameter: what arrives there is the derivative by the logits itself."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[None])


def test_the_draws_have_the_curvature_of_the_divergence_as_second_moment() -> None:
    positions, vocabulary, draws = 3, 11, 6000
    logits = torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(0)).double()
    model = Table(logits)
    size = positions * vocabulary
    total = torch.zeros(size, size, dtype=torch.float64)
    for draw in range(draws):
        model.logits.grad = None
        top_tokens_kl(model, torch.zeros(1, positions).long(), torch.Generator().manual_seed(draw)).backward()
        gradient = model.logits.grad.flatten()
        total += torch.outer(gradient, gradient) / draws
    wanted = torch.zeros(size, size, dtype=torch.float64)
    for t in range(positions):
        top = logits[t].topk(TOP_TOKENS).indices
        p = logits[t][top].softmax(0)
        rows = t * vocabulary + top
        wanted[rows.unsqueeze(1), rows] = torch.diag(p) - torch.outer(p, p)
    # An entry is a mean of `draws` values between -1 and 1: its standard error is at most 1 / sqrt(draws), and the
    # largest of some thousand entries stays within 5 of them.
    assert float((total - wanted).abs().max()) <= 5 * draws**-0.5
    assert float(wanted.abs().max()) > 0.1


def test_the_output_gram_is_that_of_the_jacobian_of_the_likeliest_logits(exact: None) -> None:
    model, ids = tiny.llama().eval(), tiny.windows(2, 10)
    layers = {LAYER: model.get_submodule(LAYER)}
    got = collect_statistics(model, ids, layers, objective=TOP_TOKENS_KL, progress=False).output_gram(LAYER)
    twin = copy.deepcopy(model).double()
    total, count = torch.zeros(48, 48, dtype=torch.float64), 0
    for index in range(len(ids)):
        outputs: list[Tensor] = []
        handle = twin.get_submodule(LAYER).register_forward_hook(lambda m, a, y, kept=outputs: kept.append(y))
        logits = twin(input_ids=ids[index : index + 1], use_cache=False).logits[0]
        handle.remove()
        signs = torch.randint(0, 2, (1, 10, TOP_TOKENS), generator=torch.Generator().manual_seed(index))[0] * 2 - 1
        gradient = torch.zeros(10, 48, dtype=torch.float64)
        for t in range(10):
            top = logits[t].topk(TOP_TOKENS).indices
            p = logits[t][top].detach().softmax(0)
            jacobian = torch.stack(
                [torch.autograd.grad(logits[t, k], outputs[0], retain_graph=True)[0][0] for k in top]
            )
            for k in range(TOP_TOKENS):
                column = -p
                column[k] += 1  # e_k - p
                gradient += signs[t, k] * p[k].sqrt() * torch.einsum("k,kto->to", column, jacobian)
        for g in gradient:
            total += torch.outer(g, g)
            count += 1
    # Ranks of near-equal logits would differ in float32: there are none here, or the error would be of order one.
    assert error(got, total / count) <= 8 * FLOAT32_RUN


def test_squared_weight_gradients_are_those_of_one_window_at_a_time(exact: None) -> None:
    model, ids = tiny.llama().eval(), tiny.windows(4)
    layers = linears(model)
    got = collect_statistics(model, ids, layers, kinds=("weight_gradient_square",), progress=False)
    twin = copy.deepcopy(model).double()
    wanted = {name: 0.0 for name in layers}
    for index in range(len(ids)):
        twin.zero_grad()
        tiny.causal_loss(twin, ids[index : index + 1], index).backward()
        for name in layers:
            wanted[name] = wanted[name] + twin.get_submodule(name).weight.grad.square().mean(0) / len(ids)
    for name in layers:
        assert error(got.weight_gradient_square(name), wanted[name]) <= 2 * FLOAT32_RUN  # squared: twice the error


def test_an_unknown_objective_is_a_calibration_error() -> None:
    model = tiny.llama()
    with pytest.raises(CalibrationError, match="objective 'kl' is unknown; there are: top-tokens-kl"):
        collect_statistics(model, tiny.windows(1), linears(model), objective="kl", progress=False)


def test_a_model_without_a_head_has_no_likeliest_tokens() -> None:
    model = tiny.bert("BertModel")
    with pytest.raises(CalibrationError, match="BertModel has no head"):
        collect_statistics(model, tiny.windows(1), linears(model), objective=TOP_TOKENS_KL, progress=False)
