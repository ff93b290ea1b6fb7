# SPDX-License-Identifier: Apache-2.0
"""The weight that does best on the inputs which a pruned prefix gives, and the metric of those inputs."""

import math

import torch
from torch import Tensor

from eigenprune.spectral.metric import INPUT_REFERENCE, Root, default_shrinkage, shrink, square_root


def shifted_target(
    weight: Tensor,
    gram: Tensor,
    cross: Tensor,
    tokens: int,
    beta: float,
    *,
    residual: Tensor | None = None,
    shrinkage: float | None = None,
) -> tuple[Tensor, Root]:
    """Turn a truncation on shifted inputs into a plain one: `components` of the returned weight in the returned metric.

    Asked for is the W' of rank r that minimises mean |R (y - W' x~)|^2, where x~ is the input after the prefix is
    pruned and y = W (beta x + (1 - beta) x~): beta = 1 wants the dense model's outputs back (AA-SVD, arXiv
    2604.02119), beta = 0 the layer's own map on its new inputs (the closed form of Dobi-SVD, arXiv 2502.02723). Let
    C~ = mean x~ x~^T, D = mean x x~^T, and M = W (beta D + (1 - beta) C~) C~^-1 the regression of y on x~: the loss is
    |R (M - W') C~^(1/2)|^2 and a constant. Both moments are shrunk towards uncorrelated inputs that did not shift, D
    and C~ to mean(diag C~) I, which pulls M to W where few tokens say otherwise.

    With a `residual` E = mean d x~^T, y has d added: what the residual stream, to which the output goes, has lost by
    then is asked of this layer too, as far as its inputs tell it (E is added to W times its moments).

    Args:
        weight: W [m, n].
        gram: C~ [n, n]. cross: D [n, n]. tokens: how many entered them.
        beta: in [0, 1].
        residual: E [m, n], or None.
        shrinkage: in [0, 1]; None follows the token count.

    Returns:
        M [m, n] float64, and a root of the shrunk C~.
    """
    weight, gram = weight.double(), gram.double()
    amount = default_shrinkage(tokens, INPUT_REFERENCE) if shrinkage is None else shrinkage
    root = square_root(shrink(gram, amount))
    scale = gram.diagonal().mean()
    if not scale > 0:  # an input that is always zero teaches nothing
        return weight, root
    shift = cross.double() - gram
    # M - W = (1 - a) (beta W (D - C~) + E) C_shrunk^-1: only shifts are regressed; none leaves W to the last bit.
    moved = weight @ shift * beta
    if residual is not None:
        moved = moved + residual.double()
    return weight + (1 - amount) * root.gram_solve(moved.t()).t(), root


def retained_beta(
    weight: Tensor, gram: Tensor, cross: Tensor, tokens: int, rank: int, shrinkage: float | None = None
) -> float:
    """The beta of `shifted_target`, in [0, 1], at which the fixed subspace keeps the largest part of the target.

    With A(beta) = M C~^(1/2) = A0 + beta A1 and U the `rank` leading left singular vectors of A0, this maximises
    |U^T A(beta)|^2 / |A(beta)|^2, a ratio of two quadratics (SAES-SVD, arXiv 2602.03051, as others describe it).
    """
    weight, gram = weight.double(), gram.double()
    amount = default_shrinkage(tokens, INPUT_REFERENCE) if shrinkage is None else shrinkage
    root = square_root(shrink(gram, amount))
    start = root.right_multiply(weight)
    moved = (1 - amount) * weight @ (cross.double() - gram)
    step = root.transposed_multiply(root.gram_solve(moved.t())).t()
    _, vectors = torch.linalg.eigh(start @ start.t())
    inside = vectors[:, -rank:].t()
    parts = [_quadratic(inside @ start, inside @ step), _quadratic(start, step)]
    (a, b, c), (d, e, f) = parts
    candidates = [0.0, 1.0, *_roots(b * d - a * e, c * d - a * f, c * e - b * f)]

    def kept(beta: float) -> float:
        whole = d + 2 * e * beta + f * beta**2
        return (a + 2 * b * beta + c * beta**2) / whole if whole > 0 else 0.0

    return max((beta for beta in candidates if 0 <= beta <= 1), key=kept)


def _quadratic(start: Tensor, step: Tensor) -> tuple[float, float, float]:
    """|start + t step|^2 = p + 2 q t + r t^2."""
    return float(start.square().sum()), float((start * step).sum()), float(step.square().sum())


def _roots(constant: float, linear: float, square: float) -> list[float]:
    """Real roots of a polynomial of degree at most 2."""
    if square == 0:
        return [] if linear == 0 else [-constant / linear]
    under = linear**2 - 4 * square * constant
    if under < 0:
        return []
    far = -(linear + math.copysign(math.sqrt(under), linear)) / 2  # the one without cancellation
    return [far / square] + ([] if far == 0 else [constant / far])
