# SPDX-License-Identifier: Apache-2.0
"""Two checkpoints of one architecture side by side, read one tensor at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from eigenprune.calibrate.statistics import SafetensorsFolder
from eigenprune.config import QUANT_METHOD, EigenpruneConfig
from eigenprune.errors import CheckpointError
from eigenprune.hub.checkpoint import FACTOR_DTYPES
from eigenprune.hub.facts import weight_files
from eigenprune.hub.limits import read_json
from eigenprune.hub.model_class import empty_model
from eigenprune.layers import LowRankLinear, is_conv1d, is_dense


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a saved model, dense or pruned, by the parameter names of its class.

    Attributes:
        name: for messages: the last part of its path.
        config: its config.json.
        tensors: on disk, by the keys in the files.
        keys: parameter name to key in the files, which may lack or add the prefix of the trunk.
        pruned: {layer: [layout, rank]} of its factored layers.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    keys: Mapping[str, str]
    pruned: Mapping[str, list[Any]]

    def parameter(self, name: str) -> Tensor | None:
        """A tensor as it is stored, None if there is none."""
        return self.tensors[self.keys[name]] if name in self.keys else None

    def weight(self, layer: str, *, conv1d: bool) -> Tensor | None:
        """The weight of a linear layer as [out, in], multiplied out in float64 where it is factored."""
        if layer not in self.pruned:
            stored = self.parameter(f"{layer}.weight")
            return stored.t() if stored is not None and conv1d else stored
        left, right = self.parameter(f"{layer}.left.weight"), self.parameter(f"{layer}.right.weight")
        pivots = self.parameter(f"{layer}.pivots")
        if left is None or right is None:
            raise CheckpointError(f"{self.name} holds no factors of {layer}, which its config says is pruned")
        return LowRankLinear.from_factors(left.double(), right.double(), pivots=pivots).weight.detach()


@dataclass(frozen=True)
class Pair:
    """A base and what was tuned from it.

    Attributes:
        base, tuned: both checkpoints.
        layers: the linear layers by name in model order, and whether each is a `Conv1D`.
        others: names of all other parameters, biases included.
        tied: {one of `others`: the linear layer, not among `layers`, that has it as its weight}.
        whole: the modules of `others` that an adapter can hold whole: without parts of their own.
    """

    base: Checkpoint
    tuned: Checkpoint
    layers: Mapping[str, bool]
    others: tuple[str, ...]
    tied: Mapping[str, str]
    whole: frozenset[str]


def open_pair(base: Path, tuned: Path) -> Pair:
    """Open both, and check that they are models of one architecture, vocabulary and shape; no weight is read.

    Raises:
        CheckpointError: one is no readable safetensors checkpoint, is quantised, or the two do not fit each other.
    """
    configs = [read_json(folder / "config.json") for folder in (base, tuned)]
    _check_configs(configs, (base.name, tuned.name))
    model = _skeleton(base)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    opened = [_open(folder, config, model) for folder, config in zip((base, tuned), configs, strict=True)]
    # A tied weight is listed once, under its first name: that of the embedding, not of the linear layer.
    linear = {name: module for name, module in model.named_modules() if is_dense(module)}
    layers = {name: is_conv1d(module) for name, module in linear.items() if f"{name}.weight" in shapes}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tied = {names[id(module.weight)]: name for name, module in linear.items() if name not in layers}
    others = tuple(name for name in shapes if name.removesuffix(".weight") not in layers)
    for checkpoint, folder in zip(opened, (base, tuned), strict=True):
        _check_tensors(checkpoint, weight_files(folder), shapes)
    return Pair(opened[0], opened[1], layers, others, tied, frozenset(_whole(model, others, tied)))


def _whole(model: nn.Module, others: tuple[str, ...], tied: Mapping[str, str]) -> Iterator[str]:
    for name in others:
        owner = name.rpartition(".")[0]
        parts = any(True for child in model.get_submodule(owner).children() for _ in child.parameters())
        head = model.get_submodule(tied[name]) if name in tied else None
        if owner and not parts and getattr(head, "bias", None) is None:
            yield owner


def _check_configs(configs: list[dict[str, Any]], names: tuple[str, str]) -> None:
    for config, name in zip(configs, names, strict=True):
        method = (config.get("quantization_config") or {}).get("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise CheckpointError(f"{name} is quantised ({method}): give the model in floating point")
        if (config.get("quantization_config") or {}).get("quantized"):
            raise CheckpointError(f"{name} holds weights in few bits: give the model in floating point")
    for key, word in (("architectures", "architecture"), ("model_type", "model type"), ("vocab_size", "vocabulary")):
        one, other = (config.get(key) for config in configs)
        if one != other:
            more = ": remove the added tokens, or resize the base alike" if key == "vocab_size" else ""
            raise CheckpointError(
                f"{names[0]} and {names[1]} differ in {word} ({_word(one)} and {_word(other)}), so there is no "
                f"difference to extract{more}"
            )


def _word(value: Any) -> str:
    return str(value[0]) if isinstance(value, list) and len(value) == 1 else str(value)


def _skeleton(folder: Path) -> nn.Module:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model: nn.Module = empty_model(config)
        return model
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder.name}: transformers cannot make its model ({error})") from error


def _open(folder: Path, config: Mapping[str, Any], model: nn.Module) -> Checkpoint:
    settings = config.get("quantization_config")
    pruned = EigenpruneConfig.from_dict(settings).modules if settings else {}
    try:
        tensors = SafetensorsFolder(weight_files(folder))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder.name} is cut short or damaged: save or download it again") from error
    known = set(model.state_dict(keep_vars=True))
    for layer in pruned:
        known |= {f"{layer}.{part}" for part in ("left.weight", "right.weight", "pivots")}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    keys: dict[str, str] = {}
    for key in tensors:
        for name in (key, prefix + key, key.removeprefix(prefix)):
            if name in known:
                keys[name] = key
                break
    return Checkpoint(folder.name, config, tensors, keys, pruned)


def _check_tensors(checkpoint: Checkpoint, files: list[Path], shapes: Mapping[str, tuple[int, ...]]) -> None:
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - no dict
            stored |= {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    for name, shape in shapes.items():
        if name.removesuffix(".weight") in checkpoint.pruned:
            continue
        if name not in checkpoint.keys:
            raise CheckpointError(
                f"{checkpoint.name} holds no {name}; if its files store parameters under other names than the class "
                "of the model does, load the model with transformers and save it first"
            )
        dtype, found = stored[checkpoint.keys[name]]
        if found != shape or dtype not in FACTOR_DTYPES:
            raise CheckpointError(f"{checkpoint.name}: {name} is {list(found)} of {dtype}, not {list(shape)} of floats")
