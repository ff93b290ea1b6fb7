# SPDX-License-Identifier: Apache-2.0
"""A batch of singular value decompositions through the Gram matrix of the short side.

`a a^T = U diag(s^2) U^T`, then `diag(s) Vh = U^T a`. In float64 the squares cost a float32 matrix nothing: a singular
value is off by about 1e-8 of the largest, a tenth of what float32 resolves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eigenprune.ops._library import define_operator

_OP = "eigenprune::gram_svd"
_Result = tuple[Tensor, Tensor, Tensor, Tensor]


def gram_svd(a: Tensor, rank: int, double_precision: bool = True, right_decides: bool = False) -> _Result:
    """The `rank` leading singular components of every matrix of a batch. Most callers want `truncated_svd`.

    Args:
        a: [batch, short, long], short <= long, float32 or float64, finite, any strides.
        rank: in [1, short].
        double_precision: compute in float64 (the only choice for float64); otherwise in float32, whose squares leave
            a small singular value right to 1e-7 s_1^2 / s_i only.
        right_decides: the entry of largest magnitude of every row of `right` is positive, not that of every column
            of `left`.

    Returns:
        left [batch, short, rank], values [batch, rank], right [batch, rank, long] in the dtype of a, and
        energy [batch] float64, the squared Frobenius norms. Vectors are orthonormal also where values are zero.
        On CPU a batch of at least as many matrices as threads is worked on by one thread a matrix; in double precision
        another number of threads then changes no more than float64 rounding does: of float32 results hardly a bit.

    Raises:
        RuntimeError: shape, dtype or rank; or the eigensolver failed, with the index of the matrix. It has no
            gradient.
    """
    result: _Result = _operator(a, rank, double_precision, right_decides)
    return result


def gram_svd_reference(a: Tensor, rank: int, double_precision: bool = True, right_decides: bool = False) -> _Result:
    """The pure-torch twin of `gram_svd`. Same arguments."""
    _check(a, rank, double_precision)
    if a.shape[0] == 0:
        return _fake(a, rank, double_precision, right_decides)
    work = a.to(torch.float64 if double_precision else torch.float32)
    largest = work.abs().amax(dim=(1, 2), keepdim=True)
    exponent = torch.frexp(largest).exponent.to(work.dtype)
    half = torch.floor(exponent / 2)  # twice: 2^149, which a denormal needs, is no float32
    work = work * torch.exp2(-half) * torch.exp2(half - exponent)
    vectors = torch.linalg.eigh(work @ work.mT)[1][:, :, -rank:].flip(2)
    product = vectors.mT @ work  # [batch, rank, long]
    values = torch.linalg.vector_norm(product, dim=2)
    # Rows of product are orthogonal up to u s_1^2 / s_r^2, u of the computation; LAPACK's unit is long u.
    finer = torch.finfo(a.dtype).eps / torch.finfo(work.dtype).eps
    room = max(64.0, a.shape[2]) if a.dtype == work.dtype else finer
    if bool((values.amax(1).square() >= room * values.amin(1).square()).any()):  # also for zeros
        q, r = torch.linalg.qr(product.mT)  # R is diagonal up to rounding; Q completes the null directions
        diagonal = r.diagonal(dim1=1, dim2=2)
        values, order = diagonal.abs().sort(dim=1, descending=True, stable=True)
        signed = q * torch.where(diagonal < 0, -1, 1).unsqueeze(1)
        right = signed.gather(2, order.unsqueeze(1).expand_as(signed)).mT
        vectors = vectors.gather(2, order.unsqueeze(1).expand_as(vectors))
    else:
        right = product / values.clamp_min(torch.finfo(work.dtype).tiny).unsqueeze(2)
    deciding = right if right_decides else vectors.mT  # [batch, rank, *]
    entry = deciding.gather(2, deciding.abs().argmax(2, keepdim=True))  # [batch, rank, 1]
    sign = torch.where(entry < 0, -1, 1).to(work.dtype)
    exponent = exponent.squeeze(2)
    energy = torch.linalg.vector_norm(a, dim=(1, 2), dtype=torch.float64).square()
    values = values * torch.exp2(half.squeeze(2)) * torch.exp2(exponent - half.squeeze(2))
    dtype = a.dtype
    return (vectors * sign.mT).to(dtype), values.to(dtype), (right * sign).to(dtype).contiguous(), energy


def _check(a: Tensor, rank: int, double_precision: bool) -> None:
    shape = "[" + ", ".join(str(size) for size in a.shape) + "]"
    if a.dim() != 3:
        raise RuntimeError(f"{_OP}: a must be [batch, short, long] (a {shape})")
    if a.shape[1] > a.shape[2]:
        raise RuntimeError(f"{_OP}: the first side must not be the longer one (a {shape})")
    if rank < 1 or rank > a.shape[1]:
        raise RuntimeError(f"{_OP}: rank {rank} is outside [1, {a.shape[1]}]")
    if a.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"{_OP}: a must be float32 or float64, not {a.dtype}")
    if a.dtype == torch.float64 and not double_precision:
        raise RuntimeError(f"{_OP}: float64 is computed in double precision only")


def _fake(a: Tensor, rank: int, double_precision: bool, right_decides: bool) -> _Result:
    _check(a, rank, double_precision)
    batch, short, long = a.shape
    return (
        a.new_empty((batch, short, rank)),
        a.new_empty((batch, rank)),
        a.new_empty((batch, rank, long)),
        a.new_empty((batch,), dtype=torch.float64),
    )


def _no_gradient(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError(f"{_OP} has no gradient; pass a.detach(), or use torch.linalg.svd to differentiate")


define_operator("gram_svd", gram_svd_reference)
_operator: Callable[..., Any] = torch.ops.eigenprune.gram_svd.default
torch.library.register_fake(_OP, _fake)
torch.library.register_autograd(_OP, _no_gradient)
