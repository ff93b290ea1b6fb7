# SPDX-License-Identifier: Apache-2.0
"""`PruneReport`: every layer's shape, rank, cost and loss, and where the time went."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One linear layer.

    Attributes:
        name: module name.
        shape: (out, in).
        layout: `pair`, `pivot`, or `dense`.
        rank: of the factors; the smaller side where dense.
        parameters: of the weight, kept.
        loss: estimated rise of the model's loss (nats per token for method `kfac`); None where nothing was estimated.
        reason: why it is dense, empty where it is not.
        bits: of its weight, 8 or 4; None for floating point.
        kept_shape: (out, in) of what is left, where hidden channels were removed; None where all are there.
    """

    name: str
    shape: tuple[int, int]
    layout: str
    rank: int
    parameters: int
    loss: float | None = None
    reason: str = ""
    bits: int | None = None
    kept_shape: tuple[int, int] | None = None

    @property
    def dense_parameters(self) -> int:
        """Of the weight before."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class PruneReport:
    """What `prune_` did.

    Attributes:
        layers: all linear layers in model order, the skipped ones included.
        settings: keep, method, layout, allocation and the other settings that were used.
        calibration: tokens, source and hash of the texts; empty for data-free methods.
        model_parameters: of the whole model (before, after).
        model_bytes: of all parameters and saved buffers (before, after).
        seconds: {stage: seconds}.
        removal: the `RemovalReport`, where components were first removed for a task.
        recovery: what `recover_` reports, where it was asked for; empty otherwise.
    """

    layers: tuple[LayerReport, ...]
    settings: dict[str, Any]
    calibration: dict[str, Any]
    model_parameters: tuple[int, int]
    model_bytes: tuple[int, int]
    seconds: dict[str, float] = field(default_factory=dict)
    removal: Any = field(default=None, repr=False)
    recovery: dict[str, Any] = field(default_factory=dict)

    @property
    def chosen(self) -> tuple[LayerReport, ...]:
        """The layers that the budget counts."""
        return tuple(layer for layer in self.layers if layer.loss is not None)

    @property
    def keep(self) -> float:
        """Kept fraction of the parameters of the layers that the budget counts."""
        dense = sum(layer.dense_parameters for layer in self.chosen)
        return sum(layer.parameters for layer in self.chosen) / dense if dense else 1.0

    @property
    def loss(self) -> float:
        """The estimated rise of the loss in all layers together."""
        return sum(layer.loss or 0.0 for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(replace(self, removal=None)) | {"keep": self.keep, "loss": self.loss}
        return values | {"removal": None if self.removal is None else self.removal.to_dict()}


def dense_reports(
    shapes: Mapping[str, tuple[int, int]], skipped: Mapping[str, str], removed: Mapping[str, int]
) -> tuple[LayerReport, ...]:
    """The layers of a model that lost components for a task, `removed` by name, and none of its ranks."""
    found = []
    for name, shape in shapes.items():
        count = removed.get(name, 0)
        reason = f"{count} components removed" if count else skipped.get(name, "no component removed")
        found.append(LayerReport(name, shape, "dense", min(shape), shape[0] * shape[1], None, reason))
    return tuple(found)
