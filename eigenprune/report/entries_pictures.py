# SPDX-License-Identifier: Apache-2.0
"""Kept entries as PNG pictures with axes. matplotlib draws them (`pip install eigenprune[plots]`); nothing is shown."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eigenprune.errors import ConfigError
from eigenprune.report.entries_view import count_neighbours, kept_neighbours, kept_share, kept_values, shrink
from eigenprune.report.png import DIVERGING, RISING, STEPS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELLS = 512  # a side at most: more than the picture has pixels for
SMALL_CELLS = 96
DPI = 150
NARROWEST = 6.2  # inches: of a long name
RESET = "#ffffff"


def draw_matrix(path: Path, name: str, tuned: Tensor, mask: Tensor) -> None:
    """One matrix: the kept values in colour, what is reset blank.

    Raises:
        ConfigError: matplotlib is not installed, or the shapes differ.
    """
    values = kept_values(tuned, mask)
    shown = shrink(values, CELLS)
    seen = values[~values.isnan()].abs()
    limit = float(seen.quantile(0.99)) if 0 < seen.numel() <= 1 << 24 else float(seen.max()) if seen.numel() else 1.0
    width, height = _inches(values)
    figure = new_figure(max(width + 2.0, NARROWEST), height + 1.2)
    panel = figure.subplots()
    panel.set_facecolor(RESET)
    drawn = panel.imshow(
        shown.numpy(),
        cmap=_scale(DIVERGING),
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        interpolation="nearest",
        extent=_extent(values),
    )
    figure.suptitle(f"{name}\nkept values, {_share(mask)}; blank: the base's value", fontsize=10)
    _label(panel, values, shown)
    figure.colorbar(drawn, ax=panel, label="value (99th percentile at the ends)", extend="both", aspect=30)
    _save(figure, path)


def draw_neighbours(path: Path, name: str, mask: Tensor) -> None:
    """One matrix: how many kept neighbours each kept entry has, and beside it the shares of a random mask.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    found = kept_neighbours(mask).float()
    found[found < 0] = torch.nan
    shown, counts = shrink(found, CELLS), count_neighbours(mask)
    width, height = _inches(found)
    figure = new_figure(width + 6.0, max(height, 3.4) + 1.2)
    left, right = figure.subplots(1, 2, width_ratios=[width + 1.2, 4.2])
    left.set_facecolor(RESET)
    drawn = left.imshow(
        shown.numpy(), cmap=_scale(STEPS), vmin=0, vmax=4, aspect="auto", interpolation="nearest", extent=_extent(found)
    )
    figure.suptitle(f"{name}\nkept neighbours of kept entries, {_share(mask)}", fontsize=10)
    _label(left, found, shown)
    figure.colorbar(drawn, ax=left, ticks=range(5), label="kept neighbours", aspect=30)
    places = torch.arange(5).numpy()
    right.bar(places - 0.2, counts.observed, 0.4, label=f"this mask, mean {counts.observed_mean:.2f}", color="#20586e")
    right.bar(
        places + 0.2, counts.expected, 0.4, label=f"random mask, mean {counts.expected_mean:.2f}", color="#c9c4b8"
    )
    right.set_xticks(places)
    right.set_xlabel("kept neighbours")
    right.set_ylabel("share of the kept entries")
    right.set_ylim(0, 1.18 * max(*counts.observed, *counts.expected, 1e-9))
    right.legend(frameon=False, fontsize=9, loc="upper left")
    right.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_layers(path: Path, title: str, layers: Sequence[tuple[str, Tensor]]) -> None:
    """The same matrix in every layer: where entries are kept, on one colour scale, any number of layers.

    Args:
        path: of the PNG.
        title: above all.
        layers: (label, mask) of each.

    Raises:
        ConfigError: matplotlib is not installed, or there is no layer.
    """
    if not layers:
        raise ConfigError(f"{title}: there is no layer to draw")
    shares = [kept_share(mask, SMALL_CELLS) for _, mask in layers]
    high = max(float(share.nan_to_num(0).max()) if share.numel() else 0.0 for share in shares)
    columns = min(len(layers), 6)
    rows = -(-len(layers) // columns)
    tallest = max(min(share.shape[0] / max(share.shape[1], 1), 2.0) for share in shares)
    height = max(0.5, 1.9 * tallest)
    figure = new_figure(1.0 + 2.1 * max(columns, 2), 0.9 + (height + 0.35) * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    drawn: Any = None
    for panel, entry in zip(
        panels.flatten(), [*zip(layers, shares, strict=True), *[None] * (rows * columns)], strict=False
    ):
        panel.set_xticks([])
        panel.set_yticks([])
        if entry is None:
            panel.set_axis_off()
            continue
        (label, mask), share = entry
        drawn = panel.imshow(
            share.numpy(), cmap=_scale(RISING), vmin=0, vmax=high or 1, aspect="auto", interpolation="nearest"
        )
        panel.set_title(f"{label}: {float(mask.float().mean()) if mask.numel() else 0:.1%}", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.colorbar(drawn, ax=panels, label="kept share of a cell", shrink=min(1.0, 2.0 / rows + 0.3))
    _save(figure, path)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches, without a window.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'eigenprune[plots]'") from error
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _scale(colours: tuple[tuple[int, int, int], ...]) -> Any:
    """The colours of the page as a scale of matplotlib."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("eigenprune", [tuple(part / 255 for part in colour) for colour in colours])


def _inches(matrix: Tensor) -> tuple[float, float]:
    """(width, height) of a panel in the proportions of the matrix, the longer side 6, the other at least 1.5."""
    longest = max(*matrix.shape, 1)
    height, width = (max(1.5, 6.0 * side / longest) for side in matrix.shape)
    return max(width, 3.0), height


def _extent(matrix: Tensor) -> tuple[float, float, float, float]:
    """Axes count entries, also where cells are drawn."""
    return (0.0, float(matrix.shape[1]), float(matrix.shape[0]), 0.0)


def _label(panel: Any, matrix: Tensor, shown: Tensor) -> None:
    cells = [-(-whole // small) for whole, small in zip(matrix.shape, shown.shape, strict=True) if small]
    mean = f" (a cell is the mean of {cells[0]} x {cells[1]} entries)" if max(cells, default=1) > 1 else ""
    panel.set_xlabel(f"column{mean}", fontsize=9)
    panel.set_ylabel("row", fontsize=9)
    if matrix.shape[0] == 1:
        panel.set_yticks([])


def _share(mask: Tensor) -> str:
    kept = int(mask.sum())
    return f"{kept:,} of {mask.numel():,} entries ({kept / max(mask.numel(), 1):.1%})"


def _save(figure: "Figure", path: Path) -> None:
    # No date and no version inside: the same picture, the same bytes.
    figure.savefig(path, format="png", metadata={"Software": None})
