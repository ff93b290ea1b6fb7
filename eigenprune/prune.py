# SPDX-License-Identifier: Apache-2.0
"""`prune_`: the main path, from a dense model to a factored one."""

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eigenprune.calibrate import (
    SOURCES,
    Calibration,
    Statistics,
    calibration_windows,
    collect_statistics,
    default_cache_dir,
)
from eigenprune.config import EigenpruneConfig
from eigenprune.errors import ConfigError, WeightError
from eigenprune.layers import (
    LowRankLinear,
    dense_weight,
    low_rank_layers,
    replace_module_,
    select_layers,
    undo_on_error,
    weights_kept,
)
from eigenprune.memory import page_span, release_pages, release_unused
from eigenprune.removal import TaskExamples, named_task, remove_
from eigenprune.report import LayerReport, PruneReport, base_facts, dense_reports, versions
from eigenprune.spectral import (
    Choice,
    Components,
    Metric,
    Options,
    allocate,
    components,
    find_method,
    layer_metric,
    layer_of_factors,
    rank_options,
    spectrum,
)

DEFAULT_REMOVE = 0.01
RETENTION_WINDOWS, RETENTION_WINDOW = 16, 256  # of the calibration text, where a task names nothing to retain
DATA_FREE_WARNING = (
    "method 'svd' looks at no data. On language models it is no usable default: at keep=0.8 perplexity rises a "
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
    restore_on_error: bool = True,
    progress: bool = True,
) -> PruneReport:
    """Prune `model` in place: choose ranks for all its linear layers under one budget, and factor them.

    Everything that can fail is done before the first layer changes. A transformers model can then be saved with its own
    `save_pretrained`, and loads again with plain `from_pretrained`.

    With a method that removes components for a task (`eigenprune`), those go first, under the guard of a retention set
    (see `remove_`); what is left is then compressed to `config.keep`, where that is below 1.

    Memory: the model, the statistics (see `collect_statistics`), and float64 copies of the layer at work. With
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
        restore_on_error: put the dense layers back if factoring fails or is interrupted.
        progress: show bars on standard error.

    Raises:
        ConfigError: the model is pruned already, or a setting does not fit it.
        CalibrationError: the texts are missing, too short, or do not fit the model.
        WeightError: a weight is on the meta device, or not finite; the layer is named.
        BudgetError: `keep` is below what the smallest ranks take.
    """
    method = find_method(config.method)
    if low_rank_layers(model):
        raise ConfigError("the model is pruned already; prune the dense model, or turn this one back with to_dense_")
    if method.removes:
        given = _Given(tokenizer, texts, windows, statistics, task, cache_dir, restore_on_error, progress)
        return _prune_for_task_(model, config, given)
    if task is not None:
        raise ConfigError(f"method {config.method!r} takes no task; use method='eigenprune'")
    allocation = config.allocation or method.allocation
    clock = _Clock()
    selection = select_layers(model, config.skip)
    chosen, skipped = selection.chosen, selection.skipped  # not copies: a factored layer's weight must go
    _require_layers(chosen, skipped)
    _check_weights(chosen)

    if method.statistics and statistics is None:
        where = cache_dir or default_cache_dir()
        with clock("texts"):
            calibration = _calibration(model, config, tokenizer, texts, windows, where, progress)
        with clock("statistics"):
            statistics = _measured(model, config, chosen, calibration, where, progress)
    if method.statistics and statistics is not None:
        for name in [name for name in chosen if name not in statistics]:
            skipped[name] = "did not run on the calibration text"
            del chosen[name]
    if not method.statistics:
        warnings.warn(DATA_FREE_WARNING, stacklevel=2)
    _require_layers(chosen, skipped)

    with clock("spectra"):
        options: dict[str, Options] = {}
        for name in _bar(list(chosen), "spectra", progress):
            weight = dense_weight(chosen[name]).detach()
            values = spectrum(weight, layer_metric(method, statistics, name, weight.device))
            options[name] = rank_options(selection.shapes[name], values, config.layout, config.rank_multiple)
            release_unused()
        choices = allocate(options, config.keep, allocation)
    before = _size(model)
    with clock("factors"), undo_on_error(model, chosen if restore_on_error else {}):
        for name in _bar([name for name in chosen if choices[name].rank], "factors", progress):
            module = chosen[name] if restore_on_error else chosen.pop(name)
            metric = layer_metric(method, statistics, name, dense_weight(module).device)
            replace_module_(model, name, factored_layer(module, metric, choices[name].rank, config.layout))
            span = (0, 0) if restore_on_error else page_span(dense_weight(module))
            del module, metric
            release_pages(span)
            release_unused()
        report = PruneReport(
            layers=tuple(_layer_reports(selection.shapes, choices, skipped, config.layout)),
            settings=_settings(config, allocation),
            calibration=statistics.facts.to_dict() if statistics is not None and method.statistics else {},
            model_parameters=(before[0], _size(model)[0]),
            model_bytes=(before[1], _size(model)[1]),
            seconds=clock.seconds,
        )
        _make_savable(model, config, report)
    return report


@dataclass(frozen=True)
class _Given:
    """What `prune_` was called with, beside model and config."""

    tokenizer: Any
    texts: Iterable[Any] | None
    windows: Tensor | None
    statistics: Statistics | None
    task: TaskExamples | None
    cache_dir: Path | None
    restore_on_error: bool
    progress: bool


def _prune_for_task_(model: nn.Module, config: EigenpruneConfig, given: _Given) -> PruneReport:
    """Remove what stands in the task's way, then compress what is left if `config.keep` asks for it."""
    selection = select_layers(model, config.skip)
    _require_layers(selection.chosen, selection.skipped)
    _check_weights(selection.chosen)
    clock, before = _Clock(), _size(model)
    with clock("texts"):
        task = given.task or named_task(model, config.task, given.tokenizer)
        windows, retention = given.windows, task.retention
        if windows is None and (retention is None or config.keep < 1):
            where = given.cache_dir or default_cache_dir()
            windows = _calibration(model, config, given.tokenizer, given.texts, None, where, given.progress).windows
        if retention is None and windows is not None:
            retention = windows[:RETENTION_WINDOWS, :RETENTION_WINDOW]
    without = [name for name, module in selection.chosen.items() if module.bias is None]
    with undo_on_error(model, {}), weights_kept(selection.chosen if given.restore_on_error else {}):
        with clock("removal"):
            removal = remove_(
                model,
                task.examples,
                retention=() if retention is None else retention,
                held_out=task.held_out,
                worth=find_method(config.method).worth,
                remove=DEFAULT_REMOVE if config.remove is None else config.remove,
                skip=config.skip,
                seed=config.seed,
                progress=given.progress,
                **dict(task.settings),
            )
        biases = [name for name in without if selection.chosen[name].bias is not None]
        removed = {name: int(mask.sum()) for name, mask in removal.removal.masks.items()}
        if config.keep < 1:
            rest = replace(config, method="kfac", task=None, remove=None)
            compressed = prune_(
                model,
                rest,
                windows=windows,
                statistics=given.statistics,
                cache_dir=given.cache_dir,
                restore_on_error=given.restore_on_error,
                progress=given.progress,
            )
            layers, calibration = compressed.layers, compressed.calibration
            clock.seconds |= compressed.seconds
        else:
            layers, calibration = dense_reports(selection.shapes, selection.skipped, removed), {}
        report = PruneReport(
            layers=layers,
            settings=_settings(config, config.allocation or find_method(config.method).allocation)
            | {"task": config.task, "remove": removal.settings["remove"]},
            calibration=calibration,
            model_parameters=(before[0], _size(model)[0]),
            model_bytes=(before[1], _size(model)[1]),
            seconds=clock.seconds,
            removal=removal,
        )
        _make_savable(model, config, report, biases)
    return report


def factored_layer(module: nn.Module, metric: Metric, rank: int, layout: str) -> LowRankLinear:
    """The layer that keeps the first `rank` components in `metric` of the dense `module`, in its dtype."""
    found = components(dense_weight(module).detach(), metric, rank)
    return layer_of_components(module, found, rank, layout)


def layer_of_components(module: nn.Module, found: Components, rank: int, layout: str) -> LowRankLinear:
    """As `factored_layer`, where the components of the dense `module` are known."""
    return layer_of_factors(module, *found.truncated(rank), layout)


def _settings(config: EigenpruneConfig, allocation: str) -> dict[str, Any]:
    names = ("keep", "method", "layout", "rank_multiple", "seed")
    return {name: getattr(config, name) for name in names} | {"allocation": allocation, "skip": list(config.skip)}


def _calibration(
    model: nn.Module,
    config: EigenpruneConfig,
    tokenizer: Any,
    texts: Iterable[Any] | None,
    windows: Tensor | None,
    cache_dir: Path,
    progress: bool,
) -> Calibration:
    """Calibration windows: of the caller, or by the config."""
    if windows is not None:
        return Calibration(windows, "token windows given by the caller")
    return calibration_windows(
        model,
        texts=texts,
        files=config.texts,
        source=config.calibration,
        tokenizer=tokenizer,
        count=config.windows,
        window=config.window,
        seed=config.seed,
        cache_dir=cache_dir,
        progress=progress,
    )


def _measured(
    model: nn.Module,
    config: EigenpruneConfig,
    layers: Mapping[str, nn.Module],
    calibration: Calibration,
    cache_dir: Path,
    progress: bool,
) -> Statistics:
    """The statistics that the method of `config` is made of."""
    return collect_statistics(
        model,
        calibration.windows,
        layers,
        kinds=find_method(config.method).statistics,
        cache_dir=cache_dir,
        seed=config.seed,
        source=calibration.source,
        sampling=calibration.sampling,
        progress=progress,
    )


def _require_layers(chosen: Mapping[str, nn.Module], skipped: Mapping[str, str]) -> None:
    if not chosen:
        raise ConfigError(f"no layer to prune: {sorted(set(skipped.values())) or 'the model has no linear layer'}")


def _check_weights(layers: Mapping[str, nn.Module]) -> None:
    for name, module in layers.items():
        weight = dense_weight(module)
        if weight.device.type == "meta":
            raise WeightError(
                f"{name} has no data on this machine (meta device, or offloaded to disk): prune the model in memory, "
                "save it, and offload when loading the pruned one"
            )
        if not weight.is_floating_point():
            raise WeightError(f"{name} is stored as {weight.dtype}: prune the model before it is quantised")
        finite = torch.isfinite(weight)
        if not finite.all():
            row, column = (~finite).nonzero()[0].tolist()
            count = int((~finite).sum())
            raise WeightError(f"{name} holds {count} NaN or infinite weights, the first at [{row}, {column}]")


def _layer_reports(
    shapes: Mapping[str, tuple[int, int]], choices: Mapping[str, Choice], skipped: Mapping[str, str], layout: str
) -> Iterator[LayerReport]:
    for name, shape in shapes.items():
        choice = choices.get(name)
        if choice is None:
            yield LayerReport(name, shape, "dense", min(shape), shape[0] * shape[1], None, skipped[name])
        elif choice.rank == 0:
            yield LayerReport(name, shape, "dense", min(shape), choice.cost, choice.loss, "worth all its parameters")
        else:
            yield LayerReport(name, shape, layout, choice.rank, choice.cost, choice.loss)


def _make_savable(model: nn.Module, config: EigenpruneConfig, report: PruneReport, biases: Sequence[str] = ()) -> None:
    """Give a transformers model the quantizer that saves it, found through transformers' own table."""
    from transformers import PreTrainedModel
    from transformers.quantizers.auto import AutoHfQuantizer

    if not isinstance(model, PreTrainedModel):
        return
    modules = {name: [module.layout, module.rank] for name, module in low_rank_layers(model).items()}
    provenance = base_facts(model) | {"calibration": report.calibration, "keep": report.keep, "versions": versions()}
    names = [Path(text).name for text in config.texts or ()]
    if names and report.calibration.get("source") == ", ".join(names):  # and not texts or windows of the caller
        provenance["texts"] = names
    source = report.calibration.get("source")
    saved = replace(
        config,
        texts=None,
        calibration=source if source in SOURCES else None,
        modules=modules,
        biases=biases,
        provenance=provenance,
        allocation=report.settings["allocation"],
    )
    quantizer = AutoHfQuantizer.from_config(saved, pre_quantized=True)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def _size(model: nn.Module) -> tuple[int, int]:
    """(parameters, bytes of parameters and saved buffers), shared ones once."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return parameters, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _bar(names: Any, title: str, progress: bool) -> Any:
    items = names.items() if isinstance(names, Mapping) else names
    return tqdm(items, desc=title, unit="layer", disable=not progress, leave=False)


class _Clock:
    """Seconds spent in named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start
