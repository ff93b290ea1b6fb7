# SPDX-License-Identifier: Apache-2.0
"""peft's LoRA layer around a factored layer: what writes weights is other than around a Linear, all else is peft's."""

import warnings
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from eigenprune.errors import ConfigError, WeightError
from eigenprune.integrations.merging import Delta, full_factors, merged_layer, principal_split, set_factors_
from eigenprune.layers import LowRankLinear, is_conv1d

# Variants whose merged weight is that of a plain LoRA.
PLAIN_VARIANTS = ("MiCALinearVariant", "VeloraLinearVariant", "MontecloraLinearVariant")
DORA_VARIANT = "DoraLinearVariant"


class LoraLowRankLinear(lora.Linear):  # type: ignore[misc, unused-ignore]
    """LoRA around a `LowRankLinear`: everything as in peft's own layer around a Linear, but for what writes weights.

    Merging puts another layer in the place of `base_layer` and keeps the old one, so that unmerging is exact. While an
    adapter is merged, both are in memory.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not isinstance(base_layer, LowRankLinear) or kwargs.get("parameter_name") is not None:
            raise ConfigError(f"an adapter cannot be put around {type(base_layer).__name__} in this way")
        self._unmerged: list[LowRankLinear] = []  # a list, so that it is no submodule: neither saved nor trained
        self._merged_deltas: list[Delta] = []
        super().__init__(base_layer, adapter_name, *args, **kwargs)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether `base_layer.weight` reads as [in, out]; the layer knows, whatever the config says."""
        base = self.get_base_layer()
        return base.conv1d if isinstance(base, LowRankLinear) else is_conv1d(base)

    @fan_in_fan_out.setter
    def fan_in_fan_out(self, value: bool) -> None:
        pass  # peft sets what the config says

    def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        weight = base_layer.right.weight if isinstance(base_layer, LowRankLinear) else base_layer.weight
        return weight.device, weight.dtype  # type: ignore[return-value]

    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """Move the leading singular components of the weight into the adapter (PiSSA, arXiv 2404.02948).

        The layer keeps the others, at a rank smaller by that of the adapter; merging gives the old rank back. It is
        exact, so the number of iterations in `pissa_niter_4` does not matter. As in peft, the layer stays changed when
        the adapter is disabled or deleted, and an adapter saved as it is needs the same base to be loaded on.

        Raises:
            ConfigError: the rank of the adapter is not below that of the layer, or another adapter is merged.
        """
        base, count = self.get_base_layer(), self.r[adapter_name]
        if self.merged or not isinstance(base, LowRankLinear):
            raise ConfigError("PiSSA changes the base layer: unmerge the other adapters first")
        check_factors_plain(base)
        if count >= base.rank:
            raise ConfigError(f"PiSSA needs an adapter of a rank below the layer's {base.rank}, not {count}")
        left, right, other_left, other_right = principal_split(base, count)
        adapter_a, adapter_b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        root = self.scaling[adapter_name] ** 0.5
        adapter_a.data = (right / root).to(adapter_a.device, adapter_a.dtype)  # on meta, values are still to be loaded
        adapter_b.data = (left / root).to(adapter_b.device, adapter_b.dtype)
        set_factors_(base, other_left, other_right)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (default: the active ones) into the base layer, exactly; its rank grows by theirs.

        Args:
            safe_merge: no matter here: what is not finite is always refused.
            adapter_names: which.

        Raises:
            ConfigError: an adapter is of a kind that has no merged form, or the factors are not plain tensors.
            WeightError: an adapter holds NaN or infinity, or the layer is offloaded.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base = self._unmerged[0] if self._unmerged else self.get_base_layer()
        if not isinstance(base, LowRankLinear):
            raise ConfigError(f"the base layer has become a {type(base).__name__} behind the adapter's back")
        check_factors_plain(base)
        deltas = self._merged_deltas + [self._delta(name, base) for name in names]
        self.base_layer = merged_layer(base, deltas)
        self._unmerged, self._merged_deltas = [base], deltas
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the layer from before the first merge back: the same module, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        self.base_layer = self._unmerged[0].to(device=device, dtype=dtype).train(self.training)
        self._unmerged, self._merged_deltas = [], []
        self.merged_adapters.clear()

    def _delta(self, name: str, base: LowRankLinear) -> Delta:
        """What adapter `name` does to the weight of `base`."""
        variant = type(self.lora_variant[name]).__name__ if name in self.lora_variant else None
        if variant not in (None, DORA_VARIANT, *PLAIN_VARIANTS):
            raise ConfigError(
                f"adapter {name!r} is of a kind ({variant}) that has no merged form around a factored layer: use it "
                "unmerged"
            )
        device, scaling = base.right.weight.device, self.scaling[name]

        def read(owner: nn.Module, part: str = "weight") -> Tensor:
            return owner.get_parameter(part).detach().to(device, torch.float64)

        left, right = read(self.lora_B[name]) * scaling, read(self.lora_A[name])
        bias = read(self.lora_B[name], "bias") * scaling if self.lora_bias[name] else None
        scale = None
        if variant == DORA_VARIANT:
            # As in `forward`, the norms are those of the layer without any other adapter.
            base_left, base_right = full_factors(base)
            norms = torch.linalg.vector_norm(base_left @ base_right + left @ right, dim=1)
            scale = read(self.lora_magnitude_vector[name]) / norms
        return Delta.of(left, right, scale, bias)


def check_factors_plain(layer: LowRankLinear) -> None:
    """Check that the factors of `layer` are there to be read: plain tensors of plain Linears.

    Raises:
        ConfigError: a child is wrapped or quantised.
        WeightError: a factor is offloaded.
    """
    for name, child in (("right", layer.right), ("left", layer.left)):
        if type(child) is not nn.Linear or type(child.weight.data) is not Tensor:
            raise ConfigError(
                f"the factor {name!r} of this layer is wrapped or quantised ({type(child).__name__}, "
                f"{type(child.weight).__name__}): unload or dequantise it before a merge"
            )
        hook = getattr(child, "_hf_hook", None)
        if child.weight.device.type == "meta" or getattr(hook, "offload", False):
            raise WeightError("the layer is offloaded: load the model into memory to merge an adapter")
