# SPDX-License-Identifier: Apache-2.0
"""What the tests of eigenpruning share: passages of unequal lengths, and every token's input and gradient."""

import torch
from torch import Tensor, nn

from eigenprune.calibrate import Passage, passage_losses
from eigenprune.spectral import LayerView, SlicePieces, slice_parts
from tests.helpers.tiny_models import VOCABULARY


def passages(count: int = 6, longest: int = 12, seed: int = 5) -> list[Passage]:
    """Of 4 to `longest` tokens, the last one to three predicted."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n in range(count):
        length = 4 + n % (longest - 3)
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        found.append(Passage(tuple(ids), length - 1 - n % 3))
    return found


def tokens_of(model: nn.Module, module: nn.Module, chosen: list[Passage]) -> list[tuple[Tensor, Tensor]]:
    """For each passage alone, without any padding: the inputs [t, in] and output gradients [t, out] of `module`."""
    found: list[tuple[Tensor, Tensor]] = []
    for passage in chosen:
        kept: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor, kept: list[Tensor] = kept) -> None:
            output.retain_grad()
            kept.extend([args[0].detach(), output])

        handle = module.register_forward_hook(keep)
        passage_losses(model, [passage])[0].sum().backward()
        handle.remove()
        gradient = kept[1].grad
        assert gradient is not None
        found.append((kept[0].flatten(0, -2).double(), gradient.flatten(0, -2).double()))
    model.zero_grad()
    return found


def piece_matrices(weight: Tensor, view: LayerView, pieces: list[SlicePieces]) -> list[list[Tensor]]:
    """Every component of every slice as a whole [out, in] float64 matrix, zero outside its slice."""
    found = []
    for index, rank in enumerate(view.ranks):
        own = []
        for i in range(rank):
            whole = torch.zeros(view.shape, dtype=torch.float64)
            chosen = torch.arange(pieces[index].sigmas.shape[0]) == i
            part = slice_parts(weight.double(), view)[index]
            slice_parts(whole, view)[index].copy_(pieces[index].removed(part, chosen))
            own.append(whole)
        found.append(own)
    return found
