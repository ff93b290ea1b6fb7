# SPDX-License-Identifier: Apache-2.0
"""The components of a layer in the order in which a method keeps them."""

import hashlib

import torch
from torch import Tensor

from eigenprune.calibrate import Statistics
from eigenprune.errors import ConfigError
from eigenprune.spectral.decompose import Components, Spectrum, components, spectrum
from eigenprune.spectral.methods import Method
from eigenprune.spectral.metric import Metric


def ordered_spectrum(
    method: Method, weight: Tensor, metric: Metric, name: str, seed: int, statistics: Statistics | None = None
) -> Spectrum:
    """The energies of the components of `weight` [m, n], in the order of `ordered_components`.

    With worth `importance` they are twice the importances, so that half of them, the loss, is the importance again.
    """
    if method.worth == "importance":
        importance = _importance(statistics, name, min(weight.shape))
        return Spectrum(2 * importance[_falling(importance)])
    found = spectrum(weight, metric)
    if method.worth == "random":
        return Spectrum(found.energies[_random_order(len(found.energies), name, seed)])
    return found


def ordered_components(
    method: Method,
    weight: Tensor,
    metric: Metric,
    rank: int,
    name: str,
    seed: int,
    statistics: Statistics | None = None,
) -> Components:
    """The first `rank` components of `weight` [m, n]: by falling energy or importance, or at random, the same for name
    and seed."""
    if method.worth == "energy":
        return components(weight, metric, rank)
    found = components(weight, metric)
    if method.worth == "importance":
        order = _falling(_importance(statistics, name, min(weight.shape)))
    else:
        order = _random_order(found.right.shape[0], name, seed)
    kept = order[:rank].to(weight.device)
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


def _importance(statistics: Statistics | None, name: str, count: int) -> Tensor:
    """[count] float64 on the CPU, of the components in their order by energy."""
    if statistics is None:
        raise ConfigError("this method needs the importance of components: pass the statistics that hold it")
    importance = statistics.component_importance(name).double().cpu()
    if importance.shape != (count,):
        raise ConfigError(
            f"{name} has {count} components, and the statistics hold importances {tuple(importance.shape)}: "
            "collect them on this model"
        )
    return importance


def _falling(importance: Tensor) -> Tensor:
    return importance.argsort(descending=True, stable=True)


def _random_order(count: int, name: str, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.randperm(count, generator=torch.Generator().manual_seed(int.from_bytes(digest[:6], "big")))
