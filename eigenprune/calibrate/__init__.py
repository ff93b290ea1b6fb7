# SPDX-License-Identifier: Apache-2.0
"""Texts to token windows to streamed statistics."""

from eigenprune.calibrate.blocks import BlockChain, find_chain
from eigenprune.calibrate.cache import cache_key, default_cache_dir, save_tensors, windows_hash
from eigenprune.calibrate.collect import calibration_mode, collect_statistics
from eigenprune.calibrate.objective import model_inputs
from eigenprune.calibrate.sampled import SAMPLED, Sampling, can_sample, sample_windows
from eigenprune.calibrate.sequential import ShiftedMoments, sequential_moments
from eigenprune.calibrate.source import SOURCES, Calibration, calibration_windows
from eigenprune.calibrate.statistics import Statistics
from eigenprune.calibrate.texts import BUILTIN, builtin_texts, read_texts, row_texts
from eigenprune.calibrate.windows import SEPARATOR, cut_windows, token_ids

__all__ = [
    "BUILTIN",
    "SAMPLED",
    "SEPARATOR",
    "SOURCES",
    "BlockChain",
    "Calibration",
    "Sampling",
    "ShiftedMoments",
    "Statistics",
    "builtin_texts",
    "cache_key",
    "calibration_mode",
    "calibration_windows",
    "can_sample",
    "collect_statistics",
    "cut_windows",
    "default_cache_dir",
    "find_chain",
    "model_inputs",
    "read_texts",
    "row_texts",
    "sample_windows",
    "save_tensors",
    "sequential_moments",
    "token_ids",
    "windows_hash",
]
