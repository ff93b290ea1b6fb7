# SPDX-License-Identifier: Apache-2.0
"""A removal for a task as PNG pictures. matplotlib draws them (`pip install eigenprune[plots]`); nothing is shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eigenprune.errors import ConfigError
from eigenprune.report.task_views import Component, TaskViews, most_changed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers tell apart.
KEPT, REMOVED, TASK, RETENTION, QUIET = "#8c9bab", "#d55e00", "#0072b2", "#009e73", "#5f6b76"
DOTS_PER_INCH = 150
MOST_MATRICES = 6
COLUMNS = 3


def write_pictures(views: TaskViews, folder: str | Path, name: str = "task") -> list[Path]:
    """Write `NAME-worth.png`, `NAME-layers.png`, `NAME-path.png` and, where something was tested, `NAME-tests.png`.

    Args:
        views: the numbers.
        folder: made where it is missing; files of these names are replaced.
        name: what the files begin with.

    Raises:
        ConfigError: matplotlib is not installed, or the folder cannot be written.
    """
    drawn = {"worth": worth_figure(views), "layers": layers_figure(views), "path": path_figure(views)}
    if views.shares:
        drawn["tests"] = tests_figure(views)
    paths = []
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for part, figure in drawn.items():
            paths.append(Path(folder) / f"{name}-{part}.png")
            figure.savefig(paths[-1], dpi=DOTS_PER_INCH)
    except OSError as error:
        raise ConfigError(f"the pictures cannot be written to {folder}: {error}") from error
    return paths


def worth_figure(views: TaskViews, layers: list[str] | None = None) -> Figure:
    """Worth against singular value, one panel a matrix.

    Args:
        views: the numbers.
        layers: which matrices; None takes those that changed most.

    Raises:
        ConfigError: matplotlib is not installed, or there is no such layer.
    """
    matrices = views.matrices()
    names = list(most_changed(views, MOST_MATRICES)) if layers is None else list(layers)
    unknown = [name for name in names if name not in matrices]
    if unknown or not names:
        raise ConfigError(f"no components of {', '.join(unknown) or 'any layer'} to draw")
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure: Figure = _figure(4.0 * columns, 3.0 * rows + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, name in zip(panels, names, strict=False):
        _draw_worth(panel, matrices[name])
        panel.set_title(_short(name), fontsize=9)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    for panel in panels[-columns:]:
        panel.set_xlabel("singular value")
    for panel in panels[::columns]:
        panel.set_ylabel("worth, nats per example")
    figure.suptitle("What each component is worth to the task", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def layers_figure(views: TaskViews) -> Figure:
    """Worth below zero by layer and kind, with the number of removed components in each cell.

    Raises:
        ConfigError: matplotlib is not installed, or there is no component.
    """
    cells = views.by_layer_and_kind()
    if not cells:
        raise ConfigError("there is no component to draw")
    kinds = list(dict.fromkeys(cell["kind"] for cell in cells))
    depths = sorted({cell["depth"] for cell in cells})
    values = [[0.0] * len(depths) for _ in kinds]
    removed = [[0] * len(depths) for _ in kinds]
    for cell in cells:
        row, column = kinds.index(cell["kind"]), depths.index(cell["depth"])
        values[row][column] += -cell["negative"]
        removed[row][column] += cell["removed"]
    figure: Figure = _figure(max(5.5, 0.36 * len(depths) + 2.5), 0.42 * len(kinds) + 1.9)
    panel = figure.subplots()
    image = panel.imshow(values, cmap="Blues", aspect="auto", vmin=0)
    panel.set_xticks(range(len(depths)), [str(depth) for depth in depths], fontsize=8)
    panel.set_yticks(range(len(kinds)), kinds)
    panel.set_xlabel("layer")
    dark = 0.55 * max(max(row) for row in values)
    for row, counts in enumerate(removed):
        for column, count in enumerate(counts):
            if count:
                colour = "white" if values[row][column] > dark else "black"
                panel.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
    panel.set_title("Worth below zero by layer and kind; numbers: components removed", fontsize=10)
    figure.colorbar(image, ax=panel, label="nats per example")
    return figure


def path_figure(views: TaskViews) -> Figure:
    """Held-out accuracy and loss, and retention loss, over the removed share, with the chosen stop.

    Raises:
        ConfigError: matplotlib is not installed, or there is no round.
    """
    if not views.path:
        raise ConfigError("there is no round to draw")
    figure: Figure = _figure(6.0, 6.2)
    panels = figure.subplots(3, 1, sharex=True)
    upper, lower = panels[0], panels[2]
    shares = [100 * point.removed for point in views.path]
    drawn = (
        ("held-out accuracy, %", TASK, [100 * point.accuracy for point in views.path]),
        ("held-out loss,\nnats per example", TASK, [point.loss for point in views.path]),
        ("retention loss,\nnats per token", RETENTION, [point.retention for point in views.path]),
    )
    for panel, (label, colour, values) in zip(panels, drawn, strict=True):
        panel.plot(shares, values, "o-", color=colour, markersize=4)
        panel.set_ylabel(label)
    for number, (share, value) in enumerate(zip(shares, drawn[1][2], strict=True)):
        # Rounds can trade components at one share: their numbers tell them apart.
        panels[1].annotate(str(number), (share, value), xytext=(6, 2), textcoords="offset points", fontsize=8)
    upper.set_ylim(-3, 103)
    lower.set_xlabel("components removed, %; numbers: rounds")
    lower.margins(x=0.08)
    if views.retention_bound is not None:
        lower.axhline(views.retention_bound, color=RETENTION, linestyle="--", linewidth=1, label="bound")
        lower.legend(frameon=False, fontsize=8)
    stop = views.path[views.chosen]
    for panel in panels:
        panel.axvline(100 * stop.removed, color=REMOVED, linewidth=1)
        _plain(panel)
    upper.annotate(
        f"stop: {100 * stop.removed:.2f} %",
        (100 * stop.removed, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        color=REMOVED,
        fontsize=9,
    )
    return figure


def tests_figure(views: TaskViews) -> Figure:
    """Accuracy before and after on each tested task, with the intervals.

    Raises:
        ConfigError: matplotlib is not installed, or nothing was tested.
    """
    if not views.shares:
        raise ConfigError("nothing was tested: there is no bar to draw")
    figure: Figure = _figure(1.6 * len(views.shares) + 2.4, 3.8)
    panel = figure.subplots()
    highest = 0.0
    for place, share in enumerate(views.shares):
        pairs = ((share.before, share.before_interval, KEPT), (share.after, share.after_interval, TASK))
        for side, (value, (low, high), colour) in enumerate(pairs):
            left = place + 0.38 * (side - 0.5)
            label = ("before", "after")[side] if place == 0 else None
            panel.bar(left, 100 * value, 0.34, color=colour, label=label)
            error = [[100 * max(0.0, value - low)], [100 * max(0.0, high - value)]]
            panel.errorbar(left, 100 * value, yerr=error, color="black", capsize=4, linewidth=1)
            panel.text(left, 100 * high + 1.5, f"{100 * value:.1f}", ha="center", fontsize=9)
            highest = max(highest, 100 * high)
    ticks = [f"{share.task}\nn = {share.total}, p = {_probability(share.p_value)}" for share in views.shares]
    panel.set_xticks(range(len(ticks)), ticks, fontsize=9)
    panel.set_xlim(-0.65, len(ticks) - 0.35)
    panel.set_ylim(0, min(112.0, 1.25 * highest + 4))
    panel.set_ylabel("right answers, %")
    panel.set_title("Test questions, with 95 % Wilson intervals; p of McNemar's test", fontsize=9)
    _plain(panel)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_worth(panel: Axes, components: list[Component]) -> None:
    for removed, colour, size, label in ((False, KEPT, 7, "kept"), (True, REMOVED, 16, "removed")):
        chosen = [one for one in components if one.removed == removed]
        panel.scatter([one.sigma for one in chosen], [one.worth for one in chosen], s=size, c=colour, label=label)
    panel.axhline(0, color="black", linewidth=0.6)
    sigmas = [one.sigma for one in components]
    if min(sigmas) > 0:
        from matplotlib.ticker import LogLocator, NullFormatter

        steps = (1.0,) if max(sigmas) > 200 * min(sigmas) else (1.0, 2.0, 5.0)  # as many labels as have room
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=steps))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
    panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    _plain(panel)


def _plain(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(colors=QUIET, labelsize=8)


def _short(name: str) -> str:
    """The last part of a layer's name, from its number on."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[first:])


def _probability(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def check_matplotlib() -> None:
    """Check that pictures can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'eigenprune[plots]'") from error


def _figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches, of no window system."""
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
