# SPDX-License-Identifier: Apache-2.0
"""Tables for a terminal."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from eigenprune.report.prune_report import LayerReport, PruneReport
from eigenprune.spectral import METHODS


def layer_table(layers: Iterable[LayerReport]) -> Table:
    """One row a layer: shape, layout and rank, kept share, parameters, and the worth lost or why it is dense."""
    table = Table(box=None, header_style="bold")
    table.add_column("layer", no_wrap=True)
    for name in ("shape", "factors", "keep", "parameters"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("worth lost", no_wrap=True)
    for layer in layers:
        lost = "" if layer.loss is None else f"{layer.loss:.2e}"
        table.add_row(
            layer.name,
            _sides(layer.shape) if layer.kept_shape is None else f"{_sides(layer.shape)} -> {_sides(layer.kept_shape)}",
            ("dense" if layer.layout == "dense" else f"{layer.layout} {layer.rank}")
            + (f" int{layer.bits}" if layer.bits else ""),
            f"{layer.parameters / layer.dense_parameters:.3f}",
            f"{layer.parameters:,}",
            layer.reason or lost,
        )
    return table


def summary_table(report: PruneReport) -> Table:
    """The whole run in a few rows."""
    before, after = report.model_parameters
    bytes_before, bytes_after = report.model_bytes
    factored = sum(layer.layout != "dense" for layer in report.layers)
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row(
        "method", ", ".join(f"{key} {value}" for key, value in report.settings.items() if value not in (None, [], ()))
    )
    table.add_row("layers", f"{factored} of {len(report.layers)} linear layers factored")
    narrowed = sum(layer.kept_shape is not None for layer in report.layers)
    if narrowed:
        table.add_row("channels", f"removed from {narrowed} of them")
    table.add_row("keep", f"{report.keep:.4f} of their parameters (removed {1 - report.keep:.4f})")
    table.add_row("model", f"{before:,} -> {after:,} parameters ({after / before:.3f})")
    table.add_row("bytes", f"{bytes_before:,} -> {bytes_after:,} ({bytes_after / bytes_before:.3f})")
    if report.calibration:
        facts = report.calibration
        table.add_row("calibration", f"{facts['source']}: {facts['windows']} windows of {facts['window']} tokens")
    method = METHODS.get(str(report.settings.get("method")))
    if method is not None and method.output_metric == "gram":  # else the losses have no unit of their own
        table.add_row("estimated loss", f"+{report.loss:.3f} nats per token")
    if report.recovery:
        table.add_row("recovery", _recovery(report.recovery))
    table.add_row("time", ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in report.seconds.items()))
    return table


def _sides(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _recovery(found: Mapping[str, Any]) -> str:
    change = f"{found['before']:.4f} -> {found['after']:.4f} away from the dense model on held-out windows"
    outcome = change if found["kept"] else f"{change}: no gain, so the pruned model was left as it was"
    return f"{found['method']}, {found['tokens']:,} tokens, {found['steps']} steps: {outcome}"
