# SPDX-License-Identifier: Apache-2.0
"""Where the calibration windows of a model come from, and what a report says about it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eigenprune.calibrate.choice import choose_indices, find_choice
from eigenprune.calibrate.prior import PRIOR, prior_windows
from eigenprune.calibrate.sampled import DOCUMENT, SAMPLED, Sampling, can_sample, sample_windows
from eigenprune.calibrate.texts import BUILTIN, builtin_texts, read_texts, row_texts
from eigenprune.calibrate.window_features import window_features
from eigenprune.calibrate.windows import cut_windows
from eigenprune.errors import CalibrationError

SOURCES = (SAMPLED, BUILTIN, PRIOR)
POOL = 4  # windows looked at for each one that is chosen
LONGEST_TOKEN = 32  # characters a token, more than any known vocabulary averages on prose


@dataclass(frozen=True)
class Calibration:
    """Token windows and their origin.

    Attributes:
        windows: [windows, window] int64.
        source: a word on where they come from: one of `SOURCES`, the names of files, or that the caller gave them.
        sampling: how they were sampled, see `Sampling`; empty for other sources.
    """

    windows: Tensor
    source: str
    sampling: dict[str, Any] = field(default_factory=dict)


def calibration_windows(
    model: nn.Module,
    *,
    texts: Iterable[Any] | None = None,
    files: Sequence[str | PathLike[str]] | None = None,
    source: str | None = None,
    tokenizer: Any = None,
    count: int = 40,
    window: int = 1024,
    seed: int = 0,
    choose: str = "first",
    layers: Mapping[str, nn.Module] | None = None,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Calibration:
    """Windows from `texts`, else from `files`, else from `source`; of a larger pool of them, those that a rule chooses.

    Args:
        model: that will be calibrated; windows are no longer than its positions.
        texts: documents: strings, or rows with `text` or `messages` (a `datasets.Dataset`, say).
        files: text files, see `read_texts`.
        source: one of `SOURCES`; None: `sampled` where the model can write, else the text that ships with Python.
        tokenizer: of the model; None loads the one that belongs to `model.config.name_or_path`.
        count: how many windows.
        window: tokens in a window.
        seed: of sampled text, and of random choice.
        choose: which `count` of a pool of `POOL` times as many: a row of `CHOICES`; `first` reads no more than `count`.
        layers: whose gradients the rule `grand` looks at.
        cache_dir: where sampled text is kept.
        progress: show a bar on standard error while text is sampled.

    Raises:
        CalibrationError: no tokenizer, no or too little text, or a model that cannot write any.
        ConfigError: no such rule.
    """
    if choose != "first":
        rule = find_choice(choose)
        pool = calibration_windows(
            model,
            texts=texts,
            files=files,
            source=source,
            tokenizer=tokenizer,
            count=POOL * count,
            window=window,
            seed=seed,
            cache_dir=cache_dir,
            progress=progress,
        )
        if len(pool.windows) <= count:  # of short texts all are needed
            return pool
        features = window_features(model, pool.windows, rule.needs, layers=layers, progress=progress)
        chosen = choose_indices(choose, features, count, seed=seed)
        return replace(pool, windows=pool.windows[torch.tensor(chosen)])
    if tokenizer is None:
        tokenizer = own_tokenizer(model)
    window = min(window, getattr(getattr(model, "config", None), "max_position_embeddings", None) or window)
    if texts is not None:
        # Lists are read whole; a dataset may be streamed, without end, or longer than memory.
        enough = None if isinstance(texts, list | tuple) else LONGEST_TOKEN * count * window
        documents, name = row_texts(texts, tokenizer, characters=enough), "texts given by the caller"
    elif files is not None:
        documents, name = read_texts(map(Path, files), tokenizer), ", ".join(Path(path).name for path in files)
    elif source == SAMPLED or (source is None and can_sample(model)):
        sampling = Sampling(seed=seed, windows=count, window=window, document=min(DOCUMENT, window))
        windows = sample_windows(model, tokenizer, sampling, cache_dir=cache_dir, progress=progress)
        return Calibration(windows, SAMPLED, sampling.to_dict())
    elif source == PRIOR:
        return Calibration(prior_windows(model, count=count, window=window, seed=seed), PRIOR)
    else:
        documents, name = builtin_texts(), BUILTIN
    return Calibration(cut_windows(tokenizer, documents, count=count, window=window), name)


def own_tokenizer(model: nn.Module) -> Any:
    """The tokenizer that belongs to `model.config.name_or_path`.

    Raises:
        CalibrationError: that is not known, or there is none.
    """
    from transformers import AutoTokenizer

    name = getattr(getattr(model, "config", None), "name_or_path", "")
    advice = "pass tokenizer=..., or windows=... of token ids"
    if not name:
        raise CalibrationError(
            f"the model does not say where it was loaded from, so its tokenizer is unknown: {advice}"
        )
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(f"no tokenizer beside the model: {advice} ({error})") from error
