# SPDX-License-Identifier: Apache-2.0
"""Give a pruned model what it needs to save itself, and say what it is."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from eigenprune.calibrate import SOURCES
from eigenprune.config import EigenpruneConfig
from eigenprune.layers import Selection, factored_parameters, layer_shape, low_rank_layers, tensor_bytes
from eigenprune.report import LayerReport, PruneReport, base_facts, versions
from eigenprune.spectral import Choice

SETTINGS = ("keep", "budget", "min_keep", "faster_at", "prior", "method", "layout", "rank_multiple", "bits", "seed")


def settings(config: EigenpruneConfig, allocation: str) -> dict[str, Any]:
    """Of a report."""
    return {name: getattr(config, name) for name in SETTINGS} | {"allocation": allocation, "skip": list(config.skip)}


def layer_reports(
    selection: Selection, choices: Mapping[str, Choice], config: EigenpruneConfig, kept: Mapping[str, tuple[int, int]]
) -> Iterator[LayerReport]:
    """One for every linear layer of the model; `kept` has the shape of what is left of those that lost channels."""
    for name, shape in selection.shapes.items():
        choice = choices.get(name)
        left = kept.get(name, shape)
        if choice is None:
            yield LayerReport(name, shape, "dense", min(shape), shape[0] * shape[1], None, selection.skipped[name])
        elif choice.rank == 0:
            reason = "channels removed" if name in kept else _dense_reason(choice, config)
            parameters = left[0] * left[1]
            yield LayerReport(name, shape, "dense", min(left), parameters, choice.loss, reason, None, kept.get(name))
        else:
            parameters = factored_parameters(choice.rank, *left, config.layout)
            yield LayerReport(
                name, shape, config.layout, choice.rank, parameters, choice.loss, "", None, kept.get(name)
            )


def _dense_reason(choice: Choice, config: EigenpruneConfig) -> str:
    if not choice.forced:
        return "worth all its cost"
    return "no rank is cheaper and as fast" if config.faster_at else "no rank is cheaper"


def kept_shapes(model: nn.Module, dense: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """(out, in) of the layers of `model` that have lost channels, given what they had."""
    found = {}
    for name, shape in dense.items():
        now = layer_shape(model.get_submodule(name))
        if now != shape:
            found[name] = now
    return found


def make_savable(model: nn.Module, config: EigenpruneConfig, report: PruneReport, biases: Sequence[str] = ()) -> None:
    """Give a transformers model the quantizer that saves it, found through transformers' own table."""
    from transformers import PreTrainedModel
    from transformers.quantizers.auto import AutoHfQuantizer

    if not isinstance(model, PreTrainedModel):
        return
    modules = {name: [module.layout, module.rank] for name, module in low_rank_layers(model).items()}
    shapes = {layer.name: [*layer.kept_shape, *layer.shape] for layer in report.layers if layer.kept_shape is not None}
    provenance = base_facts(model) | {"calibration": report.calibration, "keep": report.keep, "versions": versions()}
    names = [Path(text).name for text in config.texts or ()]
    if names and report.calibration.get("source") == ", ".join(names):  # and not texts or windows of the caller
        provenance["texts"] = names
    source = report.calibration.get("source")
    saved = replace(
        config,
        texts=None,
        calibration=source if source in SOURCES else None,
        modules=modules,
        shapes=shapes,
        biases=biases,
        provenance=provenance,
        allocation=report.settings["allocation"],
    )
    quantizer = AutoHfQuantizer.from_config(saved, pre_quantized=True)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def model_size(model: nn.Module) -> tuple[int, int]:
    """(parameters, bytes on disk of parameters and saved buffers), shared ones once."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return parameters, sum(map(tensor_bytes, tensors.values()))
