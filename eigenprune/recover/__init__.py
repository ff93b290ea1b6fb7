# SPDX-License-Identifier: Apache-2.0
"""Training towards and with factored layers."""

from eigenprune.recover.factor_training import FactorTraining, orthonormalise_
from eigenprune.recover.rank_pruning import RankTarget
from eigenprune.recover.retruncate import retruncate_
from eigenprune.recover.trained_rank import TrainedRankPruning

__all__ = ["FactorTraining", "RankTarget", "TrainedRankPruning", "orthonormalise_", "retruncate_"]
