# SPDX-License-Identifier: Apache-2.0
"""Biases that a layer did not have before: the config of a saved model names them, or loading would drop them."""

from collections.abc import Sequence

from torch import nn

from eigenprune.config import EigenpruneConfig
from eigenprune.layers.dense import is_dense
from eigenprune.report import base_facts, versions

REMOVING = "eigenprune"  # the method that gives them


def without_bias(model: nn.Module) -> set[str]:
    """The dense layers of `model` that have none."""
    return {name for name, module in model.named_modules() if is_dense(module) and module.bias is None}


def name_biases_(model: nn.Module, layers: Sequence[str]) -> None:
    """Let a transformers model say, when it is saved, that these layers were given a bias.

    Its `save_pretrained` then writes a checkpoint that plain `from_pretrained` reads back whole. A model of another
    kind, and no layer, are left alone.
    """
    from transformers import PreTrainedModel
    from transformers.quantizers.auto import AutoHfQuantizer

    if not layers or not isinstance(model, PreTrainedModel):
        return
    held = _config(model)
    if held is not None:
        held.biases = list(dict.fromkeys([*held.biases, *layers]))
        return
    provenance = base_facts(model) | {"versions": versions()}
    config = EigenpruneConfig(method=REMOVING, keep=1.0, biases=list(layers), provenance=provenance)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def forget_biases_(model: nn.Module, layers: Sequence[str]) -> None:
    """Undo `name_biases_` with the same layers; a config that says nothing else then goes too."""
    held = _config(model)
    if held is None or not layers:
        return
    held.biases = [name for name in held.biases if name not in layers]
    if not held.biases and not held.modules and held.method == REMOVING:
        model.hf_quantizer.remove_quantization_config(model)  # type: ignore[union-attr, operator]


def _config(model: nn.Module) -> EigenpruneConfig | None:
    """The config by which this package saves the model."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return config if isinstance(config, EigenpruneConfig) else None
