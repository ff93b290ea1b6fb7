# SPDX-License-Identifier: Apache-2.0
"""Truncation on shifted inputs: against the published formula written out, and against what it must beat."""

import pytest
import torch
from torch import Tensor

from eigenprune.spectral import Metric, components, retained_beta, shifted_target
from eigenprune.spectral.metric import Root, square_root

TOKENS, M, N = 200, 12, 16
EPS = torch.finfo(torch.float64).eps


def _case(seed: int = 0, m: int = M, n: int = N, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = draw(tokens, n) @ draw(n, n)
    return draw(m, n), x, x + 0.5 * draw(tokens, n) @ draw(n, n)


def _moments(x: Tensor, shifted: Tensor) -> tuple[Tensor, Tensor]:
    return shifted.t() @ shifted / len(x), x.t() @ shifted / len(x)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("m", [12, 24])
def test_is_the_published_closed_form(beta: float, m: int) -> None:
    weight, x, shifted = _case(m=m)
    gram, cross = _moments(x, shifted)
    amount, rank = 0.04, 5
    target, root = shifted_target(weight, gram, cross, len(x), beta, shrinkage=amount)
    got = components(target, Metric(inner=root), rank)
    # peers.md 3.6, with both moments shrunk: W' = [W (beta D + (1 - beta) C~) L^-T]_r L^-1, C~ = L L^T.
    pull = amount * gram.diagonal().mean() * torch.eye(N, dtype=torch.float64)
    lower = torch.linalg.cholesky((1 - amount) * gram + pull)
    mixed = weight @ ((1 - amount) * (beta * cross + (1 - beta) * gram) + pull)
    u, s, vh = torch.linalg.svd(mixed @ torch.linalg.inv(lower).t(), full_matrices=False)
    wanted = (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(lower)
    gap = float(s[rank - 1] ** 2 - s[rank] ** 2) / float(s[0] ** 2)  # `components` works on squared singular values
    tolerance = 100 * N * EPS * float(torch.linalg.cond(lower)) ** 2 / gap
    assert tolerance < 1e-6
    assert float((got.left @ got.right - wanted).norm() / wanted.norm()) < tolerance


def test_residual_is_regressed_with_the_output() -> None:
    weight, x, shifted = _case(6)
    gram, cross = _moments(x, shifted)
    lost = torch.randn(len(x), M, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + x[:, :M]
    target, _ = shifted_target(weight, gram, cross, len(x), 1.0, residual=lost.t() @ shifted / len(x), shrinkage=0.0)
    wanted = torch.linalg.lstsq(shifted, x @ weight.t() + lost).solution.t()
    tolerance = 100 * N * EPS * float(torch.linalg.cond(gram))
    assert float((target - wanted).norm() / wanted.norm()) < tolerance


def test_two_sided_optimum_is_not_beaten_by_any_nearby_weight_of_its_rank() -> None:
    weight, x, shifted = _case(1)
    gram, cross = _moments(x, shifted)
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(M, M, generator=generator, dtype=torch.float64)
    output = square_root(root @ root.t())
    target, inner = shifted_target(weight, gram, cross, len(x), 1.0, shrinkage=0.0)
    found = components(target, Metric(output, inner), 4)

    def loss(left: Tensor, right: Tensor) -> float:
        missed = x @ weight.t() - shifted @ (left @ right).t()
        return float(output.transposed_multiply(missed.t()).square().mean())

    best = loss(found.left, found.right)
    for step in (1e-3, 1e-2, 1e-1):
        for _ in range(20):
            left = found.left + step * torch.randn(found.left.shape, generator=generator, dtype=torch.float64)
            right = found.right + step * torch.randn(found.right.shape, generator=generator, dtype=torch.float64)
            assert loss(left, right) > best


def test_inputs_that_did_not_shift_leave_the_weight_to_the_last_bit() -> None:
    weight, x, _ = _case(3)
    gram, _ = _moments(x, x)
    target, _ = shifted_target(weight, gram, gram, len(x), 1.0)
    assert torch.equal(target, weight)


@pytest.mark.parametrize("amount", [None, 0.0])
@pytest.mark.parametrize("tokens", [0, 1, 3, N - 1])
def test_fewer_tokens_than_features_never_fail(tokens: int, amount: float | None) -> None:
    weight, x, shifted = _case(4, tokens=TOKENS)
    x[tokens:], shifted[tokens:] = 0, 0
    gram, cross = _moments(x, shifted)
    target, root = shifted_target(weight, gram.float(), cross.float(), tokens, 1.0, shrinkage=amount)
    found = components(target, Metric(inner=root), 4)
    assert torch.isfinite(found.left).all()
    assert torch.isfinite(found.right).all()


@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.3])
@pytest.mark.parametrize("seed", range(6))
def test_retained_beta_keeps_the_largest_part_of_all_betas(seed: int, shrinkage: float | None) -> None:
    weight, x, shifted = _case(seed)
    if seed % 2:  # targets that turn away from the subspace and back
        shifted = x - 0.9 * (shifted - x)
    gram, cross = _moments(x, shifted)
    best = retained_beta(weight, gram, cross, TOKENS, 5, shrinkage)
    subspace, kept = None, {}
    for beta in (0.0, *torch.linspace(0, 1, 201).tolist(), best):
        target, root = shifted_target(weight, gram, cross, TOKENS, beta, shrinkage=shrinkage)
        product = root.right_multiply(target)
        if subspace is None:
            subspace = torch.linalg.svd(product, full_matrices=False)[0][:, :5]
        kept[beta] = float((subspace.t() @ product).square().sum() / product.square().sum())
    assert kept[best] >= max(kept.values()) - 1e3 * EPS


@pytest.mark.parametrize("root", [Root(), Root(scale=torch.arange(1.0, 5.0).double()), "cholesky", "eigh"])
def test_gram_solve_inverts_the_statistic(root: Root | str) -> None:
    generator = torch.Generator().manual_seed(5)
    full = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    gram = full @ full.t()
    if root == "cholesky":
        root = square_root(gram)
    elif root == "eigh":
        values, vectors = torch.linalg.eigh(gram)
        root = Root(matrix=vectors * values.sqrt())
    else:
        gram = torch.eye(4, dtype=torch.float64) if root.scale is None else root.scale.square().diag()
    vectors = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    assert torch.allclose(
        gram @ root.gram_solve(vectors), vectors, rtol=0, atol=1e3 * EPS * float(torch.linalg.cond(gram))
    )
