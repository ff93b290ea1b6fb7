# SPDX-License-Identifier: Apache-2.0
"""The leading singular components of a batch of matrices, with the error that truncation leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eigenprune.errors import WeightError
from eigenprune.ops._library import define_operator
from eigenprune.ops._routes import needs_derivative
from eigenprune.ops._svd_paths import METHODS, SvdPath, choose_path, decompose, largest_entry, squared_error

_OP = "eigenprune::truncated_svd"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class TruncatedSVD(NamedTuple):
    """What `truncated_svd` returns; a = U diag(S) Vh + what is left out.

    Attributes:
        U: [..., m, rank], orthonormal columns.
        S: [..., rank], largest first.
        Vh: [..., rank, n], orthonormal rows.
        error: [...] float64, `||a - U diag(S) Vh||_F`. Of truncation: at full rank it is 0, and the rounding of the
            factors, about u ||a||, is not counted.
        excess: [...] float64, by how much `error` exceeds the smallest possible one, relative to that: 0 on exact
            paths, an estimate on approximate ones, never above the tolerance.
        path: [...] int64, the `SvdPath` that every matrix took.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    error: Tensor
    excess: Tensor
    path: Tensor


def truncated_svd(
    a: Tensor,
    rank: int | Sequence[int] | Tensor | None = None,
    *,
    vectors: bool = True,
    tolerance: float = 0.005,
    seed: int = 0,
    method: str = "auto",
) -> TruncatedSVD:
    """The `rank` leading singular components of every matrix of `a`.

    Args:
        a: [..., m, n], float32 or float64; float16 and bfloat16 are computed in float32. Any strides, any batch
            shape, also an empty one.
        rank: in [0, min(m, n)]; or one for every matrix, in the order of `a.flatten(0, -3)`: the result then has the
            largest of them, and zeros where a matrix has fewer; None for all.
        vectors: False for the singular values alone: U is [..., m, 0] then, and Vh [..., 0, n].
        tolerance: the relative excess of the Frobenius error over the optimum that an approximate path may leave;
            above it the matrix is decomposed again, exactly, and `path` says FALLBACK. 0 forbids approximation.
        seed: of the randomised path, which has a generator of its own.
        method: "auto" takes the measured best; "exact" the best exact path; "gram", "lapack", "rounded" and "subspace"
            force one for float32 ("rounded" and "subspace" still fall back). float64 always goes to LAPACK.

    Returns:
        TruncatedSVD, in float32, or float64 for float64. Signs are fixed: the entry of largest magnitude of every
        column of U is positive, the first such if there are two.

        Same input, seed, number of threads and machine give the same bits. On CPU another number of threads changes
        U, S and Vh by float64 rounding alone where a float32 batch of at least as many matrices as threads takes the
        exact Gram path (GRAM): hardly a bit, though some (BLAS rounds otherwise on one thread than on several).

        The interpreter lock is released while torch works. An interrupt is noticed between two torch calls, of which
        none works on more than a few seconds, or one matrix.

    Raises:
        RuntimeError: `a` is no matrix or of another dtype; a rank out of range; an unknown method; a gradient would be
            needed: there is none.
        WeightError: a matrix holds NaN or infinity; its index is named.
    """
    if needs_derivative(a):
        raise RuntimeError(f"{_OP} has no gradient; pass a.detach(), or use torch.linalg.svd to differentiate")
    ranks = _rank_list(rank)
    return TruncatedSVD(*_operator(a, ranks, vectors, float(tolerance), seed, method))


def truncated_svd_reference(
    a: Tensor, rank: int | Sequence[int] | Tensor | None = None, *, vectors: bool = True, **ignored: Any
) -> TruncatedSVD:
    """The specification and oracle of `truncated_svd`: LAPACK in float64, one matrix after the other. Same arguments.

    Returns:
        float64, whatever the dtype of `a`.
    """
    ranks = _matrix_ranks(a, _rank_list(rank))
    width = max(ranks, default=0)
    m, n = a.shape[-2:]
    wide = a.detach().double().reshape(len(ranks), m, n)
    result = _empty(wide, width)
    for i, own in enumerate(ranks):
        u, s, vh = torch.linalg.svd(wide[i], full_matrices=False)
        for j in range(own):
            sign = -1.0 if u[u[:, j].abs().argmax(), j] < 0 else 1.0
            result[0][i, :, j], result[1][i, j], result[2][i, j] = u[:, j] * sign, s[j], vh[j] * sign
        result[3][i] = s[own:].square().sum().sqrt()
    result[5].fill_(int(SvdPath.LAPACK))
    return TruncatedSVD(*_shaped(result, a, vectors))


def _rank_list(rank: int | Sequence[int] | Tensor | None) -> list[int] | None:
    if rank is None:
        return None
    if isinstance(rank, Tensor):
        rank = rank.flatten().tolist()
    if isinstance(rank, int):
        return [rank]
    return list(rank)


def _matrix_ranks(a: Tensor, ranks: Sequence[int] | None) -> list[int]:
    """One rank for every matrix, checked."""
    shape = "[" + ", ".join(str(size) for size in a.shape) + "]"
    if a.dim() < 2:
        raise RuntimeError(f"{_OP}: a must be at least a matrix (a {shape})")
    if a.dtype not in _DTYPES:
        raise RuntimeError(f"{_OP}: a must be float32, bfloat16, float16 or float64, not {a.dtype}")
    batch, full = a.shape[:-2].numel(), min(a.shape[-2:])
    if ranks is None:
        return [full] * batch
    for rank in ranks:
        if rank < 0 or rank > full:
            raise RuntimeError(f"{_OP}: rank {rank} is outside [0, {full}] (a {shape})")
    if len(ranks) == 1:
        return [ranks[0]] * batch
    if len(ranks) != batch:
        raise RuntimeError(f"{_OP}: {len(ranks)} ranks for {batch} matrices (a {shape}); pass one, or one for each")
    return list(ranks)


def _width(a: Tensor, ranks: Sequence[int] | None) -> int:
    """The largest rank: also known when the batch is empty."""
    return min(a.shape[-2:]) if ranks is None else max(ranks, default=0)


def _check_options(tolerance: float, method: str) -> None:
    if method not in METHODS:
        raise RuntimeError(f"{_OP}: method {method!r} is unknown; use one of {', '.join(METHODS)}")
    if not 0 <= tolerance < float("inf"):
        raise RuntimeError(f"{_OP}: tolerance {tolerance} must be at least 0, and finite")


def _empty(wide: Tensor, width: int) -> list[Tensor]:
    """The result of rank 0 everywhere, [batch, ...]."""
    batch, m, n = wide.shape
    vector = wide.new_zeros(batch, dtype=torch.float64)
    return [
        wide.new_zeros(batch, m, width),
        wide.new_zeros(batch, width),
        wide.new_zeros(batch, width, n),
        vector,
        torch.zeros_like(vector),
        torch.zeros_like(vector, dtype=torch.int64),
    ]


def _shaped(result: Sequence[Tensor], a: Tensor, vectors: bool) -> _Outputs:
    """Back to the batch shape of a, contiguous, owning its memory."""
    u, s, vh, error, excess, path = result
    lead = a.shape[:-2]
    if not vectors:
        u, vh = u[:, :, :0], vh[:, :0]
    return (
        u.reshape(*lead, *u.shape[1:]).contiguous(),
        s.reshape(*lead, s.shape[1]).contiguous(),
        vh.reshape(*lead, *vh.shape[1:]).contiguous(),
        error.reshape(lead),
        excess.reshape(lead),
        path.reshape(lead),
    )


def _check_finite(wide: Tensor) -> None:
    """NaN wins a maximum, so the largest magnitude of every matrix says all. A norm, which is faster, says it too where
    it does not overflow."""
    if bool(torch.isfinite(torch.linalg.vector_norm(wide.flatten(1), dim=1)).all()):
        return
    bad = (~torch.isfinite(largest_entry(wide))).nonzero().flatten().tolist()
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise WeightError(f"{_OP}: matrix {bad[0]} of the batch{more} holds NaN or infinity; nothing was decomposed")


def _kernel(a: Tensor, rank: Sequence[int] | None, vectors: bool, tolerance: float, seed: int, method: str) -> _Outputs:
    ranks = _matrix_ranks(a, rank)
    _check_options(tolerance, method)
    width = _width(a, rank)
    m, n = a.shape[-2:]
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    wide = a.detach().to(dtype).reshape(len(ranks), m, n).contiguous()  # a view has the bits of its copy
    if wide.numel() == 0:
        return _shaped(_empty(wide, width), a, vectors)
    _check_finite(wide)
    if width == 0:
        result = _empty(wide, 0)
        result[3] = torch.linalg.vector_norm(wide, dim=(1, 2), dtype=torch.float64)
        return _shaped(result, a, vectors)
    if not vectors:
        return _shaped(_values_only(wide, ranks, width), a, vectors)
    transposed = m > n
    short = wide.mT if transposed else wide
    path = choose_path(short.shape[1], short.shape[2], width, dtype, tolerance, method)
    found = decompose(short, width, path, transposed, tolerance, seed)
    left, values, right = found.left, found.values, found.right
    if min(ranks) < width:
        keep = torch.arange(width, device=a.device) < torch.tensor(ranks, device=a.device).unsqueeze(1)
        left, values, right = left * keep.unsqueeze(1), values * keep, right * keep.unsqueeze(2)
    if width < min(m, n) or min(ranks) < width:
        error = squared_error(short, left, values, right, found.energy).sqrt()
        error = error * (torch.tensor(ranks, device=a.device) < min(m, n))
    else:
        error = torch.zeros_like(found.energy)
    u, vh = (right.mT, left.mT) if transposed else (left, right)
    return _shaped((u, values, vh, error, found.excess, found.path), a, vectors)


def _values_only(wide: Tensor, ranks: list[int], width: int) -> list[Tensor]:
    """All singular values, exactly; no vectors."""
    values = torch.linalg.svdvals(wide)
    own = torch.tensor(ranks, device=wide.device).unsqueeze(1)
    index = torch.arange(values.shape[1], device=wide.device)
    error = (values.double().square() * (index >= own)).sum(1).sqrt()
    result = _empty(wide, 0)
    result[1], result[3] = (values * (index < own))[:, :width], error
    result[5].fill_(int(SvdPath.LAPACK))
    return result


def _fake(a: Tensor, rank: Sequence[int] | None, vectors: bool, tolerance: float, seed: int, method: str) -> _Outputs:
    _matrix_ranks(a, rank) if rank is not None else None
    _check_options(tolerance, method)
    width = _width(a, rank)
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    lead, (m, n) = a.shape[:-2], a.shape[-2:]
    kept = width if vectors else 0
    return (
        a.new_empty((*lead, m, kept), dtype=dtype),
        a.new_empty((*lead, width), dtype=dtype),
        a.new_empty((*lead, kept, n), dtype=dtype),
        a.new_empty(lead, dtype=torch.float64),
        a.new_empty(lead, dtype=torch.float64),
        a.new_empty(lead, dtype=torch.int64),
    )


def _no_gradient(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError(f"{_OP} has no gradient; pass a.detach(), or use torch.linalg.svd to differentiate")


define_operator("truncated_svd", _kernel)
_operator: Callable[..., Any] = torch.ops.eigenprune.truncated_svd.default
torch.library.register_fake(_OP, _fake)
torch.library.register_autograd(_OP, _no_gradient)
