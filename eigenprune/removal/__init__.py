# SPDX-License-Identifier: Apache-2.0
"""Eigenpruning: remove the components that stand in a task's way, and keep what is left as it was."""

from eigenprune.removal.apply import apply_
from eigenprune.removal.frozen import FrozenPieces
from eigenprune.removal.removal import Removal, RemovalReport, RemovalRound, RemovedPiece, removed_pieces
from eigenprune.removal.remove import remove_
from eigenprune.removal.task import TaskExamples, named_task
from eigenprune.removal.task_report import TaskReport
from eigenprune.removal.task_run import TaskSplits, run_task_, task_splits

__all__ = [
    "FrozenPieces",
    "Removal",
    "RemovalReport",
    "RemovalRound",
    "RemovedPiece",
    "TaskExamples",
    "TaskReport",
    "TaskSplits",
    "apply_",
    "named_task",
    "remove_",
    "removed_pieces",
    "run_task_",
    "task_splits",
]
