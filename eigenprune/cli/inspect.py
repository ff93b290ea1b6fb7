# SPDX-License-Identifier: Apache-2.0
"""`eigenprune inspect`."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from eigenprune.cli.output import show


def inspect(
    model: Annotated[str, typer.Argument(help="Folder or hub id, dense or pruned.")],
    skip: Annotated[list[str] | None, typer.Option(help="Try out a skip pattern; repeatable.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")
    ] = False,
    quiet: Annotated[bool, typer.Option(help="No progress, no table.")] = False,
) -> None:
    """Per linear layer: shape, layout, rank, bits, parameters, worth lost, and the reason where it is left dense.

    Example: `eigenprune inspect ./small`
    """
    from eigenprune.cli.loading import load_model
    from eigenprune.report import layer_table

    loaded = load_model(model, revision=revision, quiet=quiet)
    saved = _saved_layers(model)
    layers = [_with_saved(entry, saved.get(entry.name, {})) for entry in describe_layers(loaded, skip or ())]
    kept = sum(layer.parameters for layer in layers)
    dense = sum(layer.dense_parameters for layer in layers)
    total = (
        f"{len(layers)} linear layers, heads included: {kept:,} of {dense:,} parameters ({kept / max(dense, 1):.4f})"
    )
    result = {
        "model": model,
        "layers": [asdict(layer) for layer in layers],
        "parameters": kept,
        "dense_parameters": dense,
    }
    show([layer_table(layers), total], result, as_json=as_json, quiet=quiet)


def describe_layers(model: Any, skip: Any = ()) -> list[Any]:
    """A `LayerReport` for each linear layer of `model`, in model order, the factored ones included."""
    from eigenprune.layers import LowRankLinear, factored_parameters, select_layers
    from eigenprune.report import LayerReport

    selection = select_layers(model, skip)
    quantizer = getattr(model, "hf_quantizer", None)
    before = {} if quantizer is None else getattr(quantizer.quantization_config, "shapes", {})
    reports = []
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            shape = (module.out_features, module.in_features)
            cost = factored_parameters(module.rank, *shape, module.layout)
            report = LayerReport(name, shape, module.layout, module.rank, cost, bits=_bits(module.right))
            reports.append(_with_channels(report, before.get(name)))
        elif name in selection.shapes:
            shape = selection.shapes[name]
            reason = selection.skipped.get(name, "")
            parameters = shape[0] * shape[1]
            report = LayerReport(name, shape, "dense", min(shape), parameters, None, reason, _bits(module))
            reports.append(_with_channels(report, before.get(name)))
    return reports


def _with_channels(report: Any, sides: Any) -> Any:
    """`report` of a layer as it is, with the shape that it had before it lost channels, if it did."""
    return report if sides is None else replace(report, shape=tuple(sides[2:]), kept_shape=report.shape)


def _bits(linear: Any) -> int | None:
    """Of its weight; None for floating point."""
    from eigenprune.layers import quantised_bits

    return quantised_bits(linear.weight) or None


def _with_saved(layer: Any, saved: dict[str, Any]) -> Any:
    """`layer` with what only the saved report knows: the worth lost, and why the allocation left a layer dense."""
    return replace(layer, loss=saved.get("loss"), reason=layer.reason or str(saved.get("reason", "")))


def _saved_layers(model: str) -> dict[str, dict[str, Any]]:
    """The layers of the report saved beside a local pruned model; empty where there is none."""
    from eigenprune.hub import REPORT_NAME

    try:
        report = json.loads((Path(model) / REPORT_NAME).read_text(encoding="utf-8"))
        return {layer["name"]: layer for layer in report["layers"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
