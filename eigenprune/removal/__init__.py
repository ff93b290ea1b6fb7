# SPDX-License-Identifier: Apache-2.0
"""Eigenpruning: remove the components that stand in a task's way, and keep what is left as it was."""

from eigenprune.removal.apply import apply_
from eigenprune.removal.frozen import FrozenPieces
from eigenprune.removal.removal import Removal, RemovalReport, RemovalRound, RemovedPiece, removed_pieces

__all__ = [
    "FrozenPieces",
    "Removal",
    "RemovalReport",
    "RemovalRound",
    "RemovedPiece",
    "apply_",
    "removed_pieces",
]
