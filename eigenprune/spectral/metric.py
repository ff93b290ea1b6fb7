# SPDX-License-Identifier: Apache-2.0
"""Metrics: the square roots of statistics in which a truncation is measured.

A truncation minimises `|| R (W - W') S ||_F` with `R^T R = F` on the output side and `S S^T = C` on the input side.
Any root gives the same optimum, so a side is held as a lower Cholesky factor where there is one, as a root by `eigh`
where the statistic is rank-deficient, as a vector where it is diagonal, or not at all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eigenprune.calibrate import Statistics
from eigenprune.errors import ConfigError
from eigenprune.spectral.methods import Method

ASVD_ALPHA = 0.5  # arXiv 2312.05821
# Shrinkage of 0.03 and 0.1 at 64 windows of 1024 tokens, of which the output side counts three quarters: the best of
# the amounts tried on SmolLM2-135M-Instruct, and no worse at a keep of 0.8 with twice the second.
INPUT_REFERENCE = 2000
OUTPUT_REFERENCE = 5500
EIGENVALUE_FLOOR = 1e-10  # relative to the largest; float32 sums resolve no less


@dataclass(frozen=True)
class Root:
    """A square root `matrix` [n, n] of a statistic, `matrix @ matrix.T`, or `scale` [n] for a diagonal one; float64.

    `lower` says that the matrix is lower triangular. With neither, the root is the identity.
    """

    matrix: Tensor | None = None
    scale: Tensor | None = None
    lower: bool = False

    @property
    def size(self) -> int | None:
        """n; None for the identity, which fits all."""
        given = self.scale if self.matrix is None else self.matrix
        return None if given is None else len(given)

    def right_multiply(self, weight: Tensor) -> Tensor:
        """weight [m, n] @ root."""
        if self.matrix is not None:
            return torch.mm(weight, self.matrix)
        return weight if self.scale is None else torch.mul(weight, self.scale)

    def transposed_multiply(self, weight: Tensor) -> Tensor:
        """root.T @ weight [n, m]."""
        if self.matrix is not None:
            return torch.mm(self.matrix.t(), weight)
        return weight if self.scale is None else torch.mul(weight, self.scale.unsqueeze(1))

    def transposed_solve(self, vectors: Tensor) -> Tensor:
        """The inverse of root.T @ vectors [n, r]."""
        solved: Tensor = vectors
        if self.matrix is not None and self.lower:
            solved = torch.linalg.solve_triangular(self.matrix.t(), vectors, upper=True)
        elif self.matrix is not None:
            solved = torch.linalg.solve(self.matrix.t(), vectors)
        elif self.scale is not None:
            solved = vectors / self.scale.unsqueeze(1)
        return solved

    def gram_solve(self, vectors: Tensor) -> Tensor:
        """The inverse of root @ root.T, the statistic itself, @ vectors [n, r]."""
        solved: Tensor = vectors
        if self.matrix is not None and self.lower:
            solved = torch.cholesky_solve(vectors, self.matrix)
        elif self.matrix is not None:
            solved = torch.linalg.solve(self.matrix.t(), torch.linalg.solve(self.matrix, vectors))
        elif self.scale is not None:
            solved = vectors / self.scale.square().unsqueeze(1)
        return solved


def square_root(gram: Tensor) -> Root:
    """A root of the symmetric positive semi-definite `gram` [n, n]; never fails on a finite one, however singular."""
    gram = gram.double()
    factor, info = torch.linalg.cholesky_ex(gram)
    floor = EIGENVALUE_FLOOR**0.5
    if info == 0 and factor.diagonal().min() > floor * factor.diagonal().max():
        return Root(matrix=factor, lower=True)
    values, vectors = torch.linalg.eigh(gram)
    if values[-1] <= 0:  # a dead input or output: every direction counts the same, which is nothing
        return Root(matrix=torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * torch.finfo(torch.float32).tiny)
    return Root(matrix=vectors * values.clamp_min(EIGENVALUE_FLOOR * values[-1]).sqrt())


def shrink(gram: Tensor, amount: float) -> Tensor:
    """(1 - amount) gram + amount mean(diag gram) I: pulls eigenvalues that few tokens cannot resolve to their mean."""
    gram = gram.double()
    result = gram * (1 - amount)
    result.diagonal().add_(amount * gram.diagonal().mean())
    return result


def default_shrinkage(tokens: int, reference: int) -> float:
    """Shrinkage of a Gram measured over `tokens` tokens, in (0, 1]: its sampling error falls with them.

    Args:
        tokens: that entered the Gram.
        reference: the count at which a half would be right, `INPUT_REFERENCE` or `OUTPUT_REFERENCE`.
    """
    return reference / (reference + max(0, tokens))


@dataclass(frozen=True)
class Metric:
    """Both sides of a metric: `output` is R transposed, `inner` is S."""

    output: Root = Root()
    inner: Root = Root()


def layer_metric(
    method: Method, statistics: Statistics | None, layer: str, device: torch.device | str = "cpu"
) -> Metric:
    """The metric of `method` for `layer`, made on `device`: where the weight is, since statistics may lie on disk.

    Raises:
        ConfigError: the method needs statistics, and there are none.
        CalibrationError: the statistics do not hold what it needs.
    """
    if statistics is None:
        if method.statistics:
            raise ConfigError("this method needs calibration statistics: pass texts")
        return Metric()
    return Metric(output_root(method, statistics, layer, device), _input_root(method, statistics, layer, device))


def _input_root(method: Method, statistics: Statistics, layer: str, device: torch.device | str) -> Root:
    if method.input_metric == "none":
        return Root()
    if method.input_metric == "abs-mean":
        mean = statistics.input_abs_mean(layer).to(device).double()
        return Root(scale=mean.clamp_min(1e-6 * mean.max().clamp_min(1e-30)) ** ASVD_ALPHA)
    if method.input_metric == "fisher":  # FWSVD, arXiv 2207.00112: the roots of the columns' Fisher information
        square = statistics.weight_gradient_square(layer).to(device).double()
        return Root(scale=square.clamp_min(1e-12 * square.max().clamp_min(1e-30)).sqrt())
    return square_root(input_gram(method, statistics, layer, device))


def output_root(method: Method, statistics: Statistics, layer: str, device: torch.device | str) -> Root:
    """The output side of `layer_metric`."""
    if method.output_metric == "none":
        return Root()
    return square_root(output_gram(method, statistics, layer, device))


def input_gram(method: Method, statistics: Statistics, layer: str, device: torch.device | str) -> Tensor:
    """C [in, in] float64, shrunk as `method` has it, for an input metric of `gram`."""
    fixed = method.shrink_input
    amount = default_shrinkage(statistics.facts.tokens, INPUT_REFERENCE) if fixed is None else fixed
    return shrink(statistics.input_gram(layer).to(device), amount)


def output_gram(method: Method, statistics: Statistics, layer: str, device: torch.device | str) -> Tensor:
    """F [out, out] float64, shrunk as `method` has it, for an output metric of `gram`."""
    fixed = method.shrink_output
    amount = default_shrinkage(statistics.facts.output_tokens, OUTPUT_REFERENCE) if fixed is None else fixed
    return shrink(statistics.output_gram(layer).to(device), amount)
