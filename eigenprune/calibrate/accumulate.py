# SPDX-License-Identifier: Apache-2.0
"""Hooks that sum the statistics of layers while a model runs forward and backward."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from eigenprune.calibrate.gram import GramSum, clip_norms_
from eigenprune.errors import WeightError
from eigenprune.layers import dense_weight

# Gradients near the ends of a window are unlike the rest: the first positions lack context, and the last are read by
# few later ones. KFAC-SVD (the LEMS code, 2026) drops an eighth at each end and clips the norms of outliers.
EDGE = 1 / 8
CLIP = (0.1, 10.0)


class Accumulator:
    """Float32 sums over tokens for one pass.

    Args:
        layers: every measured layer by name.
        inputs: the layers whose inputs are summed.
        outputs: the layers whose output gradients are summed.
        kinds: what to sum, see `collect_statistics`.
        drop_edges: whether output Grams leave out the ends of a window.
        clip: whether they clip the norms of outliers.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        inputs: Sequence[str],
        outputs: Sequence[str],
        kinds: Sequence[str],
        drop_edges: bool,
        clip: bool = True,
    ) -> None:
        self.layers, self.inputs, self.outputs = layers, inputs, outputs
        self.drop_edges, self.clip = drop_edges, clip
        self.grams: dict[str, GramSum] = {}
        self.plain: dict[str, Tensor] = {}  # sums that are no Gram
        self.counts: dict[str, int] = {}
        self._recomputing = False
        for layer in inputs:
            width = dense_weight(layers[layer]).shape[1]
            self._gram(f"input_gram.{layer}", layer, width)
            self._zeros(f"input_mean.{layer}", layer, width)
            self._zeros(f"input_abs_mean.{layer}", layer, width)
        for layer in outputs:
            height, width = dense_weight(layers[layer]).shape
            if "output_gram" in kinds:
                self._gram(f"output_gram.{layer}", layer, height)
            if "weight_gradient" in kinds:
                self._zeros(f"weight_gradient.{layer}", layer, height, width)
                self._zeros(f"output_gradient_mean.{layer}", layer, height)
            if "weight_gradient_square" in kinds:
                self._zeros(f"weight_gradient_square.{layer}", layer, width)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, forward and backward passes of the layers add to the sums."""
        handles = [self.layers[layer].register_forward_pre_hook(self._input_hook(layer)) for layer in self.inputs]
        handles += [self.layers[layer].register_forward_hook(self._output_hook(layer)) for layer in self.outputs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """While inside, layers that run again (gradient checkpointing does, in backward) add nothing twice."""
        self._recomputing = True
        try:
            yield
        finally:
            self._recomputing = False

    def check_finite(self, window: int) -> None:
        """Raise WeightError if a sum is no longer finite, naming the layer and the window."""
        probes = {name: sum(block.diagonal(offset=block.shape[1] - block.shape[0]).sum() for block in gram.blocks)
                  for name, gram in self.grams.items()}  # fmt: skip
        probes |= {name: total.sum() for name, total in self.plain.items()}
        for name, probe in probes.items():
            if not torch.isfinite(torch.as_tensor(probe)):
                kind, _, layer = name.partition(".")
                raise WeightError(
                    f"{layer}: NaN or infinity in its {kind.replace('_', ' ')} at calibration window {window}; "
                    "check the weights, or load the model in float32 or bfloat16"
                )

    def tensors(self) -> dict[str, Tensor]:
        """All sums by name, Grams as `NAME/block number`: what a half-finished run saves and loads again."""
        blocks = {f"{name}/{i}": block for name, gram in self.grams.items() for i, block in enumerate(gram.blocks)}
        return blocks | self.plain

    def to_means_(self) -> dict[str, Tensor]:
        """Divide every sum by its tokens, in place, and return what `tensors` does."""
        for name, tensor in self.tensors().items():
            tensor.div_(max(1, self.counts[name.partition("/")[0]]))
        return self.tensors()

    def _gram(self, name: str, layer: str, width: int) -> None:
        self.grams[name] = GramSum(width, dense_weight(self.layers[layer]).device)
        self.counts[name] = 0

    def _zeros(self, name: str, layer: str, *shape: int) -> None:
        self.plain[name] = torch.zeros(shape, device=dense_weight(self.layers[layer]).device)
        self.counts[name] = 0

    def _input_hook(self, layer: str) -> Callable[..., None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._recomputing:
                return
            with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
                rows = args[0].detach().flatten(0, -2).float()
                self.grams[f"input_gram.{layer}"].add(rows)
                self.plain[f"input_mean.{layer}"] += rows.sum(0)
                self.plain[f"input_abs_mean.{layer}"] += torch.linalg.vector_norm(rows, 1, dim=0)
            for kind in ("input_gram", "input_mean", "input_abs_mean"):
                self.counts[f"{kind}.{layer}"] += rows.shape[0]

        return add

    def _output_hook(self, layer: str) -> Callable[..., None]:
        def watch(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad and not self._recomputing:
                wanted = (f"weight_gradient.{layer}", f"weight_gradient_square.{layer}")
                x = args[0].detach() if any(name in self.plain for name in wanted) else None
                output.register_hook(lambda gradient: self._add_output(layer, gradient, x))

        return watch

    @torch.no_grad()
    def _add_output(self, layer: str, gradient: Tensor, x: Tensor | None) -> None:
        with torch.autocast(gradient.device.type, enabled=False):
            if x is not None and f"weight_gradient_square.{layer}" in self.plain:
                square = (gradient.flatten(0, -2).float().t() @ x.flatten(0, -2).float()).square()
                self.plain[f"weight_gradient_square.{layer}"] += square.mean(0)
                self.counts[f"weight_gradient_square.{layer}"] += 1
            if x is not None and f"weight_gradient.{layer}" in self.plain:
                rows = gradient.flatten(0, -2).float()
                self.plain[f"weight_gradient.{layer}"].addmm_(rows.t(), x.flatten(0, -2).float())
                self.plain[f"output_gradient_mean.{layer}"] += rows.sum(0)
                self.counts[f"weight_gradient.{layer}"] += rows.shape[0]
                self.counts[f"output_gradient_mean.{layer}"] += rows.shape[0]
            if f"output_gram.{layer}" in self.grams:
                if gradient.ndim > 2:
                    gradient = gradient[:, inner_positions(gradient.shape[1], self.drop_edges)]
                rows = gradient.flatten(0, -2).to(torch.float32, copy=True)
                if self.clip:
                    clip_norms_(rows, *CLIP)
                self.grams[f"output_gram.{layer}"].add(rows)
                self.counts[f"output_gram.{layer}"] += rows.shape[0]


def inner_positions(window: int, drop_edges: bool) -> slice:
    """The positions of a window whose output gradients count."""
    edge = int(window * EDGE) if drop_edges else 0
    return slice(edge, window - edge)
