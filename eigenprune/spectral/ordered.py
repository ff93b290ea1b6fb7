# SPDX-License-Identifier: Apache-2.0
"""The components of a layer in the order in which a method keeps them."""

import hashlib

import torch
from torch import Tensor

from eigenprune.spectral.decompose import Components, Spectrum, components, spectrum
from eigenprune.spectral.methods import Method
from eigenprune.spectral.metric import Metric


def ordered_spectrum(method: Method, weight: Tensor, metric: Metric, name: str, seed: int) -> Spectrum:
    """The energies of the components of `weight` [m, n], in the order of `ordered_components`."""
    found = spectrum(weight, metric)
    if method.worth == "random":
        return Spectrum(found.energies[_random_order(len(found.energies), name, seed)])
    return found


def ordered_components(method: Method, weight: Tensor, metric: Metric, rank: int, name: str, seed: int) -> Components:
    """The first `rank` components of `weight` [m, n]: by falling energy, or at random, the same for name and seed."""
    if method.worth != "random":
        return components(weight, metric, rank)
    found = components(weight, metric)
    kept = _random_order(found.right.shape[0], name, seed)[:rank].to(weight.device)
    return Components(found.left[:, kept], found.right[kept])


def first_order_changes(weight: Tensor, gradient: Tensor, found: Components) -> Tensor:
    """First-order change of the loss, in nats per token, when each component goes, [k] float64 on the CPU.

    -<dL/dW, W_i> = -left_i^T G right_i: the -sigma_i g_i of ZS-SVD (arXiv 2602.02848), with no root inverted.

    Args:
        weight: [m, n], for its device.
        gradient: G = dL/dW, [m, n], mean over tokens.
        found: components of the weight.
    """
    gradient = gradient.to(weight.device, torch.float64)
    return -(found.left * (gradient @ found.right.t())).sum(0).cpu()


def _random_order(count: int, name: str, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.randperm(count, generator=torch.Generator().manual_seed(int.from_bytes(digest[:6], "big")))
