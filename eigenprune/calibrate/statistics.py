# SPDX-License-Identifier: Apache-2.0
"""`Statistics`: what calibration measured, in memory or on disk, one tensor at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from eigenprune.calibrate.gram import unpack_gram
from eigenprune.errors import CalibrationError


@dataclass(frozen=True)
class Facts:
    """Where statistics come from, so that a report can say it.

    `tokens` were read by every layer; the gradients of `output_tokens` of them entered the output Grams. `sampling`
    says how the text was sampled from the model, and is empty for other texts.
    """

    tokens: int
    output_tokens: int
    windows: int
    window: int
    objective: str
    compute_dtype: str
    texts_hash: str
    source: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of all `*.safetensors` files of a folder, read from disk at each access and not kept."""

    def __init__(self, files: list[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                self._file_of.update(dict.fromkeys(opened.keys(), file))

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


@dataclass(frozen=True)
class Statistics:
    """Means over the calibration tokens, by layer name. Layers that read one input share its statistics.

    Attributes:
        tensors: `input_mean.X`, `weight_gradient.X`, ... to tensors, and Grams as the block rows of their lower
            triangle, `input_gram.X/0`, `input_gram.X/1`, ...; may live on disk.
        input_group: layer name to the layer whose input statistics stand for it.
        facts: tokens, objective and hash of the texts.
    """

    tensors: Mapping[str, Tensor]
    input_group: Mapping[str, str]
    facts: Facts = field(repr=False)

    def __contains__(self, layer: str) -> bool:
        return layer in self.input_group

    def input_gram(self, layer: str) -> Tensor:
        """C = mean x x^T, [in, in] float32, symmetric."""
        return self._gram("input_gram", self._group(layer))

    def input_mean(self, layer: str) -> Tensor:
        """mean x, [in] float32."""
        return self._get("input_mean", self._group(layer))

    def input_abs_mean(self, layer: str) -> Tensor:
        """mean |x|, [in] float32."""
        return self._get("input_abs_mean", self._group(layer))

    def output_gram(self, layer: str) -> Tensor:
        """F = mean g g^T, [out, out] float32, symmetric; g = gradient of the summed loss at the layer's output."""
        return self._gram("output_gram", layer)

    def weight_gradient(self, layer: str) -> Tensor:
        """G = mean g x^T, [out, in] float32."""
        return self._get("weight_gradient", layer)

    def weight_gradient_square(self, layer: str) -> Tensor:
        """Mean over windows of the mean over rows of (dL/dW)^2, [in] float32; L the summed loss of one window."""
        return self._get("weight_gradient_square", layer)

    def component_importance(self, layer: str) -> Tensor:
        """[min(out, in)]: of each singular component, the largest first, see `collect_lora_importance`."""
        return self._get("component_importance", layer)

    def output_gradient_mean(self, layer: str) -> Tensor:
        """mean g, [out] float32: the gradient of a bias."""
        return self._get("output_gradient_mean", layer)

    def _group(self, layer: str) -> str:
        try:
            return self.input_group[layer]
        except KeyError:
            raise CalibrationError(f"the statistics know no layer {layer!r}: collect them on this model") from None

    def _gram(self, kind: str, layer: str) -> Tensor:
        blocks = [self._get(kind, f"{layer}/0")]
        while f"{kind}.{layer}/{len(blocks)}" in self.tensors:
            blocks.append(self._get(kind, f"{layer}/{len(blocks)}"))
        return unpack_gram(blocks)

    def _get(self, kind: str, layer: str) -> Tensor:
        try:
            return self.tensors[f"{kind}.{layer}"]
        except KeyError:
            raise CalibrationError(
                f"the statistics hold no {kind} of {layer!r}: collect them with the kinds that this method needs"
            ) from None
