# SPDX-License-Identifier: Apache-2.0
"""Square roots of statistics, their shrinkage, and the metric of each method."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eigenprune.calibrate.statistics import Facts, Statistics
from eigenprune.errors import ConfigError, WeightError
from eigenprune.spectral import METHODS, find_method, layer_metric
from eigenprune.spectral.metric import (
    EIGENVALUE_FLOOR,
    INPUT_REFERENCE,
    OUTPUT_REFERENCE,
    Root,
    default_shrinkage,
    shrink,
    square_root,
)

EPS = torch.finfo(torch.float64).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(width: int, tokens: int, seed: int = 0) -> Tensor:
    rows = normal(tokens, width, seed=seed) * torch.logspace(0, -2, width, dtype=torch.float64)
    return rows.t() @ rows / tokens


def statistics(width: int = 12, height: int = 9, tokens: int = 300) -> Statistics:
    rows = normal(tokens, width, seed=1).float()
    packed = {
        "input_gram.x/0": (rows.t() @ rows / tokens),
        "input_abs_mean.x": rows.abs().mean(0),
        "output_gram.x/0": gram(height, tokens, 2).float(),
    }
    facts = Facts(tokens, tokens // 4, 1, tokens, "next-token", "float32", "")
    return Statistics(packed, {"x": "x"}, facts)


GRAMS = {
    "regular": (gram(20, 300), 0.0),
    "one by one": (torch.tensor([[4.0]]).double(), 0.0),
    "diagonal": (torch.diag(torch.tensor([3.0, 1e-3, 7.0]).double()), 0.0),
    "not contiguous": (gram(40, 300)[::2, ::2], 0.0),
    "float32": (gram(20, 300).float(), 0.0),
    "fewer tokens than features": (gram(20, 7), EIGENVALUE_FLOOR),
    "rank one": (gram(20, 1), EIGENVALUE_FLOOR),
    "one dead feature": (torch.diag(torch.tensor([3.0, 0.0, 7.0]).double()), EIGENVALUE_FLOOR),
    "zero": (torch.zeros(5, 5).double(), 0.0),
    "zero, one by one": (torch.zeros(1, 1).double(), 0.0),
    "rounded below zero": (torch.diag(torch.tensor([1.0, -1e-9, 0.5]).double()), 1e-9),
}


@pytest.mark.parametrize("name", GRAMS)
def test_root_times_its_transpose_is_the_gram(name: str) -> None:
    value, floor = GRAMS[name]
    root = square_root(value)
    wanted = value.double()
    got = root.matrix @ root.matrix.t()
    size = float(torch.linalg.matrix_norm(wanted, 2))
    # Backward error of a factorisation of n columns, and the floor that lifts each eigenvalue below it.
    bound = 4 * len(value) * EPS * size + 2 * floor * size * len(value) ** 0.5 + torch.finfo(torch.float32).tiny
    assert float((got - wanted).norm()) <= bound
    assert torch.isfinite(root.matrix).all()


@pytest.mark.parametrize("name", GRAMS)
def test_solving_undoes_multiplying_for_every_gram(name: str) -> None:
    value, _ = GRAMS[name]
    root = square_root(value)
    vectors = normal(len(value), 3, seed=3)
    back = root.transposed_solve(root.transposed_multiply(vectors))
    condition = float(torch.linalg.cond(root.matrix))
    assert condition <= 1.01 * EIGENVALUE_FLOOR**-0.5 * max(1, len(value))  # what the floor is for
    assert float((back - vectors).norm()) <= 8 * len(value) * EPS * condition * float(vectors.norm())


@pytest.mark.parametrize("root", [Root(), Root(scale=torch.tensor([2.0, 0.5, 3.0]).double()), square_root(gram(3, 30))])
def test_the_operations_are_those_of_the_full_matrix(root: Root) -> None:
    full = root.matrix if root.matrix is not None else torch.eye(3).double()
    if root.scale is not None:
        full = torch.diag(root.scale)
    weight = normal(4, 3)
    for got, wanted in [
        (root.right_multiply(weight), weight @ full),
        (root.transposed_multiply(weight.t()), full.t() @ weight.t()),
        (root.transposed_solve(weight.t()), torch.linalg.inv(full.t()) @ weight.t()),
    ]:
        assert float((got - wanted).norm()) <= 32 * EPS * float(torch.linalg.cond(full)) * float(wanted.norm())


@pytest.mark.parametrize("amount", [0.0, 0.03, 0.5, 1.0])
def test_shrinking_keeps_the_trace_and_pulls_eigenvalues_to_their_mean(amount: float) -> None:
    value = gram(10, 30)
    got = shrink(value, amount)
    mean = value.trace() / 10
    wanted = torch.linalg.eigvalsh(value) * (1 - amount) + amount * mean
    assert float((torch.linalg.eigvalsh(got) - wanted).abs().max()) <= 64 * EPS * float(value.trace())
    assert float(got.trace()) == pytest.approx(float(value.trace()), rel=64 * EPS)
    assert amount == 0 or not torch.equal(got, value)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(tokens=st.integers(0, 10**9), more=st.integers(1, 10**9), reference=st.integers(1, 20_000))
def test_default_shrinkage_is_a_fraction_that_falls_with_tokens(tokens: int, more: int, reference: int) -> None:
    amount = default_shrinkage(tokens, reference)
    assert 0 < amount <= 1
    assert default_shrinkage(tokens + more, reference) < amount
    assert default_shrinkage(reference, reference) == 0.5


def test_kfac_holds_roots_of_both_shrunk_grams() -> None:
    found, measured = layer_metric(find_method("kfac"), statistics(), "x"), statistics()
    for root, value, tokens, reference in [
        (found.inner, measured.input_gram("x"), measured.facts.tokens, INPUT_REFERENCE),
        (found.output, measured.output_gram("x"), measured.facts.output_tokens, OUTPUT_REFERENCE),
    ]:
        amount = default_shrinkage(tokens, reference)
        mean = value.double().trace() / len(value) * torch.eye(len(value), dtype=torch.float64)
        wanted = value.double() * (1 - amount) + amount * mean
        assert float((root.matrix @ root.matrix.t() - wanted).norm()) <= 64 * EPS * float(wanted.norm())


def test_svd_llm_is_the_root_of_the_raw_input_gram_alone() -> None:
    found, value = layer_metric(find_method("svd-llm"), statistics(), "x"), statistics().input_gram("x").double()
    assert found.output == Root()
    assert float((found.inner.matrix @ found.inner.matrix.t() - value).norm()) <= 64 * EPS * float(value.norm())


def test_asvd_scales_inputs_by_the_root_of_their_mean_size() -> None:
    found = layer_metric(find_method("asvd"), statistics(), "x")
    assert found.output == Root()
    wanted = statistics().input_abs_mean("x").double().sqrt()
    assert torch.allclose(found.inner.scale, wanted, rtol=4 * EPS, atol=0)


def test_asvd_with_a_dead_input_stays_invertible() -> None:
    measured = statistics()
    measured.tensors["input_abs_mean.x"][3] = 0
    assert (layer_metric(find_method("asvd"), measured, "x").inner.scale > 0).all()
    measured.tensors["input_abs_mean.x"].zero_()
    assert (layer_metric(find_method("asvd"), measured, "x").inner.scale > 0).all()


def test_svd_needs_no_statistics_and_looks_at_none() -> None:
    for measured in (None, statistics()):
        found = layer_metric(find_method("svd"), measured, "x")
        assert found.inner == Root()
        assert found.output == Root()


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.statistics])
def test_a_method_that_looks_at_data_is_refused_without(method: str) -> None:
    with pytest.raises(ConfigError, match="pass texts"):
        layer_metric(find_method(method), None, "x")


def test_statistics_with_nan_are_not_turned_into_a_metric() -> None:
    value = gram(5, 30)
    value[2, 2] = torch.nan
    with pytest.raises((WeightError, torch.linalg.LinAlgError)):
        square_root(value)
