# SPDX-License-Identifier: Apache-2.0
"""Texts to token windows to streamed statistics."""

from eigenprune.calibrate.blocks import BlockChain, find_chain
from eigenprune.calibrate.cache import cache_key, default_cache_dir, save_tensors, windows_hash
from eigenprune.calibrate.channels import ChannelGroup, channel_groups
from eigenprune.calibrate.choice import CHOICES, FEATURES, choose_indices, find_choice
from eigenprune.calibrate.collect import calibration_mode, collect_statistics
from eigenprune.calibrate.entry_statistics import EntryStatistics, collect_entry_statistics
from eigenprune.calibrate.objective import model_inputs
from eigenprune.calibrate.passage_gradients import (
    PassageGradients,
    batch_gradients,
    partner_rows,
    passage_gradients,
)
from eigenprune.calibrate.passages import (
    UNSCORED,
    Passage,
    PassageBatch,
    batch_logits,
    batch_losses,
    collate,
    logit_losses,
    passage_batches,
    passage_losses,
)
from eigenprune.calibrate.prior import PRIOR, blended, prior_windows
from eigenprune.calibrate.sampled import SAMPLED, Sampling, can_sample, sample_windows
from eigenprune.calibrate.sequential import ShiftedMoments, sequential_moments
from eigenprune.calibrate.source import SOURCES, Calibration, calibration_windows
from eigenprune.calibrate.statistics import Statistics
from eigenprune.calibrate.texts import BUILTIN, builtin_texts, read_texts, row_texts
from eigenprune.calibrate.window_features import window_features
from eigenprune.calibrate.windows import SEPARATOR, cut_windows, token_ids

__all__ = [
    "BUILTIN",
    "CHOICES",
    "FEATURES",
    "PRIOR",
    "SAMPLED",
    "SEPARATOR",
    "SOURCES",
    "UNSCORED",
    "BlockChain",
    "Calibration",
    "ChannelGroup",
    "EntryStatistics",
    "Passage",
    "PassageBatch",
    "PassageGradients",
    "Sampling",
    "ShiftedMoments",
    "Statistics",
    "batch_gradients",
    "batch_logits",
    "batch_losses",
    "blended",
    "builtin_texts",
    "cache_key",
    "calibration_mode",
    "calibration_windows",
    "can_sample",
    "channel_groups",
    "choose_indices",
    "collate",
    "collect_entry_statistics",
    "collect_statistics",
    "cut_windows",
    "default_cache_dir",
    "find_chain",
    "find_choice",
    "logit_losses",
    "model_inputs",
    "partner_rows",
    "passage_batches",
    "passage_gradients",
    "passage_losses",
    "prior_windows",
    "read_texts",
    "row_texts",
    "sample_windows",
    "save_tensors",
    "sequential_moments",
    "token_ids",
    "window_features",
    "windows_hash",
]
