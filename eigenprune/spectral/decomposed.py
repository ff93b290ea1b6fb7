# SPDX-License-Identifier: Apache-2.0
"""The components of all layers by one method: made where they are asked for, or kept on disk for the next budget."""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from eigenprune.calibrate import Statistics
from eigenprune.calibrate.cache import save_tensors
from eigenprune.layers import LowRankLinear, dense_weight
from eigenprune.spectral.decompose import Components, Spectrum
from eigenprune.spectral.factored import layer_of_factors
from eigenprune.spectral.methods import Method
from eigenprune.spectral.metric import Metric, layer_metric
from eigenprune.spectral.ordered import ordered_components, ordered_spectrum

MOST_BYTES = 8 << 30  # of components kept on disk: a model of 2 billion parameters


class Decomposed:
    """The spectra and components of layers in the metric of a method.

    With a folder, every layer is decomposed once: its energies and all its components, these in float32, go to disk,
    and another budget reads them. Without one, nothing is kept, and components are made a second time when a layer is
    factored: the smallest memory.

    Args:
        method: the row.
        statistics: what its metric is made of; None for methods without any.
        seed: of random orders.
        folder: named after all that the components depend on; None keeps nothing.
    """

    def __init__(
        self, method: Method, statistics: Statistics | None, seed: int = 0, folder: Path | None = None
    ) -> None:
        self.method, self.statistics, self.seed, self._folder = method, statistics, seed, folder

    @property
    def folder(self) -> Path | None:
        """Where components are kept, also for what is made of them; None keeps nothing."""
        return self._folder

    def metric(self, name: str, module: nn.Module) -> Metric:
        """The metric in which the dense `module` is decomposed."""
        return self._metric(name, dense_weight(module).detach())

    def spectrum(self, name: str, module: nn.Module) -> Spectrum:
        """The energies of the dense `module`, in the order in which its components are kept."""
        weight = dense_weight(module).detach()
        if self._folder is None:
            return ordered_spectrum(self.method, weight, self._metric(name, weight), name, self.seed, self.statistics)
        kept = self._read(name, weight, ("energies",)) or self._make(name, weight)
        return Spectrum(kept["energies"].double())

    def components(self, name: str, module: nn.Module, rank: int) -> Components:
        """The first `rank` components of the dense `module`, float64."""
        weight = dense_weight(module).detach()
        if self._folder is None:
            return ordered_components(
                self.method, weight, self._metric(name, weight), rank, name, self.seed, self.statistics
            )
        kept = self._read(name, weight, ("left", "right")) or self._make(name, weight)
        left, right = kept["left"][:, :rank], kept["right"][:rank]
        return Components(left.to(weight.device).double(), right.to(weight.device).double())

    def layer(self, name: str, module: nn.Module, rank: int, layout: str) -> LowRankLinear:
        """The layer that keeps the first `rank` components of the dense `module`, in its dtype."""
        return layer_of_factors(module, *self.components(name, module, rank).truncated(rank), layout)

    def _metric(self, name: str, weight: Tensor) -> Metric:
        return layer_metric(self.method, self.statistics, name, weight.device)

    def _make(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        metric = self._metric(name, weight)
        found = ordered_components(self.method, weight, metric, min(weight.shape), name, self.seed, self.statistics)
        # right = U^T R W, so that its rows times S have the singular values of R W S as norms.
        energies = metric.inner.right_multiply(found.right).square().sum(1)
        made = {
            "energies": energies.cpu(),
            "left": found.left.float().cpu().contiguous(),
            "right": found.right.float().cpu().contiguous(),
        }
        file = self._file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(made, file)
        return made

    def _read(self, name: str, weight: Tensor, wanted: tuple[str, ...]) -> dict[str, Tensor] | None:
        """The tensors `wanted` that are on disk; a file that is damaged or of another shape is dropped."""
        file = self._file(name)
        (m, n), k = weight.shape, min(weight.shape)
        shapes = {"energies": [k], "left": [m, k], "right": [k, n]}
        try:
            with safe_open(file, framework="pt") as opened:
                found = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118 - no mapping
                if found == shapes:
                    return {key: opened.get_tensor(key) for key in wanted}
        except FileNotFoundError:
            return None
        except SafetensorError:
            pass
        file.unlink()
        return None

    def _file(self, name: str) -> Path:
        if self._folder is None:
            raise FileNotFoundError("no folder for components")
        return self._folder / f"{sha256(name.encode()).hexdigest()[:16]}.safetensors"


def component_bytes(layers: Mapping[str, nn.Module]) -> int:
    """What all components of `layers` take on disk, in bytes."""
    shapes = [dense_weight(module).shape for module in layers.values()]
    return sum(torch.finfo(torch.float32).bits // 8 * min(shape) * (shape[0] + shape[1] + 2) for shape in shapes)
