# SPDX-License-Identifier: Apache-2.0
"""The statistics that a method and an allocation are made of."""

import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from eigenprune.calibrate import Calibration, Statistics, blended, collect_statistics, prior_windows
from eigenprune.layers import dense_weight
from eigenprune.spectral.evidence import GRADIENTS
from eigenprune.spectral.methods import Method

PRIOR_WINDOWS = 8  # at most: random tokens are all alike


def method_statistics(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    method: Method,
    calibration: Calibration,
    *,
    need: str = "",
    prior: float = 0.0,
    cache_dir: Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Statistics | None, Statistics | None]:
    """The statistics that `method` is made of, and those with the gradients that an allocation needs; one where it can.

    Warns where the text has fewer tokens than a layer has inputs: what it says nothing about is then guessed.

    Args:
        model: as in `collect_statistics`.
        layers: to measure.
        method: None of the first where it is data-free.
        calibration: the token windows.
        need: of the allocation, see `AllocationRow`; None of the second where it needs no gradients.
        prior: part of the input Grams that random tokens make up, see `blended`.
        cache_dir, seed, progress: as in `collect_statistics`.
    """

    def collected(kinds: tuple[str, ...], objective: str | None) -> Statistics | None:
        if not kinds:
            return None
        return collect_statistics(
            model,
            calibration.windows,
            layers,
            kinds=kinds,
            cache_dir=cache_dir,
            seed=seed,
            source=calibration.source,
            sampling=calibration.sampling,
            objective=objective,
            progress=progress,
        )

    gradients = (GRADIENTS[need],) if need in GRADIENTS else ()
    if method.objective is None:
        statistics = collected(tuple(dict.fromkeys([*method.statistics, *gradients])), None)
        others = statistics
    else:
        statistics, others = collected(method.statistics, method.objective), collected(gradients, None)
    if statistics is not None and method.input_metric == "gram":
        _warn_of_few_tokens(layers, calibration)
        if prior > 0:
            count, window = calibration.windows.shape
            random = prior_windows(model, count=min(count, PRIOR_WINDOWS), window=window, seed=seed)
            plain = collect_statistics(
                model, random, layers, kinds=("input_gram",), cache_dir=cache_dir, seed=seed, progress=progress
            )
            statistics = blended(statistics, plain, prior)
    return statistics, others


def _warn_of_few_tokens(layers: Mapping[str, nn.Module], calibration: Calibration) -> None:
    tokens = calibration.windows.numel()
    widest = max(layers, key=lambda name: dense_weight(layers[name]).shape[1])
    width = dense_weight(layers[widest]).shape[1]
    if tokens < width:
        warnings.warn(
            f"the calibration text has {tokens} tokens, and {widest} has {width} inputs: about most of them it says "
            "nothing. Give more text, or prior=0.5 to mix in random tokens",
            stacklevel=5,  # whoever called prune_
        )
