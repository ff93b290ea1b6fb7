# SPDX-License-Identifier: Apache-2.0
"""Refinement block by block: match the dense block's output from the pruned prefix's input (AA-SVD's last step)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from eigenprune.recover.blocks import BlockPair
from eigenprune.recover.training import Course, train_


def refine_block_(
    pair: BlockPair,
    dense_inputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    parameters: dict[str, nn.Parameter],
    course: Course,
) -> tuple[float, ...]:
    """Train the `parameters` of the pruned block towards the outputs of the dense one; returns the loss of each step.

    The loss of a token is the squared error of its hidden state over the squared length of the dense one, since each
    norm that reads it divides by that length; else the few tokens with enormous states would be all that counts.

    Memory: the outputs of the dense block for all windows; gradients and moments of one block.
    """
    wanted = [pair.run(pair.dense, hidden).detach() for hidden in dense_inputs]
    # A part of the time for every block cannot be known beforehand, so the number of passes is the only bound here.
    with torch.enable_grad():
        done = train_(parameters, partial(_loss, pair, inputs, wanted), range(len(inputs)), course, progress=False)
    return done.losses


def _loss(pair: BlockPair, inputs: Sequence[Tensor], wanted: Sequence[Tensor], index: int) -> Tensor:
    error = (pair.run(pair.pruned, inputs[index]).float() - wanted[index].float()).square().sum(-1)
    length = wanted[index].float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (error / length).mean()
