# SPDX-License-Identifier: Apache-2.0
"""`Removal`: which components of which layers are gone, and what stands in the biases for them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


class RemovedPiece(NamedTuple):
    """One component: the `piece`-th largest of slice `slice` of `layer`, which is head `head` of kind `kind` there."""

    layer: str
    kind: str
    head: int
    piece: int


@dataclass(frozen=True)
class Removal:
    """What turns a base model into the pruned one, in some kilobytes: `apply_(base, removal)` does it.

    Attributes:
        masks: layer name to [slices, rank] bool, True where the component is removed. Slices and their order are those
            of `spectral.layer_view`; components are in falling order of their singular values.
        kinds: layer name to its kind, such as `q` or, fused, `q+k+v`.
        views: layer name to `head` or `matrix`.
        bias_deltas: layer name to [out] float32, what is added to the bias, one being created where there is none.
            Layers whose bias stays as it is are left out.
    """

    masks: dict[str, Tensor]
    kinds: dict[str, str]
    views: dict[str, str]
    bias_deltas: dict[str, Tensor]

    @property
    def count(self) -> int:
        """How many components are removed."""
        return sum(int(mask.sum()) for mask in self.masks.values())


@dataclass(frozen=True)
class RemovalRound:
    """The state after a round of the search (round 0: before anything is removed).

    Attributes:
        removed: components gone so far.
        search_loss: mean loss of the examples that worth is measured on, nats an example.
        held_out_loss, held_out_accuracy: on the held-out examples: nats an example, and a share in 0..1.
        held_out_objective: what the search lowers, on them; see `removal.objective`.
        retention_loss: nats a predicted token, on what the model must not lose.
        retention_accuracy: share of the retention examples answered rightly; None where retention is plain text.
        checks: forward checks done so far.
    """

    removed: int
    search_loss: float
    held_out_loss: float
    held_out_objective: float
    held_out_accuracy: float
    retention_loss: float
    retention_accuracy: float | None
    checks: int


@dataclass(frozen=True)
class RemovalReport:
    """What `remove_` did.

    Attributes:
        rounds: the path, the first entry being the model as it came.
        chosen: which of `rounds` the model is left at.
        pieces: all removed components, by layer, slice and size.
        components: how many there were to choose from.
        settings: worth, kinds, view, the bounds, seed and counts of examples.
        removal: what to store; see `Removal`.
        worth: layer name to [slices, rank] float32: the worth of every component before anything was removed, in nats
            an example for `exact`; NaN where a slice has fewer components.
        sigma: the singular values, likewise.
        seconds: {stage: seconds}.
    """

    rounds: tuple[RemovalRound, ...]
    chosen: int
    pieces: tuple[RemovedPiece, ...]
    components: int
    settings: dict[str, Any]
    removal: Removal = field(repr=False)
    worth: dict[str, Tensor] = field(repr=False, default_factory=dict)
    sigma: dict[str, Tensor] = field(repr=False, default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def before(self) -> RemovalRound:
        """The model as it came."""
        return self.rounds[0]

    @property
    def after(self) -> RemovalRound:
        """The model as it is left."""
        return self.rounds[self.chosen]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; without the tensors."""
        return {
            "rounds": [vars(entry) for entry in self.rounds],
            "chosen": self.chosen,
            "pieces": [list(piece) for piece in self.pieces],
            "components": self.components,
            "settings": dict(self.settings),
            "seconds": dict(self.seconds),
        }


def removed_pieces(removal: Removal, slices: dict[str, list[tuple[str, int]]]) -> Iterator[RemovedPiece]:
    """All removed components; `slices` holds (kind, head) of every slice of every layer."""
    for layer, mask in removal.masks.items():
        for index, piece in mask.nonzero().tolist():
            kind, head = slices[layer][index]
            yield RemovedPiece(layer, kind, head, piece)
