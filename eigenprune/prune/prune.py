# SPDX-License-Identifier: Apache-2.0
"""`prune_`: the main path, from a dense model to a factored one."""

import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eigenprune.calibrate import Statistics, default_cache_dir
from eigenprune.config import EigenpruneConfig
from eigenprune.errors import ConfigError
from eigenprune.layers import low_rank_layers, undo_on_error
from eigenprune.prune.choose import choose_ranks, decompose
from eigenprune.prune.factor import factor_
from eigenprune.prune.for_task import prune_for_task_
from eigenprune.prune.layers_to_prune import drop_unmeasured, layers_to_prune
from eigenprune.prune.measure import measure
from eigenprune.prune.quantise import check_bits_possible, quantise
from eigenprune.prune.run import Run
from eigenprune.prune.savable import kept_shapes, layer_reports, make_savable, model_size, settings
from eigenprune.recover import RecoveryAfterPruning
from eigenprune.removal import TaskExamples
from eigenprune.report import PruneReport
from eigenprune.spectral import find_method

DATA_FREE_WARNING = (
    "method {method!r} looks at no data. On language models it is no usable default: at keep=0.8 perplexity rises a "
    "million-fold where method='kfac' adds some percent. Use method='kfac', with texts=[...] like those the model "
    "is used on."
)


def prune_(
    model: nn.Module,
    config: EigenpruneConfig,
    *,
    tokenizer: Any = None,
    texts: Iterable[Any] | None = None,
    windows: Tensor | None = None,
    statistics: Statistics | None = None,
    task: TaskExamples | None = None,
    cache_dir: Path | None = None,
    recover: str | None = None,
    recover_minutes: float | None = None,
    restore_on_error: bool = True,
    progress: bool = True,
) -> PruneReport:
    """Prune `model` in place: choose ranks for all its linear layers under one budget, and factor them.

    Everything that can fail is done before the first layer changes. A transformers model can then be saved with its own
    `save_pretrained`, and loads again with plain `from_pretrained`.

    With a method that removes components for a task (`eigenprune`), those go first, under the guard of a retention set
    (see `remove_`); what is left is then compressed to `config.keep`, where that is below 1.

    Memory: the model, the statistics (see `collect_statistics`), and float64 copies of the layer at work (with
    `kfac-channels`: of the layers of one MLP, and of their Grams). With
    `restore_on_error`, the dense weights too until the last layer is done.

    Args:
        model: a transformers model (or, with `statistics` or a data-free method, any module) in memory.
        config: what to do.
        tokenizer: for the calibration texts; None loads the one that belongs to `model.config.name_or_path`.
        texts: calibration documents, instead of the files that `config.texts` names: strings, or rows with `text` or
            `messages`, such as a `datasets.Dataset`.
        windows: [windows, window] int64 token ids, instead of texts.
        statistics: what `collect_statistics` measured on this model, instead of measuring.
        task: examples of the task and of what must be retained, instead of the task that `config.task` names and of
            the calibration text.
        cache_dir: where statistics are kept; None takes `$EIGENPRUNE_CACHE` or the user's cache folder.
        recover: then get loss back on the calibration windows, by `distil`, `block`, `closed` or `perp`: see
            `recover_`, also for the memory. Goes on from `cache_dir` after an interrupt. None does not.
        recover_minutes: bound on the training of `distil` and `perp`; then the weights depend on the machine's speed.
        restore_on_error: put the dense layers back if factoring fails or is interrupted.
        progress: show bars on standard error.

    Raises:
        ConfigError: the model is pruned already, a setting does not fit it, or bits are asked for and torchao is
            missing.
        CalibrationError: the texts are missing, too short, or do not fit the model.
        WeightError: a weight is on the meta device, or not finite; the layer is named.
        BudgetError: `keep` is below what the smallest ranks take.
    """
    method = find_method(config.method)
    if low_rank_layers(model):
        raise ConfigError("the model is pruned already; prune the dense model, or turn this one back with to_dense_")
    run = Run(
        model,
        config,
        cache_dir or default_cache_dir(),
        tokenizer,
        texts,
        windows,
        statistics,
        task,
        recover,
        recover_minutes,
        restore_on_error,
        progress,
    )
    check_bits_possible(config.bits)
    if method.removal is not None:
        return prune_for_task_(run, method.removal, _compress_)
    if task is not None:
        raise ConfigError(f"method {config.method!r} takes no task; use method='eigenprune'")
    if not method.statistics:
        warnings.warn(DATA_FREE_WARNING.format(method=config.method), stacklevel=2)
    return _compress_(run)


def _compress_(run: Run) -> PruneReport:
    """Measure, decompose, choose, factor; recover, if that is asked for."""
    model, config = run.model, run.config
    recovery = None
    if run.recover is not None:
        recovery = RecoveryAfterPruning(
            run.recover, run.recover_minutes, seed=config.seed, folder=run.cache_dir, progress=run.progress
        )
    selection = layers_to_prune(model, tuple(config.skip))
    measured = measure(run, selection.chosen, recovery)
    if run.method.statistics and measured.statistics is not None:
        drop_unmeasured(selection, measured.statistics)
    decomposed = decompose(run, selection.chosen, measured)
    found = choose_ranks(run, selection.chosen, decomposed, measured)
    before = model_size(model)
    with undo_on_error(model, selection.chosen if run.restore_on_error else {}):
        with run.clock("factors"):
            # Not a copy where memory counts: a factored layer's weight must go.
            dense = dict(selection.chosen) if run.restore_on_error else selection.chosen
            factor_(run, dense, found, decomposed, measured)
        kept = kept_shapes(model, {name: selection.shapes[name] for group in found.kept for name in group.names})
        facts = settings(config, run.allocation)
        report = PruneReport(
            layers=tuple(layer_reports(selection, found.choices, config, kept)),
            settings=facts if found.gap is None else facts | {"allocation_gap": found.gap},
            calibration={}
            if measured.statistics is None or not run.method.statistics
            else measured.statistics.facts.to_dict(),
            model_parameters=(before[0], model_size(model)[0]),
            model_bytes=(before[1], model_size(model)[1]),
            seconds=run.clock.seconds,
        )
        make_savable(model, config, report)
        if recovery is not None:
            with run.clock("recovery"):
                report = replace(report, recovery=recovery.run(model).to_dict())
        if config.bits is not None:
            with run.clock("quantising"):
                report = quantise(run, report, found)
    return report
