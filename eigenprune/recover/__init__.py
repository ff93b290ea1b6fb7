# SPDX-License-Identifier: Apache-2.0
"""Training towards and with factored layers, and getting back what pruning lost."""

from eigenprune.recover.after_pruning import RecoveryAfterPruning
from eigenprune.recover.factor_training import FactorTraining, orthonormalise_
from eigenprune.recover.rank_pruning import RankTarget
from eigenprune.recover.recovery import RECOVERIES, RecoveryReport, find_recovery, recover_
from eigenprune.recover.retruncate import retruncate_
from eigenprune.recover.targets import Targets, teacher_targets
from eigenprune.recover.trained_rank import TrainedRankPruning
from eigenprune.recover.training import Course

__all__ = [
    "RECOVERIES",
    "Course",
    "FactorTraining",
    "RankTarget",
    "RecoveryAfterPruning",
    "RecoveryReport",
    "Targets",
    "TrainedRankPruning",
    "find_recovery",
    "orthonormalise_",
    "recover_",
    "retruncate_",
    "teacher_targets",
]
