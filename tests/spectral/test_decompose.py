# SPDX-License-Identifier: Apache-2.0
"""Truncation in a metric against the closed form: the root of the discarded squared singular values."""

import pytest
import torch
from torch import Tensor

from eigenprune.errors import WeightError
from eigenprune.spectral import Metric, components, spectrum
from eigenprune.spectral.decompose import balance
from eigenprune.spectral.metric import Root, square_root

EPS = torch.finfo(torch.float64).eps
SHAPES = {"wide": (7, 12), "square": (9, 9), "tall": (12, 7), "row": (1, 6), "column": (6, 1), "one": (1, 1)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def factors(weight: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    return components(weight, metric, rank).truncated(rank)


def gram(width: int, tokens: int, seed: int) -> Tensor:
    rows = normal(tokens, width, seed=seed) * torch.logspace(0, -1, width, dtype=torch.float64)
    return rows.t() @ rows / tokens


def symmetric_root(value: Tensor) -> Tensor:
    """By eigh, so that it shares nothing with the Cholesky factors of the package."""
    values, vectors = torch.linalg.eigh(value)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.t()


def metrics(m: int, n: int) -> dict[str, tuple[Metric, Tensor, Tensor]]:
    """Metric, and literal R and S."""
    f, c, few = gram(m, 50, 1), gram(n, 50, 2), gram(n, max(1, n // 2), 3)
    few_f, zero, scale = gram(m, max(1, m // 2), 4), torch.zeros(n, n).double(), torch.linspace(0.2, 3, n).double()
    one_m, one_n = torch.eye(m).double(), torch.eye(n).double()
    return {
        "none": (Metric(), one_m, one_n),
        "diagonal": (Metric(inner=Root(scale=scale)), one_m, torch.diag(scale)),
        "input": (Metric(inner=square_root(c)), one_m, symmetric_root(c)),
        "both": (Metric(square_root(f), square_root(c)), symmetric_root(f), symmetric_root(c)),
        "singular input": (Metric(inner=square_root(few)), one_m, symmetric_root(few)),
        "singular both": (Metric(square_root(few_f), square_root(few)), symmetric_root(few_f), symmetric_root(few)),
        "zero input": (Metric(inner=square_root(zero)), one_m, zero),
    }


@pytest.mark.parametrize("name", metrics(2, 2))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_the_closed_form_optimum_at_every_rank(shape: str, name: str) -> None:
    m, n = SHAPES[shape]
    weight = normal(m, n, seed=5)
    metric, r, s = metrics(m, n)[name]
    product = r @ weight @ s
    sigma = torch.linalg.svdvals(product)
    # eigh of the Gram of `product`: an energy is off by some eps of the largest. The floor of singular roots adds.
    floor = float(torch.linalg.matrix_norm(r, 2) * weight.norm() * torch.linalg.matrix_norm(s, 2)) * 2e-5
    slack = 64 * max(m, n) * EPS**0.5 * float(sigma[0]) + (floor * (m + n) if "singular" in name else 0)
    for rank in range(1, min(m, n) + 1):
        left, right = factors(weight, metric, rank)
        assert left.shape == (m, rank)
        assert right.shape == (rank, n)
        loss = float((r @ (weight - left @ right) @ s).norm())
        optimum = float(sigma[rank:].square().sum().sqrt())
        assert optimum - slack <= loss <= optimum + slack, f"rank {rank}"


@pytest.mark.parametrize("name", metrics(2, 2))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reported_energies_are_the_squared_singular_values(shape: str, name: str) -> None:
    m, n = SHAPES[shape]
    weight = normal(m, n, seed=5)
    metric, r, s = metrics(m, n)[name]
    sigma = torch.linalg.svdvals(r @ weight @ s)
    found = spectrum(weight, metric)
    size = float(torch.linalg.matrix_norm(r, 2) * weight.norm() * torch.linalg.matrix_norm(s, 2)) ** 2
    # In float64 the energies are right to eps of the largest; the floor of a singular root lifts them by 1e-10 of it,
    # and by its root where a cross term meets it.
    slack = (64 * max(m, n) * EPS + (4e-5 if "singular" in name else 0)) * size + 1e-60
    assert found.energies.dtype == torch.float64
    assert float((found.energies - sigma.square()).abs().max()) <= slack
    tail = found.tail()
    assert tail.shape == (min(m, n) + 1,)
    assert float(tail[-1]) == 0
    assert (tail[1:] <= tail[:-1]).all()
    assert float(tail[0]) == pytest.approx(float(found.energies.sum()))


def test_a_singular_input_gram_is_never_inverted() -> None:
    # 3 tokens, 40 features: S^-1 would amplify by 1e5 what rounding leaves; left alone is orthonormal, right a
    # projection of the weight, so neither is larger than the weight.
    weight = normal(20, 40)
    metric = Metric(inner=square_root(gram(40, 3, 1)))
    left, right = factors(weight, metric, 10)
    approximation = left @ right
    assert float(torch.linalg.matrix_norm(approximation, 2)) <= float(torch.linalg.matrix_norm(weight, 2)) * (1 + 1e-9)
    u = torch.linalg.qr(left).Q
    assert float((u @ u.t() @ weight - approximation).norm()) <= 1e3 * EPS * float(weight.norm())


@pytest.mark.parametrize("shape", [(7, 12), (9, 9), (12, 7)])
def test_a_zero_weight_has_zero_energies_and_a_zero_product(shape: tuple[int, int]) -> None:
    m, n = shape
    for metric, _, _ in metrics(m, n).values():
        assert (spectrum(torch.zeros(m, n), metric).energies == 0).all()
        left, right = factors(torch.zeros(m, n), metric, 3)
        assert (left @ right == 0).all()
        assert torch.isfinite(left).all()


@pytest.mark.parametrize("shape", [(7, 12), (9, 9), (12, 7)])
def test_a_weight_of_low_rank_is_exact_at_its_rank_and_above(shape: tuple[int, int]) -> None:
    m, n = shape
    weight = normal(m, 3, seed=1) @ normal(3, n, seed=2)
    for rank in (3, 5, 7):
        left, right = factors(weight, metrics(m, n)["both"][0], rank)
        # The null directions of eigh stand at sqrt(eps) from the true ones.
        assert float((left @ right - weight).norm()) <= 64 * EPS**0.5 * float(weight.norm())


def test_any_root_of_the_same_gram_gives_the_same_truncation() -> None:
    weight, c, f = normal(9, 12), gram(12, 50, 1), gram(9, 50, 2)
    one = factors(weight, Metric(square_root(f), square_root(c)), 4)
    two = factors(weight, Metric(Root(matrix=symmetric_root(f)), Root(matrix=symmetric_root(c))), 4)
    assert float((one[0] @ one[1] - two[0] @ two[1]).norm()) <= 1e5 * EPS * float(weight.norm())


def test_balanced_factors_have_equal_norms_and_the_same_product() -> None:
    left, right = normal(8, 5) * torch.logspace(-9, 9, 5).double(), normal(5, 11)
    right[2] = 0  # a component without energy
    got_left, got_right = balance(left, right)
    wanted = left @ right
    assert float((got_left @ got_right - wanted).norm()) <= 16 * EPS * float(left.norm() * right.norm())
    norms = torch.stack([got_left.norm(dim=0), got_right.norm(dim=1)])
    alive = torch.tensor([True, True, False, True, True])
    assert torch.allclose(norms[0, alive], norms[1, alive], rtol=16 * EPS, atol=0)
    assert torch.equal(got_left[:, 2], left[:, 2])


def test_a_product_that_overflows_is_a_weight_error() -> None:
    huge = torch.full((6, 6), 1e300, dtype=torch.float64)
    with pytest.raises((WeightError, torch.linalg.LinAlgError)):
        factors(huge, Metric(), 2)


def test_float32_and_bfloat16_weights_are_worked_on_in_float64() -> None:
    weight = normal(9, 12).bfloat16()
    short, long = factors(weight, Metric(), 4), factors(weight.double(), Metric(), 4)
    assert short[0].dtype == torch.float64
    assert torch.equal(short[0], long[0])
    assert torch.equal(short[1], long[1])


@pytest.mark.parametrize("shape", [(7, 12), (9, 9), (12, 7)])
def test_all_components_truncate_to_what_the_leading_ones_are(shape: tuple[int, int]) -> None:
    m, n = shape
    metric = metrics(m, n)["both"][0]
    weight = normal(m, n, seed=5)
    every = components(weight, metric)
    assert every.left.shape == (m, min(m, n))
    for rank in (1, 3, min(m, n)):
        one, two = every.truncated(rank), factors(weight, metric, rank)
        # The vectors of eigh are right to eps over the gap of the spectrum.
        assert float((one[0] @ one[1] - two[0] @ two[1]).norm()) <= 1e6 * EPS * float(weight.norm())
