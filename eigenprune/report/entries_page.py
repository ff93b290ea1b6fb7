# SPDX-License-Identifier: Apache-2.0
"""Kept entries as one HTML page that needs no other file, no script and no network."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import torch
from torch import Tensor

from eigenprune.errors import ConfigError
from eigenprune.report.entries_view import (
    NUMBER,
    NeighbourCounts,
    as_matrix,
    count_neighbours,
    kept_neighbours,
    kept_share,
    kept_values,
    same_in_every_layer,
    shrink,
)
from eigenprune.report.png import DIVERGING, RISING, STEPS, colours, png_bytes

TEMPLATE = "entries_page.html.jinja"
CELLS, SMALL_CELLS = 384, 64
WIDEST, SMALL_WIDEST = 480, 128  # pixels on the page
MOST_DRAWN = 600


@dataclass(frozen=True)
class KeptEntries:
    """Which entries of a fine-tuned model are kept, read tensor by tensor.

    Attributes:
        names: of the tensors, in model order.
        mask: the bool mask of a tensor by its name, in its shape.
        values: the tensor by its name; only kept entries are looked at.
        facts: what the page says on top: {word: text}.
    """

    names: Sequence[str]
    mask: Callable[[str], Tensor]
    values: Callable[[str], Tensor]
    facts: Mapping[str, str]


def entries_page(kept: KeptEntries, title: str, shown: Sequence[str] = ()) -> str:
    """The page as text; the same model gives the same text. One tensor is in memory at a time.

    Args:
        kept: what to show.
        title: on top.
        shown: tensors whose matrix is shown large; by default one that is kept in part, see `typical`.

    Raises:
        ConfigError: a name in `shown` is unknown.
    """
    unknown = [name for name in shown if name not in kept.names]
    if unknown:
        raise ConfigError(f"there is no tensor {unknown[0]!r:.120}; there are, among others: {_some(kept.names)}")
    shares: dict[str, Tensor] = {}
    counts: dict[str, NeighbourCounts] = {}
    matrices: list[str] = []
    for name in kept.names:
        mask = kept.mask(name)
        if mask.ndim < 2 or mask.numel() == 0:
            continue
        matrices.append(name)
        counts[name] = count_neighbours(mask)
        if len(shares) < MOST_DRAWN:
            shares[name] = kept_share(mask, SMALL_CELLS)
    large = list(shown) or typical([name for name in matrices if 0 < counts[name].density < 1])
    highest = max((float(share.max()) for share in shares.values()), default=0.0) or 1.0
    environment = jinja2.Environment(autoescape=True, trim_blocks=False, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files("eigenprune.report").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        title=title,
        facts=list(kept.facts.items()),
        matrices=[_matrix(name, kept) for name in large],
        groups=_groups(shares, counts, highest),
        highest=highest,
        left_out=len(matrices) - len(shares),
        rows=[_row(name, counts[name]) for name in matrices],
    )


def typical(names: Sequence[str]) -> list[str]:
    """Of the tensors that are in most layers, the one in the middle layer; empty where there is none."""
    families = [same_in_every_layer(names, name) for name in names]
    largest = max(families, key=len, default=[])
    return largest[len(largest) // 2 :][:1]


def _matrix(name: str, kept: KeptEntries) -> dict[str, Any]:
    mask = kept.mask(name)
    values, counts = kept_values(kept.values(name), mask), count_neighbours(mask)
    neighbours = kept_neighbours(mask).float()
    neighbours[neighbours < 0] = torch.nan
    small = shrink(values, CELLS)
    seen = small[~small.isnan()].abs()
    limit = float(seen.quantile(0.99)) if seen.numel() else 1.0
    width, height = _size(values, WIDEST)
    cells = [-(-whole // cell) for whole, cell in zip(values.shape, small.shape, strict=True) if cell]
    return {
        "name": name,
        "rows": values.shape[0],
        "columns": values.shape[1],
        "share": f"{counts.density:.2%}",
        "cell": f"{cells[0]} x {cells[1]}" if max(cells, default=1) > 1 else "",
        "kept_picture": _encoded(colours(small, -limit, limit, DIVERGING)),
        "neighbour_picture": _encoded(colours(shrink(neighbours, CELLS), 0, 4, STEPS)),
        "limit": limit,
        "width": width,
        "height": height,
        "shares": list(zip(counts.observed, counts.expected, strict=True)),
        "most": max(*counts.observed, *counts.expected, 1e-9),
        "here": counts.observed_mean,
        "random": counts.expected_mean,
    }


def _groups(
    shares: Mapping[str, Tensor], counts: Mapping[str, NeighbourCounts], highest: float
) -> list[dict[str, Any]]:
    groups, done = [], set()
    for name in shares:
        if name in done:
            continue
        members = same_in_every_layer(shares, name)
        done.update(members)
        layers = [
            {
                "label": f"{'.'.join(NUMBER.findall(member))}: " if len(members) > 1 else "",
                "share": f"{counts[member].density:.1%}",
                "picture": _encoded(colours(shares[member], 0, highest, RISING)),
                **dict(zip(("width", "height"), _size_of(counts[member].shape, SMALL_WIDEST), strict=True)),
            }
            for member in members
        ]
        groups.append({"name": NUMBER.sub("*", name) if len(members) > 1 else name, "layers": layers})
    return groups


def _row(name: str, counts: NeighbourCounts) -> dict[str, str]:
    return {
        "name": name,
        "shape": f"{counts.shape[0]} x {counts.shape[1]}",
        "kept": f"{counts.kept:,}",
        "share": f"{counts.density:.4f}",
        "here": f"{counts.observed_mean:.3f}" if counts.kept else "",
        "random": f"{counts.expected_mean:.3f}" if counts.kept else "",
    }


def _size(matrix: Tensor, widest: int) -> tuple[int, int]:
    rows, columns = as_matrix(matrix).shape
    return _size_of((rows, columns), widest)


def _size_of(shape: tuple[int, int], widest: int) -> tuple[int, int]:
    """(width, height) in pixels in the proportions of the matrix, neither thinner than an eighth of `widest`."""
    longest = max(shape)
    height, width = (max(widest // 8, round(widest * side / longest)) for side in shape)
    return width, height


def _encoded(pixels: Tensor) -> str:
    return base64.b64encode(png_bytes(pixels)).decode("ascii")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3])
