# SPDX-License-Identifier: Apache-2.0
"""What the steps of one run of `prune_` share: what was asked for, and the time they take."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from eigenprune.calibrate import Statistics
from eigenprune.config import EigenpruneConfig
from eigenprune.removal import TaskExamples
from eigenprune.spectral import Method, find_method


class Clock:
    """Seconds spent in named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count what happens inside for `stage`."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


@dataclass(frozen=True)
class Run:
    """The arguments of `prune_`, which says what they mean, and a clock."""

    model: nn.Module
    config: EigenpruneConfig
    cache_dir: Path
    tokenizer: Any = None
    texts: Iterable[Any] | None = None
    windows: Tensor | None = None
    statistics: Statistics | None = None
    task: TaskExamples | None = None
    recover: str | None = None
    recover_minutes: float | None = None
    restore_on_error: bool = True
    progress: bool = True
    clock: Clock = field(default_factory=Clock)

    @property
    def method(self) -> Method:
        """The row of the method table."""
        return find_method(self.config.method)

    @property
    def allocation(self) -> str:
        """How ranks are shared out."""
        return self.config.allocation or self.method.allocation

    def bar(self, names: Iterable[str], title: str) -> Iterable[str]:
        """`names` behind a progress bar."""
        bar: Iterable[str] = tqdm(list(names), desc=title, unit="layer", disable=not self.progress, leave=False)
        return bar
