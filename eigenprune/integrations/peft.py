# SPDX-License-Identifier: Apache-2.0
"""LoRA of the peft library around factored layers, with an exact merge.

Imported by `eigenprune.integrations.peft_hook` when the first adapter is made. `get_peft_model` with ordinary
`target_modules=["q_proj"]` puts a `LoraLowRankLinear` around a factored `q_proj`, and so does every way to load an
adapter. There are two places for an adapter:

* *Around* a factored layer (its name as a target): the adapter can leave the subspace that pruning kept. LoRA only,
  with rsLoRA, DoRA, MiCA, VeLoRA, MonteCLoRA, aLoRA, BD-LoRA and X-LoRA over several, and the initialisations default,
  gaussian, orthogonal, EVA, MiCA and PiSSA. Merging makes the rank grow by that of the adapter; `truncate_merged_` of
  `eigenprune.integrations.merging` cuts it back. DoRA multiplies the factors out at every forward.
* *Inside*, on the plain Linears `right` and `left` that the layer is made of (those names as targets, or "all-linear"):
  every tuner that works on a Linear, peft's own code, merged into the factors. The rank never grows, and the adapter
  cannot leave the subspace. The sizes of `right` and `left` follow the rank: tuners with blocks need ranks that their
  block size divides, and those with shapes common to all layers of a name (FRoD, Shadow) need equal ranks.

Refused, with a `ConfigError`, before the model is touched:

* around a factored layer: every tuner but LoRA, since each adds to `layer.weight.data`, which here is a temporary.
  Those of peft 0.21 that go on linear layers: AdaLoRA, AdaMSS, BEFT, BOFT, C3A, DEFT, DeLoRA, FourierFT, FRoD, GLoRA,
  GraLoRA, HiRA, HRA, IA3, Lily, LoHa, LoKr, MiSS, OFT, OSF, PEANuT, Poly, PSOFT, PVeRA, RandLoRA, RoAd, Shadow, SHiRA,
  SuperTuning, TinyLoRA, UniLoRA, VBLoRA, VeRA, WaveFT. (FRoD, PVeRA, RandLoRA and VeRA look for layers on their own
  before; where they find factored ones only, theirs is the error: a ValueError, "no layer types compatible".)
* OLoRA, CorDA, LoftQ and LoRA-GA initialisation and KaSA, which subtract from `layer.weight.data`: silently without
  effect here. `target_parameters` of a factored layer, for the same reason.
* (by peft, a TypeError) Arrow, which knows plain Linears only.
* one adapter both around and inside of one layer, or an adapter around a layer that has one inside.

peft's own loaders (`PeftModel`, `AutoPeftModel`) load an adapter as it was saved. Those of transformers 5.23
(`model.load_adapter`, `AutoModel` on an adapter's folder) round it to the dtype of the model, and lose the magnitudes
of DoRA with no more than a warning, on dense models as on factored ones.

Refused when merged: aLoRA and BD-LoRA; layers offloaded to another device or to disk; factors that something
has wrapped or quantised.
"""

import copy
import functools
import warnings
from collections.abc import Mapping
from typing import Any

from peft import PeftType
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from eigenprune.errors import ConfigError
from eigenprune.integrations.lora import LoraLowRankLinear
from eigenprune.layers import LowRankLinear

# Initialisations that subtract from the base weight. PiSSA has a form of its own here.
REFUSED_INITIALISATIONS = ("olora", "corda", "loftq", "lora_ga")


def check_new_adapter(
    tuner: BaseTuner, model: nn.Module, config: Any, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Look at an adapter before it is put into a model with factored layers, and register the layer it needs.

    Raises:
        ConfigError: it would not work, or would silently do something else (see the top of this module).
    """
    factored = factored_layers(model)
    if not factored:
        return
    targeted = _Targets(tuner, model, config, state_dict)
    names = [name for name in factored if targeted(name)]
    if not names:
        return
    if config.peft_type != PeftType.LORA:
        raise ConfigError(
            f"{str(config.peft_type).removeprefix('PeftType.')} cannot be put around the factored layer {names[0]}: "
            'target the plain Linears inside it (target_modules=["right", "left"], or "all-linear"), or use LoRA'
        )
    for name in names:
        _check_lora(config, name, factored[name], targeted)
    if LowRankLinear not in (config._custom_modules or {}):
        config._register_custom_module({LowRankLinear: LoraLowRankLinear})
    _warn_of_dense_base(model)


def factored_layers(model: nn.Module) -> dict[str, LowRankLinear | LoraLowRankLinear]:
    """The factored layers of `model`, with or without an adapter around, by the name that a target would match."""
    found: dict[str, LowRankLinear | LoraLowRankLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear | LoraLowRankLinear):
            found.setdefault(name.removesuffix(".base_layer"), module)
    return found


class _Targets:
    """Whether an adapter is going to be put on a module, by its name."""

    def __init__(
        self, tuner: BaseTuner, model: nn.Module, config: Any, state_dict: Mapping[str, Tensor] | None
    ) -> None:
        self.tuner = tuner
        # With what peft fills in where no targets are given; on a copy, as peft does so again.
        self.config = tuner._prepare_adapter_config(copy.copy(config), tuner.get_model_config(model))
        self.from_state_dict = state_dict is not None
        marker = f".{tuner.prefix}"
        self.names = {key.rsplit(marker, 1)[0] for key in state_dict or {}}

    def __call__(self, name: str) -> bool:
        if self.from_state_dict:
            return name in self.names
        parameters = getattr(self.config, "target_parameters", None) or ()
        if any(f"{name}.weight" == key or f"{name}.weight".endswith(f".{key}") for key in parameters):
            return True
        if not getattr(self.config, "target_modules", None):
            return False
        return bool(self.tuner._check_target_module_exists(self.config, name))


def _check_lora(config: Any, name: str, layer: LowRankLinear | LoraLowRankLinear, targeted: _Targets) -> None:
    parameters = getattr(config, "target_parameters", None) or ()
    if any(f"{name}.weight".endswith(key) for key in parameters):
        raise ConfigError(f"{name}.weight is not a parameter but a product: name the layer in target_modules instead")
    inside = [f"{name}.{part}" for part in ("right", "left") if targeted(f"{name}.{part}")]
    if inside:
        raise ConfigError(
            f"the targets match both {name} and {inside[0]} inside it; an adapter goes around a factored layer or on "
            "its parts: make the pattern narrower"
        )
    base = layer if isinstance(layer, LowRankLinear) else None
    if base is not None and any(isinstance(child, BaseTunerLayer) for child in base.modules()):
        raise ConfigError(
            f"{name} has adapters inside it (on right or left), whose merge would be lost under one around it: "
            "merge or unload them first"
        )
    start = config.init_lora_weights.lower() if isinstance(config.init_lora_weights, str) else ""
    if start.startswith(REFUSED_INITIALISATIONS):
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} subtracts from the base weight, which on the factored "
            f"layer {name} would silently be lost: use 'pissa', True, 'gaussian', 'orthogonal' or 'eva'"
        )
    if getattr(config, "kasa_config", None) is not None:
        raise ConfigError(f"KaSA truncates the base weight; {name} is truncated already: use LoRA or PiSSA")
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    if start.startswith("pissa") and base is not None and rank >= base.rank:
        raise ConfigError(f"PiSSA needs an adapter of a rank below that of {name}, which is {base.rank}, not {rank}")


def _warn_of_dense_base(model: nn.Module) -> None:
    """Warn where an adapter will name the dense model as its base, on which it would later be loaded."""
    quantizer, path = getattr(model, "hf_quantizer", None), getattr(getattr(model, "config", None), "name_or_path", "")
    provenance = getattr(getattr(quantizer, "quantization_config", None), "provenance", None) or {}
    base = provenance.get("base_model")
    if base and path and str(path).rstrip("/").endswith(str(base)):
        warnings.warn(
            f"this model was pruned since it was loaded, and adapters saved from it will name the dense {base} as "
            "their base model. To save adapters, first save the pruned model and load that; to merge them, go on",
            stacklevel=2,
        )


def _install() -> None:
    """Put our way of placing a layer in front of peft's, once."""
    replace = LoraModel._replace_module
    if getattr(replace, "wrapped_by_eigenprune", False):
        return

    @functools.wraps(replace)
    def replace_module(self: LoraModel, parent: nn.Module, name: str, new: nn.Module, child: nn.Module) -> None:
        # peft asks `child.weight` for its device 18 times a layer, and each time that is a product of the factors. The
        # parts of the new layer are on that device already.
        if isinstance(child, LowRankLinear) and isinstance(new, LoraLowRankLinear):
            setattr(parent, name, new)
        else:
            replace(self, parent, name, new, child)  # type: ignore[no-untyped-call]

    replace_module.wrapped_by_eigenprune = True  # type: ignore[attr-defined]
    LoraModel._replace_module = replace_module  # type: ignore[method-assign]


_install()
