# SPDX-License-Identifier: Apache-2.0
"""The singular components ("pieces") of a sliced weight: their worth for a gradient, and the weight without some.

`E_i = sigma_i u_i v_i^T` is `u_i u_i^T A` as well as `A v_i v_i^T`, so the singular vectors of the short side alone are
enough: for the worth, for the removal, and also where sigma_i is 0. They are the eigenvectors of the short Gram in
float64, where squaring leaves the singular values of a float32 weight right to float32 accuracy; signs cancel.
Between equal singular values the vectors are free, and another machine may turn them otherwise: such pieces are told
by `separable`, and `remove_` takes none of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenprune.errors import WeightError
from eigenprune.spectral.slices import LayerView

# Rounding in float64 turns a vector by about 1e-16 sigma_1^2 / (2 sigma_i gap): at this gap, relative to sigma_1, it
# moves the piece by less than 1e-10 sigma_1, far below what any stored dtype can show.
SMALLEST_GAP = 1e-6


@dataclass(frozen=True)
class SlicePieces:
    """The pieces of one slice A [rows, columns], largest first.

    Attributes:
        vectors: [short, short] float64, one singular vector of the shorter side in each column.
        sigmas: [short] float64.
        on_rows: whether the vectors are the left ones (rows <= columns).
    """

    vectors: Tensor
    sigmas: Tensor
    on_rows: bool

    def products(self, part: Tensor, gradient: Tensor) -> Tensor:
        """<E_i, gradient> for every piece i, [short]; `part` is A, float64."""
        if self.on_rows:
            return ((self.vectors.T @ gradient) * (self.vectors.T @ part)).sum(1)
        return ((gradient @ self.vectors) * (part @ self.vectors)).sum(0)

    def removed(self, part: Tensor, mask: Tensor) -> Tensor:
        """The sum of the pieces of A that `mask` [short] bool marks."""
        vectors = self.vectors[:, mask]
        if self.on_rows:
            return vectors @ (vectors.T @ part)
        return (part @ vectors) @ vectors.T

    def separable(self) -> Tensor:
        """[short] bool: the singular value stands apart from its neighbours, and from zero."""
        gaps = torch.cat([self.sigmas, self.sigmas.new_zeros(1)]).diff().neg()
        clear = gaps > SMALLEST_GAP * self.sigmas[:1].clamp_min(1e-300)
        above = torch.cat([clear.new_ones(1), clear[:-1]])
        return clear & above


def slice_pieces(weight: Tensor, view: LayerView) -> list[SlicePieces]:
    """The pieces of every slice of `weight` [out, in].

    Raises:
        WeightError: the weight is not finite; the layer is named.
    """
    parts = slice_parts(weight.detach().double(), view)
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise WeightError(f"{view.name} holds NaN or infinite weights: it has no components")
    shapes = [tuple(part.shape) for part in parts]
    found: list[SlicePieces | None] = [None] * len(parts)
    for shape in dict.fromkeys(shapes):
        places = [i for i, own in enumerate(shapes) if own == shape]
        batch = torch.stack([parts[i] for i in places])
        on_rows = shape[0] <= shape[1]
        values, vectors = torch.linalg.eigh(batch @ batch.mT if on_rows else batch.mT @ batch)
        sigmas = values.clamp_min(0).sqrt().flip(-1)
        for place, vector, sigma in zip(places, vectors.flip(-1), sigmas, strict=True):
            found[place] = SlicePieces(vector, sigma, on_rows)
    return [pieces for pieces in found if pieces is not None]


def slice_parts(tensor: Tensor, view: LayerView) -> list[Tensor]:
    """The slices of `tensor` [out, in], as views."""
    return [tensor.narrow(view.axis, part.start, part.stop - part.start) for part in view.slices]


def stack_rows(view: LayerView, row: Callable[[int], Tensor], like: Tensor) -> Tensor:
    """[slices, largest rank]: `row(i)` of every slice, filled up with `like` where a slice has fewer pieces."""
    width = max(view.ranks)
    rows = [row(i) for i in range(len(view.slices))]
    return torch.stack([torch.cat([own, like.to(own).expand(width - own.shape[0])]) for own in rows])


def without_pieces(weight: Tensor, view: LayerView, pieces: list[SlicePieces], mask: Tensor) -> Tensor:
    """`weight` [out, in] without the pieces that `mask` [slices, rank] marks, in its dtype.

    Slices that lose nothing keep their bits; one that loses all is zero exactly.
    """
    result = weight.detach().clone()
    wide = slice_parts(weight.detach().double(), view)
    for index, target in enumerate(slice_parts(result, view)):
        chosen = mask[index, : view.ranks[index]]
        if bool(chosen.all()):
            target.zero_()
        elif bool(chosen.any()):
            target.copy_(wide[index] - pieces[index].removed(wide[index], chosen))
    return result


def removed_output(weight: Tensor, view: LayerView, pieces: list[SlicePieces], mask: Tensor, mean: Tensor) -> Tensor:
    """What the pieces that `mask` marks add to the output at the input `mean` [in]: [out] float64."""
    output = torch.zeros(view.shape[0], dtype=torch.float64, device=weight.device)
    wide, mean = slice_parts(weight.detach().double(), view), mean.to(output)
    for index, part in enumerate(view.slices):
        chosen = mask[index, : view.ranks[index]]
        if bool(chosen.any()):
            gone = pieces[index].removed(wide[index], chosen)
            rows = slice(part.start, part.stop)
            if view.axis == 0:
                output[rows] = gone @ mean
            else:
                output += gone @ mean[rows]
    return output
