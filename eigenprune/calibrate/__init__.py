# SPDX-License-Identifier: Apache-2.0
"""Texts to token windows to streamed statistics."""

from eigenprune.calibrate.cache import default_cache_dir
from eigenprune.calibrate.collect import collect_statistics
from eigenprune.calibrate.entry_statistics import EntryStatistics, collect_entry_statistics
from eigenprune.calibrate.passage_gradients import PassageGradients, partner_rows, passage_gradients
from eigenprune.calibrate.passages import Passage, PassageBatch, batch_losses, collate, passage_batches, passage_losses
from eigenprune.calibrate.prior import PRIOR, blended, prior_windows
from eigenprune.calibrate.sampled import SAMPLED, Sampling, can_sample, sample_windows
from eigenprune.calibrate.source import SOURCES, Calibration, calibration_windows
from eigenprune.calibrate.statistics import Statistics
from eigenprune.calibrate.texts import BUILTIN, builtin_texts, read_texts, row_texts
from eigenprune.calibrate.windows import SEPARATOR, cut_windows, token_ids

__all__ = [
    "BUILTIN",
    "PRIOR",
    "SAMPLED",
    "SEPARATOR",
    "SOURCES",
    "Calibration",
    "EntryStatistics",
    "Passage",
    "PassageBatch",
    "PassageGradients",
    "Sampling",
    "Statistics",
    "batch_losses",
    "blended",
    "builtin_texts",
    "calibration_windows",
    "can_sample",
    "collate",
    "collect_entry_statistics",
    "collect_statistics",
    "cut_windows",
    "default_cache_dir",
    "partner_rows",
    "passage_batches",
    "passage_gradients",
    "passage_losses",
    "prior_windows",
    "read_texts",
    "row_texts",
    "sample_windows",
    "token_ids",
]
