# SPDX-License-Identifier: Apache-2.0
"""What a model can do and how fast: perplexity over token windows, tokens per second."""

from eigenprune.evaluate.layer_times import LayerTimes, layer_times
from eigenprune.evaluate.perplexity import Perplexity, contiguous_windows, perplexity, spaced_windows
from eigenprune.evaluate.speed import Speed, compare_decode, compare_prefill, decode_speed, prefill_speed, speed_ratio

__all__ = [
    "LayerTimes",
    "Perplexity",
    "Speed",
    "compare_decode",
    "compare_prefill",
    "contiguous_windows",
    "decode_speed",
    "layer_times",
    "perplexity",
    "prefill_speed",
    "spaced_windows",
    "speed_ratio",
]
