# SPDX-License-Identifier: Apache-2.0
"""The divergence from a teacher's likeliest classes, against sums written out in float64."""

import pytest
import torch
from torch import Tensor

from eigenprune.recover.divergence import likeliest, summed_divergence

ROWS, CLASSES = 150, 40  # more than two chunks of 64 rows


def literal(logits: Tensor, log_p: Tensor, classes: Tensor) -> Tensor:
    """Event by event, in float64."""
    q = logits.double().softmax(-1)
    total = logits.new_zeros((), dtype=torch.float64)
    for row in range(len(logits)):
        p = log_p[row].double().exp()
        p = p / p.sum() if len(p) == logits.shape[1] else p
        named = q[row, classes[row].long()]
        total = total + (p * (p / named).log()).sum()
        if len(p) < logits.shape[1]:
            p_rest, q_rest = 1 - p.sum(), q[row].sum() - named.sum()
            total = total + p_rest * (p_rest / q_rest).log()
    return total


def drawn(seed: int) -> Tensor:
    return 2 * torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top", [1, 7, CLASSES])
def test_value_and_gradient_are_those_of_the_sum_written_out(top: int) -> None:
    log_p, classes = likeliest(drawn(0), top)
    ours, theirs = drawn(1).requires_grad_(), drawn(1).double().requires_grad_()
    value, wanted = summed_divergence(ours, log_p, classes), literal(theirs, log_p, classes)
    value.backward()
    wanted.backward()
    # Some 100 float32 roundings of terms of size 1 in each of the rows; of probabilities in each entry of a gradient.
    assert abs(value.item() - wanted.item()) <= 100 * 2**-24 * ROWS
    assert (ours.grad.double() - theirs.grad).abs().max() <= 100 * 2**-24


def test_all_classes_give_the_whole_divergence() -> None:
    teacher, student = drawn(0), drawn(1)
    whole = torch.nn.functional.kl_div(student.double().log_softmax(-1), teacher.double().softmax(-1), reduction="sum")
    coarse = [float(summed_divergence(student, *likeliest(teacher, top))) for top in (1, 7, CLASSES)]
    # Kept in float16: half a unit in the last place of a logarithm below 16, 2^-8, each weighted by its probability.
    assert coarse[-1] == pytest.approx(float(whole), abs=ROWS * 2**-8)
    assert coarse == sorted(coarse)  # a coarser set of events tells less apart


def test_the_teacher_itself_is_at_distance_zero() -> None:
    teacher = drawn(0)
    for top in (1, 7, CLASSES):
        assert float(summed_divergence(teacher, *likeliest(teacher, top))) == pytest.approx(0, abs=ROWS * 2**-8)


def test_certain_teacher_and_student_far_apart_stay_finite() -> None:
    teacher, student = torch.full((3, CLASSES), -200.0), torch.full((3, CLASSES), -200.0)
    teacher[:, 0], student[:, 1] = 200.0, 200.0
    student.requires_grad_()
    value = summed_divergence(student, *likeliest(teacher, 4))
    value.backward()
    assert value.item() == pytest.approx(3 * 400, rel=1e-3)
    assert torch.isfinite(student.grad).all()


def test_gradient_has_the_dtype_of_the_logits() -> None:
    student = drawn(1).bfloat16().requires_grad_()
    summed_divergence(student, *likeliest(drawn(0), 7)).backward()
    assert student.grad.dtype == torch.bfloat16
