# SPDX-License-Identifier: Apache-2.0
"""The quantizer plug-in: prune on load, save, and load again with plain `from_pretrained`."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from eigenprune.config import QUANT_METHOD, EigenpruneConfig
from eigenprune.errors import CheckpointError
from eigenprune.hub.checkpoint import check_factor_files, check_places, check_plain_files
from eigenprune.hub.delta_loading import MergedFile
from eigenprune.layers import (
    LowRankLinear,
    dense_weight,
    is_conv1d,
    is_dense,
    layer_shape,
    low_rank_layers,
    quantised_linears,
    replace_module_,
    to_dense_,
    with_shape,
)
from eigenprune.quantize import StoredWeight, finish_stored_, plain_state_, require_torchao


class EigenpruneHfQuantizer(HfQuantizer):
    """What transformers calls at each step of loading and saving."""

    quantization_config: EigenpruneConfig
    merged: MergedFile | None = None  # of a sparse delta, while it is loaded

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_kwargs: Any
    ) -> None:
        """Put empty factored layers in before any weight is read; the meta device and the dtype are set here."""
        if not self.pre_quantized:
            return
        if self.quantization_config.delta:
            self.merged = MergedFile(self.quantization_config.delta, checkpoint_files)
            return
        biases = {}
        for saved_name in self.quantization_config.biases:
            name = _name_in(model, saved_name)
            if name is not None:
                biases[saved_name] = give_bias_(model.get_submodule(name), saved_name)
        plain = {f"{name}.bias": [size] for name, size in biases.items()}
        for saved_name, (out, inside, *before) in self.quantization_config.shapes.items():
            name = _name_in(model, saved_name)
            if name is None:
                continue
            smaller = smaller_layer(model.get_submodule(name), saved_name, (out, inside), before)
            replace_module_(model, name, smaller)
            if saved_name not in self.quantization_config.modules:
                plain[f"{saved_name}.weight"] = list(smaller.get_parameter("weight").shape)
        layers = {}
        for saved_name, (layout, rank) in self.quantization_config.modules.items():
            name = _name_in(model, saved_name)
            if name is None:
                continue
            layers[saved_name] = empty_factored_layer(model.get_submodule(name), saved_name, layout, rank)
            replace_module_(model, name, layers[saved_name])
        quantised = self._put_stored_weights(model)
        for saved_name in quantised:
            plain.pop(f"{saved_name}.weight", None)
        if checkpoint_files is not None:
            config: Any = model.config
            check_places(checkpoint_files, config.name_or_path)
            named = self.quantization_config.modules.keys() | self.quantization_config.quantized.keys()
            unnamed = check_factor_files(checkpoint_files, layers | quantised) - named
            _refuse_unnamed(model, unnamed)
            check_plain_files(checkpoint_files, plain)
        replaced = self.quantization_config.modules.keys() or self.quantization_config.quantized.keys()
        if replaced:
            _ignore_sentinel(model, replaced)

    def _put_stored_weights(self, model: nn.Module) -> dict[str, nn.Module]:
        """Put what the files hold of quantised weights in their place; by saved name those that are no factors."""
        entries = self.quantization_config.quantized
        if entries:
            require_torchao("a model with quantised weights")
        alone: dict[str, nn.Module] = {}
        for saved_name, (bits, group) in entries.items():
            name = _name_in(model, saved_name)
            if name is None:
                continue
            stored = StoredWeight(model.get_submodule(name), saved_name, bits, group)
            replace_module_(model, name, stored)
            if not isinstance(model.get_submodule(name.rpartition(".")[0]), LowRankLinear):
                alone[saved_name] = stored
        return alone

    def _process_model_after_weight_loading(self, model: nn.Module, **_kwargs: Any) -> nn.Module:
        """Prune, where a dense checkpoint was loaded with an `EigenpruneConfig`; rebuild quantised weights."""
        finish_stored_(model)
        if not self.pre_quantized and not low_rank_layers(model):
            from eigenprune.prune import prune_

            # No way back is kept: if pruning fails, loading fails, and the model is dropped.
            prune_(model, self.quantization_config, restore_on_error=False)
        if self.merged is not None:
            self.merged.finish(model)
            self.merged = None
            # What came out is an ordinary model, and is saved as one.
            self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
            for module in model.modules():
                config: Any = getattr(module, "config", None)
                if hasattr(config, "_is_quantized"):
                    del config._is_quantized
        # Where the weights are plain floating-point numbers, .half(), .float() and full fine-tuning may go ahead.
        model.is_quantized = bool(quantised_linears(model))  # type: ignore[assignment]
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors to save. Layout, rank and bits of every layer go into the config as they are now."""
        modules = {name: [module.layout, module.rank] for name, module in low_rank_layers(model).items()}
        self.quantization_config.modules = modules
        self.quantization_config.shapes = {
            name: [*layer_shape(model.get_submodule(name)), *entry[2:]]
            for name, entry in self.quantization_config.shapes.items()
            if _has(model, name) and layer_shape(model.get_submodule(name)) != tuple(entry[2:])
        }
        self.quantization_config.biases = [
            name for name in self.quantization_config.biases if _has(model, name) and _has_bias(model, name)
        ]
        tensors = dict(model.state_dict())
        self.quantization_config.quantized = plain_state_(tensors, model)
        if not self.quantization_config.quantized:  # not yet, or not any more
            self.quantization_config.bits = None
        replaced = modules.keys() or self.quantization_config.quantized.keys()
        if replaced:
            tensors[_sentinel(replaced)] = torch.empty(0, dtype=next(model.parameters()).dtype)
        # No metadata of our own: more than one entry makes the order in the header, and so the file's hash, random.
        return tensors, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        self.quantization_config.quantized = {}
        to_dense_(model)
        for name, (*_, out, inside) in self.quantization_config.shapes.items():
            # Channels that are not there write nothing: zero columns read them.
            replace_module_(model, name, with_shape(model.get_submodule(name), (out, inside)))
        self.quantization_config.shapes = {}
        return model

    def is_serializable(self) -> bool:
        """Factors are plain tensors: yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are plain parameters: yes; around quantised ones, adapters are."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The whole model may be trained, not adapters only, unless it is quantised."""
        return not self.quantization_config.quantized

    @property
    def is_compileable(self) -> bool:
        """`generate` may compile the model."""
        return True


def give_bias_(dense: nn.Module, name: str) -> int:
    """Give a dense layer without a bias an empty one, on its device and in its dtype; returns its size.

    Raises:
        CheckpointError: the config lies about this layer.
    """
    if not is_dense(dense):
        raise CheckpointError(f"the config gives {name} a bias, but in this model it is a {type(dense).__name__}")
    weight = dense_weight(dense)
    if getattr(dense, "bias", None) is None:
        dense.bias = nn.Parameter(torch.empty(weight.shape[0], device=weight.device, dtype=weight.dtype))
    return int(weight.shape[0])


def smaller_layer(dense: nn.Module, name: str, shape: tuple[int, int], before: Sequence[int]) -> nn.Module:
    """A dense layer with fewer channels in place of `dense`, on its device and in its dtype.

    Raises:
        CheckpointError: the config lies about this layer.
    """
    if not is_dense(dense):
        raise CheckpointError(f"the config says that {name} lost channels, but here it is a {type(dense).__name__}")
    if layer_shape(dense) != tuple(before):
        raise CheckpointError(
            f"the config says that {name} was {before[0]} x {before[1]} before it lost channels, but in this model it "
            f"is {layer_shape(dense)[0]} x {layer_shape(dense)[1]}"
        )
    return with_shape(dense, shape)


def empty_factored_layer(dense: nn.Module, name: str, layout: str, rank: int) -> LowRankLinear:
    """A factored layer without values in place of `dense`, on its device and in its dtype.

    Raises:
        CheckpointError: the config lies about this layer.
    """
    if not is_dense(dense):
        raise CheckpointError(
            f"the config says that {name} is factored, but in this model it is a {type(dense).__name__}"
        )
    out_features, in_features = dense_weight(dense).shape
    if rank > min(out_features, in_features):
        raise CheckpointError(
            f"the config gives {name} rank {rank}, more than the {out_features} x {in_features} weight has"
        )
    return LowRankLinear(
        in_features,
        out_features,
        rank,
        layout=layout,
        bias=dense.bias is not None,
        conv1d=is_conv1d(dense),
        device=dense_weight(dense).device,
        dtype=dense_weight(dense).dtype,
    )


def _name_in(model: nn.Module, saved_name: str) -> str | None:
    """The name in `model` of a layer saved under `saved_name`; None for a layer of a head that `model` does not have.

    A trunk loaded from a checkpoint with a head, and the other way round, differ by a prefix.

    Raises:
        CheckpointError: there is no such layer.
    """
    prefix = f"{model.base_model_prefix}."
    for name in (saved_name, prefix + saved_name, saved_name.removeprefix(prefix)):
        if _has(model, name):
            return name
    config: Any = model.config
    other_class = type(model).__name__ not in (config.architectures or [type(model).__name__])
    if other_class and not saved_name.startswith(prefix):
        return None
    raise CheckpointError(
        f"the config says that {saved_name} is factored or quantised, but {type(model).__name__} has no such layer"
    )


def _has_bias(model: nn.Module, name: str) -> bool:
    return getattr(model.get_submodule(name), "bias", None) is not None


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _refuse_unnamed(model: nn.Module, names: set[str]) -> None:
    """Refuse a checkpoint with factors of a layer that stays dense by its config: it would get random weights.

    Raises:
        CheckpointError: there is such a layer.
    """
    prefix = f"{model.base_model_prefix}."
    for saved_name in sorted(names):
        for name in (saved_name, prefix + saved_name, saved_name.removeprefix(prefix)):
            if _has(model, name) and is_dense(model.get_submodule(name)):
                raise CheckpointError(
                    f"the checkpoint holds factors of {saved_name}, or its weight in few bits, which its config does "
                    "not name"
                )


def _sentinel(modules: Iterable[str]) -> str:
    """The dense name under which a zero-size tensor is saved.

    A transformers without this plug-in warns about the unknown quantization method and goes on to load random weights;
    at this tensor it meets a shape that cannot be, and stops with an error.
    """
    return f"{min(modules)}.weight"


def _ignore_sentinel(model: nn.Module, modules: Iterable[str]) -> None:
    pattern = rf"{_sentinel(modules)}$".replace(".", r"\.")
    known = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    # A list in transformers 5.0 and a set later; on the instance, so that other models of the class are not touched.
    patterns = type(known)([*known, pattern]) if known else {pattern}
    model._keys_to_ignore_on_load_unexpected = patterns  # type: ignore[assignment]


AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = EigenpruneConfig
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = EigenpruneHfQuantizer
