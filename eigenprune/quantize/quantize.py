# SPDX-License-Identifier: Apache-2.0
"""`quantize_`: the factors of a pruned model, and dense layers on request, in int8 or int4."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from eigenprune.config import EigenpruneConfig
from eigenprune.errors import ConfigError
from eigenprune.layers import low_rank_layers, select_layers
from eigenprune.layers.quantised import quantised_linears
from eigenprune.quantize.stored import stored_entry
from eigenprune.quantize.tensors import check_bits, quantised_weight, require_torchao
from eigenprune.report import base_facts, versions

PIVOT_WARNING = (
    "int4 on factors in layout pivot: most rows of such a layer are sums of many others, whose rounding errors add up, "
    "and the model may be of no use. Prune with layout='pair', or with budget='bytes' and bits, or take 8 bits"
)


def quantize_(model: nn.Module, bits: int | Mapping[str, int], *, dense: bool = False) -> nn.Module:
    """Quantise weights of `model` in place, weight-only, by torchao; prune, recover and merge first.

    A transformers model can then be saved with its own `save_pretrained`, and loads again with plain `from_pretrained`
    where torchao is installed (`pip install eigenprune[quantize]`). `dequantize_` of `eigenprune.layers` goes back to
    floating point, and keeps the rounding.

    Args:
        model: its factored layers are quantised: both factors of each.
        bits: 8, a scale for each row; or 4, a scale for each group of 32 in a row (16, 8 or the whole row where the
            columns are no multiple), which layout `pivot` does not survive (a warning). Or {layer: bits}, for these
            layers only, factored or dense.
        dense: also the dense layers that `prune_` would choose; not heads, tied weights and GPT-2's `Conv1D`.

    Returns:
        `model`.

    Raises:
        ConfigError: unknown bits, nothing to quantise, quantised already, a factor is wrapped (by an adapter), a dtype
            that torchao does not take, or there is no torchao.
        WeightError: a weight is on the meta device.
    """
    wanted = _layers(model, bits, dense)
    factored = low_rank_layers(model)
    if any(bits == 4 and name in factored and factored[name].layout == "pivot" for name, bits in wanted.items()):
        warnings.warn(PIVOT_WARNING, stacklevel=2)
    return quantize_layers_(model, wanted)


def quantize_layers_(model: nn.Module, wanted: Mapping[str, int]) -> nn.Module:
    """`quantize_` for {layer: bits} that were chosen by what rounding does to them: without a warning."""
    for value in wanted.values():
        check_bits(value)
    require_torchao("quantising")
    if quantised_linears(model):
        raise ConfigError("the model is quantised already; dequantize_ it first, or quantise the floating-point one")
    linears = {name: value for layer, value in wanted.items() for name in _linears(model, layer)}
    if not linears:
        raise ConfigError("there is nothing to quantise: no layer is factored; dense=True quantises dense ones")
    # All that can fail before the first layer changes.
    made = {name: quantised_weight(_weight(model, name), value) for name, value in linears.items()}
    for name, weight in made.items():
        model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    _make_savable(model, {name: stored_entry(weight) for name, weight in made.items()})
    return model


def _layers(model: nn.Module, bits: int | Mapping[str, int], dense: bool) -> dict[str, int]:
    if isinstance(bits, Mapping):
        if dense:
            raise ConfigError("name the dense layers in bits, or say dense=True with one number of bits")
        return dict(bits)
    names = list(low_rank_layers(model))
    if dense:
        names += [name for name, layer in select_layers(model).chosen.items() if type(layer) is nn.Linear]
    return dict.fromkeys(names, bits)


def _linears(model: nn.Module, layer: str) -> list[str]:
    """The Linears to quantise of one layer; a factor without entries, of a pivot layer of full rank, is none."""
    factored = low_rank_layers(model)
    if layer in factored:
        return [f"{layer}.{part}" for part in ("right", "left") if _weight(model, f"{layer}.{part}").numel()]
    return [layer]


def _weight(model: nn.Module, name: str) -> Tensor:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        raise ConfigError(f"the model has no layer {name!r} to quantise") from None
    if type(linear) is not nn.Linear:
        raise ConfigError(f"{name} is a {type(linear).__name__}, not a plain Linear: it is not quantised")
    return linear.weight


def _make_savable(model: nn.Module, entries: Mapping[str, list[int]]) -> None:
    """Let a transformers model say, when it is saved, which of its layers are quantised."""
    from transformers import PreTrainedModel
    from transformers.quantizers.auto import AutoHfQuantizer

    if not isinstance(model, PreTrainedModel):
        return
    held: Any = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if not isinstance(held, EigenpruneConfig):
        # Nothing was pruned, by no text.
        config = EigenpruneConfig(method="svd", keep=1.0, provenance=base_facts(model) | {"versions": versions()})
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
        held = config
    held.quantized = {name: list(entry) for name, entry in entries.items()}
    model.is_quantized = True  # type: ignore[assignment]
