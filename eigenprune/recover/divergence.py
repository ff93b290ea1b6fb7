# SPDX-License-Identifier: Apache-2.0
"""How far a prediction is from a teacher's: the divergence over the teacher's likeliest classes and one for the rest.

Keeping a teacher's whole prediction takes a number for every class of every token: 49152 x 2 bytes a token for a small
language model. Its `top` likeliest classes take 6 bytes each, and the probability of all others follows from them.
"""

from typing import Any

import torch
from torch import Tensor

from eigenprune.calibrate.objective import float_rows

# Below this a float32 sum of probabilities, each rounded, no longer tells the rest from nothing.
SMALLEST_REST = 1e-6


def summed_divergence(logits: Tensor, log_probabilities: Tensor, classes: Tensor) -> Tensor:
    """Sum over rows of KL(teacher || student) where the classes beyond the teacher's likeliest ones count as one.

    KL over a coarser set of events is at most the whole KL, and is equal where `classes` are all there are; like it, it
    is zero exactly where the student gives each of the named classes, and so the rest together, the same probability.

    Args:
        logits: [rows, vocabulary] of the student, any floating dtype; worked on in float32, some rows at a time.
        log_probabilities: [rows, top] of the teacher, natural logarithms, any floating dtype.
        classes: [rows, top] integers, which classes those are; distinct in each row.

    Returns:
        A float32 scalar, in nats. Its gradient has the dtype of the logits.
    """
    divergence: Tensor = _SummedDivergence.apply(logits, log_probabilities, classes)  # type: ignore[no-untyped-call]
    return divergence


def likeliest(logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The `top` likeliest classes of each row of `logits` [rows, vocabulary], as `summed_divergence` reads them.

    Returns:
        (log probabilities [rows, top] float16, classes [rows, top] int32).
    """
    top = min(top, logits.shape[1])
    values = torch.empty(len(logits), top, dtype=torch.float16, device=logits.device)
    classes = torch.empty(len(logits), top, dtype=torch.int32, device=logits.device)
    for part, rows in float_rows(logits):
        found = rows.log_softmax(-1).topk(top, sorted=False)
        values[part] = found.values.clamp_min(torch.finfo(torch.float16).min)
        classes[part] = found.indices
    return values, classes


class _SummedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_probabilities: Tensor, classes: Tensor) -> Tensor:
        normalisers = torch.cat([rows.logsumexp(-1) for _, rows in float_rows(logits)])
        whole = classes.shape[1] == logits.shape[1]
        log_p = log_probabilities.float()
        log_p = log_p.log_softmax(-1) if whole else log_p  # rounded ones do not sum to 1
        log_q = logits.gather(1, classes.long()).float() - normalisers.unsqueeze(1)
        p = log_p.exp()
        p_rest, q_rest = (1 - probabilities.sum(1) for probabilities in (p, log_q.exp()))
        p_rest = torch.zeros_like(p_rest) if whole else p_rest.clamp_min(0)
        q_rest = torch.ones_like(q_rest) if whole else q_rest.clamp_min(SMALLEST_REST)
        ctx.save_for_backward(logits, p, classes, normalisers, p_rest / q_rest)
        # xlogy: a rest of probability 0 adds nothing.
        rest = torch.xlogy(p_rest, p_rest) - torch.xlogy(p_rest, q_rest)
        return ((p * (log_p - log_q)).sum(1) + rest).sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        logits, p, classes, normalisers, ratio = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for part, rows in float_rows(logits):
            named = classes[part].long()
            # d/dz_j: q_j - p_j for a named class, and q_j (1 - p_rest / q_rest) for one of the rest.
            rows.sub_(normalisers[part].unsqueeze(1)).exp_()
            moved = rows.gather(1, named) - p[part]
            rows.mul_(1 - ratio[part].unsqueeze(1)).scatter_(1, named, moved)
            gradient[part] = rows.mul_(outer[0])
        return gradient, None, None
