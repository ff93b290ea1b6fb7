# SPDX-License-Identifier: Apache-2.0
"""An objective whose gradients have the curvature of a KL divergence as their second moment."""

import torch
from torch import Tensor, nn

from eigenprune.calibrate.objective import Objective, model_inputs
from eigenprune.errors import CalibrationError

TOP_TOKENS = 5  # IO-SVD, arXiv 2605.15626, uses about as many
TOP_TOKENS_KL = "top-tokens-kl"


def named_objective(name: str) -> Objective:
    """The objective of that name, beside the model's own loss.

    Raises:
        CalibrationError: there is none of this name.
    """
    if name != TOP_TOKENS_KL:
        raise CalibrationError(
            f"objective {name!r} is unknown; there are: {TOP_TOKENS_KL}, or None for the model's own"
        )
    return top_tokens_kl


def top_tokens_kl(model: nn.Module, ids: Tensor, generator: torch.Generator) -> Tensor:
    """A random draw whose gradients g satisfy E[g g^T] = J^T H J; ids [batch, window].

    H = diag(p) - p p^T is the second-order expansion of the KL divergence from the model over the TOP_TOKENS likeliest
    next tokens of every position, p their probabilities scaled to sum 1; J the derivative of their logits. With H = B
    B^T, B_k = sqrt(p_k) (e_k - p), and independent random signs s for every position and k, the sum of s B_k^T z has
    that second moment: one backward pass stands for the whole of J.

    Raises:
        CalibrationError: the model has no head.
    """
    logits: Tensor | None = getattr(model(**model_inputs(model, ids)), "logits", None)
    if logits is None:
        raise CalibrationError(
            f"{type(model).__name__} has no head, so no likeliest tokens: load it with its head, or take a method "
            "that looks at the hidden state, such as 'kfac'"
        )
    top = logits.topk(min(TOP_TOKENS, logits.shape[-1]), dim=-1)
    values = top.values.float()
    p = values.detach().softmax(-1)
    signs = torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1
    weights = signs * p.sqrt()
    weights = weights - p * weights.sum(-1, keepdim=True)  # sum_k s_k sqrt(p_k) (e_k - p)
    drawn: Tensor = (weights * values).sum()
    return drawn
