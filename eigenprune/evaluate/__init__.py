# SPDX-License-Identifier: Apache-2.0
"""What a model can do and how fast: perplexity over token windows, tokens per second."""

from eigenprune.evaluate.perplexity import Perplexity, contiguous_windows, perplexity, spaced_windows
from eigenprune.evaluate.speed import Speed, compare_decode, compare_prefill, decode_speed, prefill_speed, speed_ratio

__all__ = [
    "Perplexity",
    "Speed",
    "compare_decode",
    "compare_prefill",
    "contiguous_windows",
    "decode_speed",
    "perplexity",
    "prefill_speed",
    "spaced_windows",
    "speed_ratio",
]
