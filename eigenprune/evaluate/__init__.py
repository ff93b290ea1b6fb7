# SPDX-License-Identifier: Apache-2.0
"""What a model can do and how fast: perplexity over token windows, answers to tasks, tokens per second."""

from eigenprune.evaluate.answers import accuracy, answer_losses, right_answers
from eigenprune.evaluate.intervals import Comparison, compare_answers, mcnemar, wilson_interval
from eigenprune.evaluate.layer_times import LayerTimes, layer_times
from eigenprune.evaluate.perplexity import Perplexity, contiguous_windows, perplexity, spaced_windows
from eigenprune.evaluate.speed import Speed, compare_decode, compare_prefill, decode_speed, prefill_speed, speed_ratio
from eigenprune.evaluate.task_scores import Difference, TaskScore, paired_difference
from eigenprune.evaluate.tasks import TASKS, Task, find_task
from eigenprune.evaluate.token_example import TokenExample

__all__ = [
    "TASKS",
    "Comparison",
    "Difference",
    "LayerTimes",
    "Perplexity",
    "Speed",
    "Task",
    "TaskScore",
    "TokenExample",
    "accuracy",
    "answer_losses",
    "compare_answers",
    "compare_decode",
    "compare_prefill",
    "contiguous_windows",
    "decode_speed",
    "find_task",
    "layer_times",
    "mcnemar",
    "paired_difference",
    "perplexity",
    "prefill_speed",
    "right_answers",
    "spaced_windows",
    "speed_ratio",
    "wilson_interval",
]
