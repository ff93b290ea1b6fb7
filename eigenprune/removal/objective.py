# SPDX-License-Identifier: Apache-2.0
"""What a search lowers: the loss of the right answers, or by how much they fall short of being given.

A loss goes on falling where the answer is right already; an answer counts from the moment that it stands before all
others. The shortfall is a softened hinge on that lead: it is about MARGIN less the lead where the lead is small or
negative, and goes to 0 beyond MARGIN.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eigenprune.calibrate import UNSCORED, PassageBatch, batch_logits, logit_losses
from eigenprune.errors import ConfigError

OBJECTIVES = ("margin", "loss")
MARGIN = 1.0  # nats of lead that are as good as any
SHARPNESS = 2.0  # of the hinge, and twice that of the largest rival: 1 / SHARPNESS nats is where both are soft

Score = Callable[[nn.Module, PassageBatch], tuple[Tensor, Tensor]]
"""One batch's (objective, loss of the right answer), each with one value for an example; with gradients where on."""


def check_objective(name: str) -> str:
    """`name`, if it is one of OBJECTIVES.

    Raises:
        ConfigError: it is not.
    """
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r} is unknown; there are: {', '.join(OBJECTIVES)}")
    return name


def loss_score(model: nn.Module, batch: PassageBatch) -> tuple[Tensor, Tensor]:
    """The loss is the objective: [n] nats, summed over the predicted tokens."""
    losses = logit_losses(*batch_logits(model, batch))
    return losses, losses


def answer_score(model: nn.Module, batch: PassageBatch) -> tuple[Tensor, Tensor]:
    """Free answers: a token's lead is that over all of the vocabulary; shortfalls are summed over the answer."""
    logits, wanted = batch_logits(model, batch)
    logits, place = logits.float(), wanted.clamp_min(0).unsqueeze(-1)
    own = logits.gather(-1, place).squeeze(-1)
    others = logits.scatter(-1, place, -torch.inf)
    shortfalls = hinge(own - _soft_max(others)).masked_fill(wanted == UNSCORED, 0.0)
    return shortfalls.sum(1), logit_losses(logits, wanted)


def choice_score(counts: Sequence[int], right: Sequence[int]) -> Score:
    """Answers to choose from: the right one's lead in log-likelihood over the others.

    Args:
        counts: how many choices each example has, at least two; the passages of a batch are all choices in order.
        right: which of them is right.
    """

    def score(model: nn.Module, batch: PassageBatch) -> tuple[Tensor, Tensor]:
        losses = logit_losses(*batch_logits(model, batch))
        groups = list(zip(losses.split(list(counts)), right, strict=True))
        own = torch.stack([group[at] for group, at in groups])
        best = torch.stack([_soft_max(-torch.cat([group[:at], group[at + 1 :]])) for group, at in groups])
        return hinge(-own - best), own

    return score


def hinge(lead: Tensor) -> Tensor:
    """max(0, MARGIN - lead), softened: never below it, and at most log(2) / SHARPNESS above."""
    return F.softplus(SHARPNESS * (MARGIN - lead)) / SHARPNESS


def _soft_max(values: Tensor) -> Tensor:
    """About the largest of the last dimension, and never below: so several close rivals count as more than one."""
    return torch.logsumexp(2 * SHARPNESS * values, -1) / (2 * SHARPNESS)
