# SPDX-License-Identifier: Apache-2.0
"""What a model can do and how fast: perplexity over token windows, answers to tasks, tokens per second."""

from eigenprune.evaluate.answers import accuracy, answer_losses, right_answers
from eigenprune.evaluate.layer_times import LayerTimes, layer_times
from eigenprune.evaluate.perplexity import Perplexity, contiguous_windows, perplexity, spaced_windows
from eigenprune.evaluate.speed import Speed, compare_decode, compare_prefill, decode_speed, prefill_speed, speed_ratio

__all__ = [
    "LayerTimes",
    "Perplexity",
    "Speed",
    "accuracy",
    "answer_losses",
    "compare_decode",
    "compare_prefill",
    "contiguous_windows",
    "decode_speed",
    "layer_times",
    "perplexity",
    "prefill_speed",
    "right_answers",
    "spaced_windows",
    "speed_ratio",
]
