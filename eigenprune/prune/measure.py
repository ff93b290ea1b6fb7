# SPDX-License-Identifier: Apache-2.0
"""From texts to what a method and an allocation know of a model."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from eigenprune.calibrate import Calibration, Statistics, calibration_windows
from eigenprune.errors import ConfigError
from eigenprune.prune.run import Run
from eigenprune.recover import RecoveryAfterPruning
from eigenprune.spectral import ALLOCATIONS, method_statistics


@dataclass(frozen=True)
class Measured:
    """What the run knows of the model.

    Attributes:
        statistics: of the method; None for data-free ones.
        gradients: those with the gradients that the allocation needs, if it needs any.
        windows: of calibration text, where there was any.
        own: measured here, so that what is made of the statistics has a name in the cache.
    """

    statistics: Statistics | None
    gradients: Statistics | None
    windows: Tensor | None
    own: bool


def calibration(run: Run, layers: Mapping[str, nn.Module] | None = None) -> Calibration:
    """Calibration windows: of the caller, or by the config, whose choice may look at `layers`."""
    if run.windows is not None:
        return Calibration(run.windows, "token windows given by the caller")
    return calibration_windows(
        run.model,
        texts=run.texts,
        files=run.config.texts,
        source=run.config.calibration,
        tokenizer=run.tokenizer,
        count=run.config.windows,
        window=run.config.window,
        seed=run.config.seed,
        choose=run.config.choose_windows,
        layers=layers,
        cache_dir=run.cache_dir,
        progress=run.progress,
    )


def measure(run: Run, layers: Mapping[str, nn.Module], recovery: RecoveryAfterPruning | None) -> Measured:
    """Measure what was not given; `recovery` looks at the dense model on the same text.

    Raises:
        ConfigError: the method is made of statistics that only the caller can have.
        CalibrationError: the texts are missing, too short, or do not fit the model.
    """
    method, need = run.method, ALLOCATIONS[run.allocation].needs
    if method.worth == "importance" and run.statistics is None:
        raise ConfigError(
            f"method {run.config.method!r} judges components by the gradients of a LoRA: train one, then pass "
            "statistics=eigenprune.integrations.lora_importance.collect_lora_importance(peft_model, windows)"
        )
    own = run.statistics is None
    wanted = own and (bool(method.statistics) or (bool(need) and run.windows is None))
    again = method.needs_windows and run.windows is None  # the model runs once more, after the statistics
    if not (wanted or again or recovery is not None):
        return Measured(run.statistics, run.statistics, run.windows, own)
    with run.clock("texts"):
        found = calibration(run, layers)
    if recovery is not None:
        with run.clock("dense model"):
            recovery.remember(run.model, found.windows)
    if not wanted:
        return Measured(run.statistics, run.statistics, found.windows, own)
    with run.clock("statistics"):
        statistics, gradients = method_statistics(
            run.model,
            layers,
            method,
            found,
            need=need,
            prior=run.config.prior,
            cache_dir=run.cache_dir,
            seed=run.config.seed,
            progress=run.progress,
        )
    return Measured(statistics, gradients, found.windows, own)
