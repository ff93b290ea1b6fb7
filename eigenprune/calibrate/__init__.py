# SPDX-License-Identifier: Apache-2.0
"""Texts to token windows to streamed statistics."""

from eigenprune.calibrate.cache import default_cache_dir
from eigenprune.calibrate.collect import collect_statistics
from eigenprune.calibrate.statistics import Statistics
from eigenprune.calibrate.texts import BUILTIN, builtin_texts, read_texts
from eigenprune.calibrate.windows import SEPARATOR, cut_windows, token_ids

__all__ = [
    "BUILTIN",
    "SEPARATOR",
    "Statistics",
    "builtin_texts",
    "collect_statistics",
    "cut_windows",
    "default_cache_dir",
    "read_texts",
    "token_ids",
]
