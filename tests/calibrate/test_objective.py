# SPDX-License-Identifier: Apache-2.0
"""The losses whose gradients are measured: value and gradient against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from eigenprune.calibrate import objective
from eigenprune.calibrate.objective import ROWS, objective_for, sampled_label_loss, summed_cross_entropy
from tests.calibrate import tiny

EPS = torch.finfo(torch.float32).eps


def inputs(tokens: int, vocabulary: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    logits = 5 * torch.randn(tokens, vocabulary, generator=generator)
    return logits, torch.randint(-1, vocabulary, (tokens,), generator=generator)


@pytest.mark.parametrize("tokens", [1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 5])
def test_cross_entropy_and_gradient_equal_those_of_torch_in_float64(tokens: int) -> None:
    logits, labels = inputs(tokens)
    mine = logits.clone().requires_grad_()
    other = logits.double().requires_grad_()
    loss = summed_cross_entropy(mine, labels)
    wanted = F.cross_entropy(other, labels, ignore_index=-1, reduction="sum")
    (3.5 * loss).backward()
    (3.5 * wanted).backward()
    # Each token: a normaliser of size about 15, right to a few eps; then a sum over tokens.
    assert abs(loss.item() - wanted.item()) <= tokens * 8 * EPS * 15
    # A probability exp(x - z) carries the absolute error of x - z, some 20 eps.
    assert float((mine.grad.double() - other.grad).abs().max()) <= 3.5 * 32 * EPS
    assert (mine.grad[labels < 0] == 0).all()


def test_all_labels_ignored_is_zero_loss_and_zero_gradient() -> None:
    logits = torch.randn(5, 7, requires_grad=True)
    loss = summed_cross_entropy(logits, torch.full((5,), -1))
    loss.backward()
    assert float(loss) == 0
    assert torch.equal(logits.grad, torch.zeros(5, 7))


def test_the_gradient_is_the_slope_of_the_loss() -> None:
    logits, labels = inputs(4, 6)
    # The loss of some 20 nats is computed in float32: a step h gives a slope with error 20 eps / h + h^2 / 6.
    step = 1e-2
    bound = 4 * (20 * EPS / step + step**2 / 6)
    assert torch.autograd.gradcheck(
        lambda x: summed_cross_entropy(x, labels).double(),
        logits.double().requires_grad_(),
        eps=step,
        atol=bound,
        rtol=0,
    )


def test_huge_and_infinite_logits_stay_right() -> None:
    logits = torch.tensor([[3e38, 0.0, -3e38], [-torch.inf, 0.0, 0.0]], requires_grad=True)
    loss = summed_cross_entropy(logits, torch.tensor([0, 1]))
    loss.backward()
    assert float(loss) == pytest.approx(torch.tensor(2.0).log().item(), rel=4 * EPS)
    assert torch.isfinite(logits.grad).all()


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, labels = inputs(2 * ROWS)
    short = logits.bfloat16().requires_grad_()
    loss = summed_cross_entropy(short, labels)
    loss.backward()
    other = short.detach().double().requires_grad_()
    wanted = F.cross_entropy(other, labels, ignore_index=-1, reduction="sum")
    wanted.backward()
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(wanted)) <= len(labels) * 8 * EPS * 15
    assert short.grad.dtype == torch.bfloat16
    assert float((short.grad.double() - other.grad).abs().max()) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (tiny.llama, "next-token"),
        (tiny.gpt2, "next-token"),
        (tiny.bert, "sampled-label"),
        (lambda: tiny.bert("BertForSequenceClassification"), "sampled-label"),
        (lambda: tiny.bert("BertModel"), "hidden-state"),
        (tiny.t5, "sampled-label"),
        (lambda: tiny.t5("T5EncoderModel"), "hidden-state"),
    ],
    ids=["llama", "gpt2", "bert-mlm", "bert-classifier", "bert-trunk", "t5", "t5-encoder"],
)
def test_every_kind_of_model_gets_its_objective_and_a_finite_loss(make, name: str) -> None:
    model = make().eval()
    found, loss = objective_for(model)
    assert found == name
    value = loss(model, tiny.windows(1), torch.Generator().manual_seed(0))
    assert value.shape == ()
    assert torch.isfinite(value)


def test_next_token_loss_is_the_sum_of_every_predicted_token() -> None:
    model, ids = tiny.llama().eval(), tiny.windows(1)
    value = objective.next_token_loss(model, ids, torch.Generator())
    wanted = tiny.causal_loss(model.double(), ids, 0)
    # About 4 nats a token, each from logits right to FLOAT32_RUN relative.
    assert float(value) == pytest.approx(float(wanted), rel=tiny.FLOAT32_RUN)


def test_sampled_labels_depend_on_the_seed_alone() -> None:
    model, ids = tiny.bert().eval(), tiny.windows(1)
    draw = [float(sampled_label_loss(model, ids, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)]
    torch.manual_seed(99)
    again = float(sampled_label_loss(model, ids, torch.Generator().manual_seed(1)))
    assert draw[0] == draw[1] == again
    assert draw[0] != draw[2]


def test_hidden_state_gradients_are_the_noise() -> None:
    model, ids = tiny.bert("BertModel").eval(), tiny.windows(1)
    kept = []
    handle = model.encoder.register_forward_hook(
        lambda m, a, o: (o.last_hidden_state.retain_grad(), kept.append(o.last_hidden_state))[1]
    )
    objective.hidden_state_loss(model, ids, torch.Generator().manual_seed(3)).backward()
    handle.remove()
    noise = torch.randn(kept[0].shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(kept[0].grad, noise)


def test_a_causal_model_is_told_by_its_class() -> None:
    assert objective.is_causal(tiny.gpt2())
    assert not objective.is_causal(tiny.bert())
    assert not objective.is_causal(transformers.LlamaModel(tiny.llama().config))
