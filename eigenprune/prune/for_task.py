# SPDX-License-Identifier: Apache-2.0
"""Pruning for a task: what stands in its way goes first, what is left is compressed if that is asked for."""

from collections.abc import Callable
from dataclasses import replace

from eigenprune.layers import undo_on_error, weights_kept
from eigenprune.prune.layers_to_prune import layers_to_prune
from eigenprune.prune.measure import calibration
from eigenprune.prune.run import Run
from eigenprune.prune.savable import make_savable, model_size, settings
from eigenprune.removal import named_task, remove_
from eigenprune.report import PruneReport, dense_reports

DEFAULT_REMOVE = 0.01
RETENTION_WINDOWS, RETENTION_WINDOW = 16, 256  # of the calibration text, where a task names nothing to retain


def prune_for_task_(run: Run, worth: str, compress: Callable[[Run], PruneReport]) -> PruneReport:
    """Remove what stands in the task's way by `worth`, then `compress` what is left if `keep` is below 1."""
    config, model = run.config, run.model
    selection = layers_to_prune(model, tuple(config.skip))
    before = model_size(model)
    with run.clock("texts"):
        task = run.task or named_task(model, config.task, run.tokenizer)
        retention = task.retention
        if run.windows is None and (retention is None or config.keep < 1):
            run = replace(run, windows=calibration(run, selection.chosen).windows)
        if retention is None and run.windows is not None:
            retention = run.windows[:RETENTION_WINDOWS, :RETENTION_WINDOW]
    without = [name for name, module in selection.chosen.items() if module.bias is None]
    with undo_on_error(model, {}), weights_kept(selection.chosen if run.restore_on_error else {}):
        with run.clock("removal"):
            removal = remove_(
                model,
                task.examples,
                retention=() if retention is None else retention,
                held_out=task.held_out,
                worth=worth,
                remove=DEFAULT_REMOVE if config.remove is None else config.remove,
                skip=config.skip,
                seed=config.seed,
                progress=run.progress,
                **dict(task.settings),
            )
        biases = [name for name in without if selection.chosen[name].bias is not None]
        removed = {name: int(mask.sum()) for name, mask in removal.removal.masks.items()}
        rest = None
        if config.keep < 1:
            rest = compress(replace(run, config=replace(config, method="kfac", task=None, remove=None), task=None))
        report = PruneReport(
            layers=dense_reports(selection.shapes, selection.skipped, removed) if rest is None else rest.layers,
            settings=settings(config, run.allocation) | {"task": config.task, "remove": removal.settings["remove"]},
            calibration={} if rest is None else rest.calibration,
            model_parameters=(before[0], model_size(model)[0]),
            model_bytes=(before[1], model_size(model)[1]),
            seconds=run.clock.seconds,
            removal=removal,
        )
        make_savable(model, config, report, biases)
    return report
