# SPDX-License-Identifier: Apache-2.0
"""Recovery as a step of pruning: what must be kept of the dense model before it is pruned in place."""

import copy
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from eigenprune.errors import ConfigError
from eigenprune.recover.measure import split_windows
from eigenprune.recover.recovery import RecoveryReport, find_recovery, recover_
from eigenprune.recover.targets import Targets, teacher_targets


class RecoveryAfterPruning:
    """Ask the dense model first, recover what it was pruned to later.

    For `distil` and `perp` the dense model's predictions are kept; for `block` and `closed`, a copy of it.

    Args:
        method: as `recover_` knows it.
        minutes: bound on the training, None for none; only for methods that learn from predictions.
        seed: of the order of the windows.
        folder: where targets and training are kept; None keeps nothing.
        progress: show bars on standard error.

    Raises:
        ConfigError: the method is unknown, or takes no bound in minutes.
    """

    def __init__(
        self, method: str, minutes: float | None, *, seed: int = 0, folder: Path | None = None, progress: bool = True
    ) -> None:
        chosen = find_recovery(method)
        if minutes is not None and chosen.blockwise:
            raise ConfigError(f"recovery {method!r} takes no bound in minutes: it goes through the model once")
        self.method, self.blockwise = method, chosen.blockwise
        self.course = None if chosen.course is None else replace(chosen.course, minutes=minutes, seed=seed)
        self.folder, self.progress = folder, progress
        self._windows: Tensor | None = None
        self._dense: nn.Module | Targets | None = None

    def remember(self, dense: nn.Module, windows: Tensor) -> None:
        """Keep what recovery needs of the model, which is still dense; errors as `recover_`."""
        split_windows(len(windows))
        self._windows = windows
        if self.blockwise:
            self._dense = copy.deepcopy(dense)
        else:
            self._dense = teacher_targets(dense, windows, cache_dir=self.folder, progress=self.progress)

    def run(self, pruned: nn.Module) -> RecoveryReport:
        """Recover, in place; errors as `recover_`."""
        if self._dense is None:
            raise ConfigError("nothing is known of the dense model: call remember first")
        return recover_(
            pruned,
            self._dense,
            self._windows,
            method=self.method,
            course=self.course,
            checkpoint_dir=self.folder,
            progress=self.progress,
        )
