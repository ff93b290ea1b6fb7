# SPDX-License-Identifier: Apache-2.0
"""`TaskExamples`: all that a removal is made and judged on, given by the caller or by the name of a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from eigenprune.calibrate.source import own_tokenizer
from eigenprune.errors import ConfigError
from eigenprune.evaluate.tasks import find_task
from eigenprune.evaluate.token_example import TokenExample

MOST_EXAMPLES = 256  # to measure worth on; more cost time and, by the pilot, change little


@dataclass(frozen=True)
class TaskExamples:
    """Examples of a task, for `prune_`.

    Attributes:
        examples: to measure worth on.
        held_out: to decide when to stop; None sets a part of `examples` aside.
        retention: what the model must not lose, examples or [windows, window] token ids; None: calibration text.
        settings: other arguments of `remove_` by name, such as `kinds`, `checks` or `retention_bound`.
    """

    examples: Sequence[TokenExample]
    held_out: Sequence[TokenExample] | None = None
    retention: Sequence[TokenExample] | Tensor | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def named_task(model: nn.Module, name: str | None, tokenizer: Any) -> TaskExamples:
    """The training and held-out examples of a task of `eigenprune.evaluate.tasks`; its test examples are not touched.

    Raises:
        ConfigError: no name, or no such task.
        CalibrationError: its data or the model's tokenizer is missing.
    """
    if name is None:
        raise ConfigError("this method needs a task: EigenpruneConfig(task='int-mult'), or prune_(..., task=...)")
    found = find_task(name)
    tokenizer = tokenizer or own_tokenizer(model)
    return TaskExamples(
        examples=found.examples(tokenizer, "train", limit=MOST_EXAMPLES),
        held_out=found.examples(tokenizer, "held_out", limit=MOST_EXAMPLES),
    )
