# SPDX-License-Identifier: Apache-2.0
"""truncated_svd: accuracy against LAPACK in float64, on every path."""

from __future__ import annotations

import pytest
import torch

from eigenprune.errors import WeightError
from eigenprune.ops import SvdPath, gram_svd, gram_svd_reference, truncated_svd, truncated_svd_reference
from eigenprune.ops._svd_subspace import _quadrature as quadrature
from tests.ops.helpers import normal
from tests.ops.svd_cases import SHAPES, lapack_ratios, spectra, with_spectrum

EPS = torch.finfo(torch.float32).eps
MOST = 10  # LAPACK itself asks for 35; a healthy solver stays below 2


def values_error(s: torch.Tensor, exact: torch.Tensor) -> float:
    return float((s.double() - exact[: len(s)]).abs().max())


@pytest.mark.parametrize("method", ["exact", "gram", "lapack"])
@pytest.mark.parametrize("kind", spectra(2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exact_paths_score_like_lapack_on_the_zoo(method, kind, dtype):
    for m, n in SHAPES:
        a = with_spectrum(m, n, spectra(min(m, n))[kind]).to(dtype)
        exact = torch.linalg.svdvals(a.double())
        u, s, vh, error, excess, path = truncated_svd(a, method=method)
        assert max(lapack_ratios(a, u, s, vh)) <= MOST, (m, n)
        assert (s[1:] <= s[:-1]).all()
        assert (s >= 0).all()
        assert float(error) == float(excess) == 0
        assert int(path) == (SvdPath.GRAM if dtype == torch.float32 and method != "lapack" else SvdPath.LAPACK)
        if dtype == torch.float32 and method != "lapack":
            # Twice LAPACK's error in the same precision, and two roundings of the largest value.
            plain = values_error(torch.linalg.svd(a, full_matrices=False)[1], exact)
            assert values_error(s, exact) <= 2 * plain + 2 * EPS * float(exact[0]), (m, n)


@pytest.mark.parametrize("kind", spectra(2))
@pytest.mark.parametrize("method", ["auto", "exact", "gram", "rounded", "subspace"])
def test_every_path_truncates_within_the_tolerance_and_reports_its_error(method, kind):
    for m, n in SHAPES:
        a = with_spectrum(m, n, spectra(min(m, n))[kind]).float()
        for rank in {1, min(m, n) // 4, min(m, n) // 2, min(m, n)} - {0}:
            found = truncated_svd(a, rank, method=method)
            best = float(truncated_svd_reference(a, rank).error)
            real = float((a.double() - (found.U.double() * found.S.double()) @ found.Vh.double()).norm())
            rounding = 32 * EPS * float(a.norm()) * max(1, min(m, n)) ** 0.5  # of S, U and Vh, u each
            assert best - rounding <= real <= best * (1.005 + 1e-9) + rounding, (m, n, rank)
            assert abs(float(found.error) - real) <= 1e-3 * real + rounding, (m, n, rank)
            assert float(found.excess) <= 0.005
            assert max(lapack_ratios(a, found.U, found.S, found.Vh)[1:]) <= MOST, (m, n, rank)


@pytest.mark.parametrize(("m", "n", "rank"), [(256, 384, 16), (384, 256, 64), (320, 320, 128)])
@pytest.mark.parametrize("decay", [0.0, 0.25, 0.5, 1.0])
def test_the_estimated_excess_is_within_a_factor_of_the_true_one(m, n, rank, decay):
    # Asked of a first-order estimate: not less than half and not more than 4 times; it may also cry wolf by a tenth of
    # the tolerance, since the gap of a component to the spectrum that its residual meets is bounded from below.
    values = (
        torch.linspace(1, 0.05, min(m, n)).double() if decay == 0 else spectra(min(m, n))["power 1/2"] ** (2 * decay)
    )
    a = with_spectrum(m, n, values).float()
    best = float(truncated_svd_reference(a, rank).error)
    for seed in range(4):
        found = truncated_svd(a, rank, method="subspace", seed=seed)
        assert int(found.path) == SvdPath.SUBSPACE
        real = float((a.double() - (found.U.double() * found.S.double()) @ found.Vh.double()).norm())
        true = real / best - 1
        assert abs(float(found.error) - real) <= 1e-4 * real
        assert -1e-6 <= true <= 0.005
        assert 0.5 * true - 1e-5 <= float(found.excess)
        if decay <= 0.5:  # above, the gap is smaller than its bound, and the estimate has been 40 times the truth
            assert float(found.excess) <= 4 * true + 5e-4


def test_a_tolerance_that_cannot_be_met_is_a_recorded_fallback():
    a = normal(1000, 1000, dtype=torch.float32)  # flat: all blocks together leave about 1e-4
    found = truncated_svd(a, 100, method="subspace", tolerance=1e-6)
    assert int(found.path) == SvdPath.FALLBACK
    assert float(found.excess) == 0
    assert torch.equal(found.S, truncated_svd(a, 100, method="exact").S)
    assert int(truncated_svd(a, 100, tolerance=0).path) == SvdPath.GRAM


def test_only_the_matrices_that_miss_fall_back():
    # One is of rank 8, which the subspace finds to rounding; a flat spectrum leaves an excess.
    low_rank = with_spectrum(1000, 1000, torch.cat([torch.ones(8), torch.zeros(992)]).double())
    batch = torch.stack([low_rank, normal(1000, 1000)]).float()
    found = truncated_svd(batch, 100, method="subspace", tolerance=1e-6)
    assert found.path.tolist()[1] == SvdPath.FALLBACK
    assert found.path.tolist()[0] == SvdPath.SUBSPACE


@pytest.mark.parametrize("power", [-140, -60, 0, 60, 120])
@pytest.mark.parametrize("method", ["gram", "lapack", "rounded", "subspace"])
def test_powers_of_two_scale_the_values_and_nothing_else(method, power):
    a = with_spectrum(70, 90, spectra(70)["geometric to 1e-3"]).float()
    scaled = (a.double() * 2.0**power).float()
    plain, found = truncated_svd(a, 10, method=method), truncated_svd(scaled, 10, method=method)
    # Below 2^-126 the input itself loses bits: its entries, of order 0.01, keep 2^-149 / (2^power 0.01).
    lost = max(4 * EPS, 70 * 2.0**-149 / (2.0**power * float(a.abs().max())))
    assert float((found.S.double() / 2.0**power - plain.S.double()).abs().max()) <= 8 * lost * float(plain.S[0])
    assert int(found.path) == int(plain.path)
    assert max(lapack_ratios(scaled.double() / 2.0**power, found.U, plain.S, found.Vh)[1:]) <= MOST


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    a = normal(3, 20, 30, dtype=dtype)
    found, same = truncated_svd(a, 5), truncated_svd(a.float(), 5)
    assert found.S.dtype == found.U.dtype == torch.float32
    assert all(torch.equal(x, y) for x, y in zip(found, same, strict=True))


@pytest.mark.parametrize("shape", [(4, 30, 50), (4, 50, 30), (4, 40, 40)])
@pytest.mark.parametrize("method", ["auto", "rounded", "subspace", "lapack"])
def test_views_give_the_bits_of_their_copy(shape, method):
    b, m, n = shape
    views = (
        normal(b, n, m, dtype=torch.float32).mT,
        normal(b, m, 2 * n, dtype=torch.float32)[:, :, ::2],
        normal(b + 1, m + 1, n, dtype=torch.float32)[1:, 1:],
        normal(1, m, n, dtype=torch.float32).expand(b, m, n),
    )
    for a in views:
        for x, y in zip(
            truncated_svd(a, 7, method=method), truncated_svd(a.contiguous(), 7, method=method), strict=True
        ):
            assert torch.equal(x, y)


@pytest.mark.parametrize("method", ["gram", "lapack", "rounded", "subspace"])
def test_the_largest_entry_of_every_left_vector_is_positive(method):
    for a in (normal(3, 40, 60), normal(3, 60, 40)):
        u, s, vh = truncated_svd(a.float(), 10, method=method)[:3]
        assert (u.gather(1, u.abs().argmax(1, keepdim=True)) > 0).all()
        rest = u.mT @ a.float() @ vh.mT - torch.diag_embed(s)  # U and Vh were flipped together
        assert float(rest.abs().max()) <= 200 * EPS * float(s.max())


def test_zero_and_empty_matrices_are_defined():
    for shape in ((6, 9), (9, 6), (1, 5), (300, 200)):
        for method in ("auto", "rounded", "subspace", "lapack"):
            found = truncated_svd(torch.zeros(shape), max(1, min(shape) // 2), method=method)
            assert (found.S == 0).all()
            assert float(found.error) == float(found.excess) == 0
            assert max(lapack_ratios(torch.zeros(shape), *found[:3])) <= MOST
    for shape, rank in (((0, 4, 5), 2), ((3, 0, 5), 0), ((3, 4, 0), None), ((2, 0, 3, 4), None), ((4, 5), 0)):
        found = truncated_svd(torch.ones(shape), rank)
        kept = min(shape[-2:]) if rank is None else rank
        assert found.U.shape == (*shape[:-1], kept)
        assert found.Vh.shape == (*shape[:-2], kept, shape[-1])
        assert found.error.shape == shape[:-2]
    assert float(truncated_svd(torch.ones(4, 5), 0).error) == pytest.approx(20**0.5)


@pytest.mark.parametrize("ranks", [[1, 3, 0, 5, 2, 5], torch.tensor([1, 3, 0, 5, 2, 5])], ids=["list", "tensor"])
@pytest.mark.parametrize("vectors", [True, False])
def test_every_matrix_has_its_own_rank(ranks, vectors):
    a = normal(2, 3, 5, 8, dtype=torch.float32)
    found, exact = truncated_svd(a, ranks, vectors=vectors), truncated_svd_reference(a, ranks, vectors=vectors)
    assert found.U.shape == exact.U.shape == (2, 3, 5, 5 if vectors else 0)
    for x, y in zip(found[:4], exact[:4], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=64 * EPS * 5)
    assert (found.S.flatten(0, 1)[0, 1:] == 0).all()


def test_singular_values_alone():
    for shape in ((5, 9), (3, 9, 5), (2, 64, 64)):
        a = normal(*shape, dtype=torch.float32)
        found = truncated_svd(a, vectors=False)
        assert found.U.shape[-1] == found.Vh.shape[-2] == 0
        assert float((found.S.double() - torch.linalg.svdvals(a.double())).abs().max()) <= 64 * EPS * float(
            found.S.max()
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_nan_and_infinity_are_refused_by_index(value, dtype):
    for place in ((0, 0, 0), (1, 3, 5), (2, 4, 7)):
        a = normal(3, 5, 8, dtype=dtype)
        a[place] = value
        with pytest.raises(WeightError, match=f"matrix {place[0]} of the batch holds NaN or infinity"):
            truncated_svd(a, 2)
    a[0, 1, 1] = value
    with pytest.raises(WeightError, match="matrix 0 of the batch and 1 more"):
        truncated_svd(a, 2)


@pytest.mark.parametrize("route", ["compiled", "reference"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("right_decides", [True, False])
def test_gram_svd_and_its_reference_are_right(route, double, right_decides):
    function = gram_svd if route == "compiled" else gram_svd_reference
    kinds = ("linear", "power 1/2", "half rank", "two clusters") if double else ("linear", "power 1/2")
    for kind in kinds:
        a = torch.stack([with_spectrum(30, 45, spectra(30)[kind], seed) for seed in range(3)]).float()
        left, values, right, energy = function(a, 12, double, right_decides)
        torch.testing.assert_close(energy, a.double().square().sum((1, 2)), rtol=4 * EPS, atol=0)
        deciding = right if right_decides else left.mT
        assert (deciding.gather(2, deciding.abs().argmax(2, keepdim=True)) > 0).all()
        for i in range(3):
            assert values_error(values[i], torch.linalg.svdvals(a[i].double())) <= (2 if double else 20) * EPS
            assert max(lapack_ratios(a[i], left[i], values[i], right[i])) <= MOST


@pytest.mark.parametrize("kind", ["two clusters", "linear", "equal", "power 1/2"])
@pytest.mark.parametrize("rank", [75, 150, 300])
def test_the_subspace_stays_orthogonal_where_its_blocks_fill_most_of_the_space(kind, rank):
    # The last block nearly depends on those before: one pass left 40 units on the left of the two clusters.
    a = with_spectrum(300, 300, spectra(300)[kind]).float()
    found = truncated_svd(a, rank, method="subspace")
    assert max(lapack_ratios(a, found.U, found.S, found.Vh)[1:]) <= MOST


def test_two_eigenvalues_outside_of_the_kept_ones_are_found_with_their_weights():
    # Two steps of Lanczos on an operator with two eigenvalues are exact: a Gauss quadrature of as many nodes.
    values = torch.cat([torch.tensor([5.0, 4.0]), torch.full((6,), 2.0), torch.full((22,), 1.0)]).double()
    a = with_spectrum(30, 40, values).float().unsqueeze(0)
    left = torch.linalg.svd(a)[0]
    start = (normal(1, 3, 30, dtype=torch.float32) @ left[:, :, 2:]) @ left[:, :, 2:].mT
    share = ((start @ left[:, :, 2:8]).norm() / start.norm()).square()
    nodes, weights = quadrature(a, left[:, :, :2], start)
    assert torch.allclose(nodes, torch.tensor([[1.0, 4.0]]).double(), atol=64 * 25 * EPS)
    assert torch.allclose(weights, torch.stack([1 - share, share]).double(), atol=64 * 25 * EPS)
