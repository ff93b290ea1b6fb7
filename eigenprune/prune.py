# SPDX-License-Identifier: Apache-2.0
"""`prune_`: the main path, from a dense model to a factored one."""

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
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
    default_cache_dir,
)
from eigenprune.calibrate.cache import cache_key
from eigenprune.config import EigenpruneConfig
from eigenprune.errors import ConfigError, WeightError
from eigenprune.evaluate import layer_times
from eigenprune.layers import (
    dense_weight,
    factored_parameters,
    low_rank_layers,
    replace_module_,
    select_layers,
)
from eigenprune.memory import page_span, release_pages, release_unused
from eigenprune.report import LayerReport, PruneReport, base_facts, versions
from eigenprune.spectral import (
    ALLOCATIONS,
    MOST_BYTES,
    Allocation,
    Choice,
    Cost,
    Decomposed,
    Options,
    component_bytes,
    find_method,
    gather_evidence,
    layer_cost,
    layer_of_factors,
    method_statistics,
    rank_options,
    solve_allocation,
)

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
    cache_dir: Path | None = None,
    restore_on_error: bool = True,
    progress: bool = True,
) -> PruneReport:
    """Prune `model` in place: choose ranks for all its linear layers under one budget, and factor them.

    Everything that can fail is done before the first layer changes. A transformers model can then be saved with its own
    `save_pretrained`, and loads again with plain `from_pretrained`.

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
    allocation = config.allocation or method.allocation
    clock = _Clock()
    if low_rank_layers(model):
        raise ConfigError("the model is pruned already; prune the dense model, or turn this one back with to_dense_")
    selection = select_layers(model, config.skip)
    chosen, skipped = selection.chosen, selection.skipped  # not copies: a factored layer's weight must go
    _require_layers(chosen, skipped)
    _check_weights(chosen)

    row = ALLOCATIONS[allocation]
    where = cache_dir or default_cache_dir()
    own = statistics is None  # measured here, so that what is made of them has a name in the cache
    if (method.statistics and own) or (row.needs and windows is None and own):
        with clock("texts"):
            calibration = _calibration(model, config, tokenizer, texts, windows, where, progress)
        windows = calibration.windows
        with clock("statistics"):
            statistics, gradients = _measured(model, config, row.needs, chosen, calibration, where, progress)
    else:
        gradients = statistics
    if method.statistics and statistics is not None:
        for name in [name for name in chosen if name not in statistics]:
            skipped[name] = "did not run on the calibration text"
            del chosen[name]
    if not method.statistics:
        warnings.warn(DATA_FREE_WARNING.replace("'svd'", repr(config.method), 1), stacklevel=2)
    _require_layers(chosen, skipped)

    folder = _components_folder(model, config, chosen, statistics, where) if own and statistics is not None else None
    decomposed = Decomposed(method, statistics, config.seed, folder)
    with clock("spectra"):
        options = _options(chosen, decomposed, config, where, progress)
    with clock("allocation"):
        found = _allocation(model, chosen, options, decomposed, config, allocation, gradients, windows, where, progress)
    before = _size(model)
    with clock("factors"), _undo_on_error(model, chosen if restore_on_error else {}):
        for name in _bar([name for name in chosen if found.choices[name].rank], "factors", progress):
            module = chosen[name] if restore_on_error else chosen.pop(name)
            rank = found.choices[name].rank
            left, right = decomposed.components(name, module, rank).truncated(rank)
            replace_module_(model, name, layer_of_factors(module, left, right, config.layout))
            span = (0, 0) if restore_on_error else page_span(dense_weight(module))
            del module, left, right
            release_pages(span)
            release_unused()
        report = PruneReport(
            layers=tuple(_layer_reports(selection.shapes, found.choices, skipped, config.layout)),
            settings=_settings(config, found, allocation),
            calibration=statistics.facts.to_dict() if statistics is not None and method.statistics else {},
            model_parameters=(before[0], _size(model)[0]),
            model_bytes=(before[1], _size(model)[1]),
            seconds=clock.seconds,
        )
        _make_savable(model, config, report)
    return report


def _options(
    chosen: Mapping[str, nn.Module], decomposed: Decomposed, config: EigenpruneConfig, where: Path, progress: bool
) -> dict[str, Options]:
    """What every rank of every layer costs, in the unit of the budget, and loses."""
    options: dict[str, Options] = {}
    for name in _bar(list(chosen), "spectra", progress):
        found = decomposed.spectrum(name, chosen[name])
        weight = dense_weight(chosen[name])
        shape = (weight.shape[0], weight.shape[1])
        options[name] = rank_options(
            shape,
            found,
            config.layout,
            config.rank_multiple,
            cost=_cost(config, shape, weight, where),
            min_keep=config.min_keep,
        )
        release_unused()
    return options


def _allocation(
    model: nn.Module,
    chosen: Mapping[str, nn.Module],
    options: Mapping[str, Options],
    decomposed: Decomposed,
    config: EigenpruneConfig,
    allocation: str,
    gradients: Statistics | None,
    windows: Tensor | None,
    where: Path,
    progress: bool,
) -> Allocation:
    """The ranks, after measuring what the allocation needs to choose them."""
    evidence = gather_evidence(
        ALLOCATIONS[allocation].needs,
        model,
        chosen,
        options,
        decomposed,
        layout=config.layout,
        gradients=gradients,
        windows=windows,
        cache_dir=where,
        progress=progress,
    )
    return solve_allocation(options, config.keep, allocation, evidence)


def _cost(config: EigenpruneConfig, shape: tuple[int, int], weight: Tensor, where: Path) -> Cost:
    if config.budget == "latency":
        return layer_times(shape, config.layout, dtype=weight.dtype, device=weight.device, cache_dir=where).cost
    return layer_cost(config.budget, shape, config.layout, weight.element_size())


def _components_folder(
    model: nn.Module,
    config: EigenpruneConfig,
    chosen: Mapping[str, nn.Module],
    statistics: Statistics,
    where: Path,
) -> Path | None:
    """Where the components of this model by this method are kept for the next budget; None where they are too many."""
    if component_bytes(chosen) > MOST_BYTES:
        return None
    settings = [
        repr(find_method(config.method)),
        str(config.seed),
        str(config.prior),
        *map(str, vars(statistics.facts).values()),
    ]
    return where / f"components-{cache_key(model, statistics.facts.texts_hash, settings)}"


def _settings(config: EigenpruneConfig, found: Allocation, allocation: str) -> dict[str, Any]:
    names = ("keep", "budget", "min_keep", "prior", "method", "layout", "rank_multiple", "seed")
    settings = {name: getattr(config, name) for name in names} | {"allocation": allocation, "skip": list(config.skip)}
    return settings if found.gap is None else settings | {"allocation_gap": found.gap}


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
    need: str,
    layers: Mapping[str, nn.Module],
    calibration: Calibration,
    cache_dir: Path,
    progress: bool,
) -> tuple[Statistics | None, Statistics | None]:
    """The statistics that the method is made of, and those with the gradients that the allocation needs."""
    return method_statistics(
        model,
        layers,
        find_method(config.method),
        calibration,
        need=need,
        prior=config.prior,
        cache_dir=cache_dir,
        seed=config.seed,
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


@contextmanager
def _undo_on_error(model: nn.Module, dense: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put the `dense` layers and the attributes of model and config back if anything fails, an interrupt included."""
    configs = (getattr(part, "config", None) for part in model.modules())
    owners = [model, *(config for config in configs if hasattr(config, "__dict__"))]
    attributes = [(vars(owner), dict(vars(owner))) for owner in owners]
    try:
        yield
    except BaseException:
        for name, module in dense.items():
            replace_module_(model, name, module)
        for now, then in attributes:
            now.clear()
            now.update(then)
        raise


def _layer_reports(
    shapes: Mapping[str, tuple[int, int]], choices: Mapping[str, Choice], skipped: Mapping[str, str], layout: str
) -> Iterator[LayerReport]:
    for name, shape in shapes.items():
        choice = choices.get(name)
        if choice is None:
            yield LayerReport(name, shape, "dense", min(shape), shape[0] * shape[1], None, skipped[name])
        elif choice.rank == 0:
            yield LayerReport(name, shape, "dense", min(shape), shape[0] * shape[1], choice.loss, "worth all its cost")
        else:
            parameters = factored_parameters(choice.rank, *shape, layout)
            yield LayerReport(name, shape, layout, choice.rank, parameters, choice.loss)


def _make_savable(model: nn.Module, config: EigenpruneConfig, report: PruneReport) -> None:
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
