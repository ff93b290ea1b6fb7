# SPDX-License-Identifier: Apache-2.0
"""The weight that does best on the inputs which a pruned prefix gives, and the metric of those inputs."""

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
