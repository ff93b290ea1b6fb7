# SPDX-License-Identifier: Apache-2.0
"""The table of methods: each row truncates as its paper says, written out here in full."""

import hashlib

import pytest
import torch
from torch import Tensor

from eigenprune.calibrate.statistics import Facts, Statistics
from eigenprune.errors import ConfigError
from eigenprune.spectral import ALLOCATIONS, METHODS, find_method, layer_metric, ordered_components
from eigenprune.spectral.metric import INPUT_REFERENCE, OUTPUT_REFERENCE, default_shrinkage

OUT, IN, TOKENS, WINDOWS, RANK = 14, 10, 200, 5, 4


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]


def symmetric_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ torch.diag(values.sqrt()) @ vectors.t()


@pytest.fixture
def data() -> dict[str, Tensor]:
    x = normal(TOKENS, IN, seed=1) @ normal(IN, IN, seed=2)
    g = normal(TOKENS, OUT, seed=3) @ normal(OUT, OUT, seed=4)
    return {"w": normal(OUT, IN, seed=5), "x": x.float().double(), "g": g.float().double()}


def svd(data: dict[str, Tensor]) -> Tensor:
    return truncated(data["w"], RANK)


def asvd(data: dict[str, Tensor]) -> Tensor:
    """ASVD: W = W S S^-1 with S = diag(mean |x|)^alpha, alpha = 0.5; truncate W S."""
    scale = torch.diag(data["x"].abs().mean(0) ** 0.5)
    return truncated(data["w"] @ scale, RANK) @ torch.linalg.inv(scale)


def svd_llm(data: dict[str, Tensor]) -> Tensor:
    """SVD-LLM: S the Cholesky factor of X X^T; truncate W S, multiply by S^-1."""
    whitener = torch.linalg.cholesky(data["x"].t() @ data["x"])
    return truncated(data["w"] @ whitener, RANK) @ torch.linalg.inv(whitener)


def kfac(data: dict[str, Tensor]) -> Tensor:
    """KFAC-SVD: F^1/2 W C^1/2 with shrunk second moments, symmetric roots."""
    roots = []
    for rows, reference in ((data["g"], OUTPUT_REFERENCE), (data["x"], INPUT_REFERENCE)):
        gram = rows.t() @ rows / TOKENS
        amount = default_shrinkage(TOKENS, reference)
        mean = gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        roots.append(symmetric_root((1 - amount) * gram + amount * mean))
    left, right = roots
    return torch.linalg.inv(left) @ truncated(left @ data["w"] @ right, RANK) @ torch.linalg.inv(right)


def swift(data: dict[str, Tensor]) -> Tensor:
    """Swift-SVD: the leading eigenvectors of the output covariance, onto which W is projected; no whitening at all."""
    outputs = data["x"] @ data["w"].t()
    _, vectors = torch.linalg.eigh(outputs.t() @ outputs)
    basis = vectors[:, -RANK:]
    return basis @ basis.t() @ data["w"]


def svd_llm_v2(data: dict[str, Tensor]) -> Tensor:
    """SVD-LLM v2: C = U_s S_s U_s^T by SVD; D = W U_s sqrt(S_s); W' = [D]_r sqrt(S_s)^-1 U_s^T."""
    u, s, _ = torch.linalg.svd(data["x"].t() @ data["x"])
    return truncated(data["w"] @ u @ torch.diag(s.sqrt()), RANK) @ torch.diag(s.rsqrt()) @ u.t()


def fwsvd(data: dict[str, Tensor]) -> Tensor:
    """FWSVD: columns weighed by the root of their Fisher information, (dL/dW)^2 averaged over samples and summed."""
    total = torch.zeros(IN, dtype=torch.float64)
    for window in range(WINDOWS):
        rows = slice(window * TOKENS // WINDOWS, (window + 1) * TOKENS // WINDOWS)
        gradient = sum(torch.outer(g, x) for g, x in zip(data["g"][rows], data["x"][rows], strict=True))
        for row in range(OUT):
            total += gradient[row] ** 2 / WINDOWS
    scale = torch.diag(total.sqrt())
    return truncated(data["w"] @ scale, RANK) @ torch.linalg.inv(scale)


def random(data: dict[str, Tensor]) -> Tensor:
    """Components in the order of `randperm`, of a seed that the name and the seed of the run make."""
    u, s, vh = torch.linalg.svd(data["w"], full_matrices=False)
    seed = int.from_bytes(hashlib.sha256(b"0 x").digest()[:6], "big")
    kept = torch.randperm(min(OUT, IN), generator=torch.Generator().manual_seed(seed))[:RANK]
    return u[:, kept] @ torch.diag(s[kept]) @ vh[kept]


# `zs` truncates as SVD-LLM and `io` as KFAC-SVD, with another F: their choice of ranks is in
# test_published_allocations.py, and the curvature of `io` in tests/calibrate/test_curvature.py. The channels of
# `kfac-channels` are in test_channels.py.
LITERAL = {
    "svd": svd,
    "random": random,
    "asvd": asvd,
    "fwsvd": fwsvd,
    "svd-llm": svd_llm,
    "svd-llm-v2": svd_llm_v2,
    "swift": swift,
    "zs": svd_llm,
    "kfac": kfac,
    "kfac-channels": kfac,
    "io": kfac,
}
SAME = [
    {"svd-llm", "svd-llm-v2", "swift", "zs"},
    {"kfac", "kfac-channels", "io"},
]  # one optimum, written in several ways
# These run the model again; their formulas are written out in test_shifted, test_sequential and test_probe_scale.
IN_STEPS = {"kfac-seq", "kfac-probe", "kfac-probe-seq", "aa-svd", "saes", "dobi-closed"}
# What they are made of is told by the tests of their parts: removal, and the gradients of a LoRA.
ELSEWHERE = {name for name, row in METHODS.items() if row.removal is not None or row.worth == "importance"}


def test_every_method_has_a_literal_twin_here() -> None:
    assert set(LITERAL) | IN_STEPS | ELSEWHERE == set(METHODS)
    assert {name for name, row in METHODS.items() if row.needs_windows} == IN_STEPS


@pytest.mark.parametrize("name", LITERAL)
def test_a_method_truncates_as_its_paper_says(data: dict[str, Tensor], name: str) -> None:
    tensors = {
        "input_gram.x/0": (data["x"].t() @ data["x"] / TOKENS).float(),
        "input_abs_mean.x": data["x"].abs().mean(0).float(),
        "output_gram.x/0": (data["g"].t() @ data["g"] / TOKENS).float(),
        "weight_gradient_square.x": torch.stack(
            [
                (g.t() @ x).square().mean(0)
                for g, x in zip(data["g"].chunk(WINDOWS), data["x"].chunk(WINDOWS), strict=True)
            ]
        )
        .mean(0)
        .float(),
    }
    facts = Facts(TOKENS, TOKENS, 1, TOKENS, "next-token", "float32", "")
    metric = layer_metric(find_method(name), Statistics(tensors, {"x": "x"}, facts), "x")
    left, right = ordered_components(find_method(name), data["w"], metric, RANK, "x", 0).truncated(RANK)
    wanted = LITERAL[name](data)
    # Statistics are held in float32; the truncation turns their error by the condition of both roots and the gap of
    # the spectrum, here at most some thousand together.
    assert float((left @ right - wanted).norm() / wanted.norm()) <= 5e3 * torch.finfo(torch.float32).eps


def test_data_changes_what_is_kept(data: dict[str, Tensor]) -> None:
    results = {name: twin(data) for name, twin in LITERAL.items()}
    for name, value in results.items():
        for other, another in results.items():
            same = name == other or any({name, other} <= group for group in SAME)
            assert (float((value - another).norm() / value.norm()) > 0.02) != same


def test_rows_name_what_they_need_and_an_allocation_that_exists() -> None:
    assert {name: row.statistics for name, row in METHODS.items() if name not in IN_STEPS | ELSEWHERE} == {
        "kfac": ("input_gram", "output_gram"),
        "kfac-channels": ("input_gram", "output_gram"),
        "io": ("input_gram", "output_gram"),
        "zs": ("input_gram",),
        "svd-llm": ("input_gram",),
        "svd-llm-v2": ("input_gram",),
        "swift": ("input_gram",),
        "fwsvd": ("weight_gradient_square",),
        "asvd": ("input_gram",),
        "svd": (),
        "random": (),
    }
    for name, row in METHODS.items():
        assert row.allocation in ALLOCATIONS
        assert row.source
        has_unit = row.output_metric == "gram" or row.worth == "importance"
        assert row.allocation != "global" or has_unit, f"{name}: no common unit of loss"


@pytest.mark.parametrize("name", ["", "KFAC", "svdllm", None, ["kfac"]])
def test_an_unknown_method_is_a_config_error_that_lists_them(name: object) -> None:
    with pytest.raises(ConfigError, match=r"is unknown; there are: kfac, .*svd-llm, .*asvd, svd, random"):
        find_method(name)
