# SPDX-License-Identifier: Apache-2.0
"""Run a model over token windows and sum the statistics of its layers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eigenprune.calibrate.accumulate import Accumulator, inner_positions
from eigenprune.calibrate.cache import PassFile, cache_key, windows_hash
from eigenprune.calibrate.checkpointing import checkpointed_blocks
from eigenprune.calibrate.inputs import shared_inputs
from eigenprune.calibrate.kl_curvature import named_objective
from eigenprune.calibrate.objective import Objective, model_inputs, objective_for
from eigenprune.calibrate.statistics import Facts, SafetensorsFolder, Statistics
from eigenprune.errors import CalibrationError, WeightError
from eigenprune.layers import dense_weight
from eigenprune.memory import release_unused

KINDS = ("input_gram", "output_gram", "weight_gradient", "weight_gradient_square")


@dataclass(frozen=True)
class Plan:
    """One pass over the windows: whose inputs and whose outputs it sums."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def collect_statistics(
    model: nn.Module,
    windows: Tensor,
    layers: Mapping[str, nn.Module],
    *,
    kinds: Sequence[str] = ("input_gram", "output_gram"),
    cache_dir: Path | None = None,
    memory_bytes: int = 8 << 30,
    seed: int = 0,
    source: str = "",
    sampling: Mapping[str, Any] | None = None,
    objective: str | None = None,
    progress: bool = True,
) -> Statistics:
    """Statistics of `layers` over token `windows`, summed in float32 while they stream by.

    Runs one window at a time, in bfloat16 where this machine multiplies it in hardware (statistics are summed in
    float32 all the same). `output_gram` and `weight_gradient` also run backward, to the activations only.

    Memory: the sums of one pass, at most `memory_bytes` (and at least those of the largest layer), plus the
    activations of one window. Where the sums of all layers take more, the windows are read in several passes, and
    finished sums wait on disk.

    Args:
        model: a transformers model; weights, gradient flags and mode are as before afterwards.
        windows: [windows, window] int64 token ids.
        layers: the dense layers to measure, by name.
        kinds: of `input_gram` (with means), `output_gram`, `weight_gradient` (with the mean output gradient),
            `weight_gradient_square`.
        cache_dir: where finished and half-finished sums are kept, in a folder named after a hash of model, windows
            and settings; a killed run goes on where it last saved. None keeps all in memory, in one pass.
        memory_bytes: bound on the sums held at once, in bytes.
        seed: of the labels drawn for models without text labels.
        source: a word on where the texts come from, for the report.
        sampling: how they were sampled, if they were, for the report.
        objective: what the gradients are of: None for the model's own loss, or `top-tokens-kl` for draws whose second
            moments are the curvature of the KL divergence over the likeliest tokens, see `top_tokens_kl`.
        progress: show a bar on standard error.

    Raises:
        CalibrationError: no windows, token ids outside the vocabulary, or a model that cannot run on them.
        WeightError: a layer saw or produced NaN or infinity.
    """
    _check_arguments(model, windows, layers, kinds)
    name, wanted = objective_for(model) if objective is None else (objective, named_objective(objective))
    backward = any(kind != "input_gram" for kind in kinds)
    with calibration_mode(model, backward) as autocast_dtype:
        groups = shared_inputs(model, windows[:1].to(_device(model)), layers)
        outputs = [layer for layer in groups if backward]
        facts = Facts(
            tokens=windows.numel(),
            output_tokens=_output_tokens(windows, name) if backward else 0,
            windows=windows.shape[0],
            window=windows.shape[1],
            objective=name if backward else "none",
            compute_dtype=str(autocast_dtype or _dtype(model)).removeprefix("torch."),
            texts_hash=windows_hash(windows),
            source=source,
            sampling=dict(sampling or {}),
        )
        if cache_dir is None:
            plans = [Plan(tuple(dict.fromkeys(groups.values())), tuple(outputs))]
        else:
            plans = plan_passes(layers, groups, kinds, memory_bytes)
            settings = [*sorted(kinds), facts.objective, facts.compute_dtype, str(seed), repr(sorted(groups.items()))]
            folder = cache_dir / cache_key(model, facts.texts_hash, settings)
            folder.mkdir(parents=True, exist_ok=True)
        files: list[Path] = []
        tensors: Mapping[str, Tensor] = {}
        for number, plan in enumerate(plans):
            own = objective is None  # else the formula knows no edges and no outliers
            accumulator = Accumulator(layers, plan.inputs, plan.outputs, kinds, name == "next-token", clip=own)
            saved = None if cache_dir is None else PassFile(folder, number, plan.inputs + plan.outputs)
            title = "calibrating" if len(plans) == 1 else f"calibrating, pass {number + 1} of {len(plans)}"
            _run_pass(model, windows, accumulator, wanted if backward else None, saved, seed, title, progress)
            if saved is None:
                tensors = accumulator.to_means_()
            else:
                files.append(saved.finished)
            del accumulator  # before the next one asks for as much memory
    if files:
        tensors = SafetensorsFolder(files)
    return Statistics(tensors, groups, facts)


def plan_passes(
    layers: Mapping[str, nn.Module], groups: Mapping[str, str], kinds: Sequence[str], memory_bytes: int
) -> list[Plan]:
    """Split the sums of all layers, in model order, into passes of at most `memory_bytes` each."""
    plans: list[Plan] = []
    inputs: list[str] = []
    outputs: list[str] = []
    used = 0
    for layer, group in groups.items():
        out_features, in_features = dense_weight(layers[layer]).shape
        leads = layer == group and "input_gram" in kinds
        size = 4 * in_features**2 * leads
        size += 4 * out_features**2 * ("output_gram" in kinds) + 4 * out_features * in_features * (
            "weight_gradient" in kinds
        )
        size += 4 * in_features * ("weight_gradient_square" in kinds)
        if used and used + size > memory_bytes:
            plans.append(Plan(tuple(inputs), tuple(outputs)))
            inputs, outputs, used = [], [], 0
        if leads:
            inputs.append(layer)
        if size > 4 * in_features**2 * leads:
            outputs.append(layer)
        used += size
    return [*plans, Plan(tuple(inputs), tuple(outputs))]


def _run_pass(
    model: nn.Module,
    windows: Tensor,
    accumulator: Accumulator,
    objective: Objective | None,
    saved: PassFile | None,
    seed: int,
    title: str,
    progress: bool,
) -> None:
    """Sum over all windows not yet summed, save now and then, and write the means at the end."""
    if saved is not None and saved.is_finished():
        return
    start = 0 if saved is None else saved.resume(accumulator, len(windows))
    generator = torch.Generator()
    device = _device(model)
    bar = tqdm(total=len(windows), initial=start, desc=title, unit="window", disable=not progress, leave=False)
    with bar, accumulator.watching():
        for index in range(start, len(windows)):
            generator.manual_seed(seed * 1_000_003 + index)  # by window, so that a resumed run draws the same labels
            ids = windows[index : index + 1].to(device)
            if objective is None:
                with torch.no_grad():
                    model(**model_inputs(model, ids))
            else:
                loss = objective(model, ids, generator)
                with accumulator.recomputing():
                    loss.backward()
            accumulator.check_finite(index)
            release_unused()
            bar.update()
            if saved is not None and index + 1 < len(windows):
                saved.save_now_and_then(accumulator, index + 1)
    if saved is not None:
        saved.finish(accumulator.to_means_())


def _output_tokens(windows: Tensor, objective: str) -> int:
    count, window = windows.shape
    return count * len(range(window)[inner_positions(window, objective == "next-token")])


def _check_arguments(model: nn.Module, windows: Tensor, layers: Mapping[str, nn.Module], kinds: Sequence[str]) -> None:
    if windows.ndim != 2 or windows.numel() == 0:
        raise CalibrationError(
            f"calibration windows of shape {tuple(windows.shape)}: [windows, window] with tokens is needed"
        )
    unknown = set(kinds) - set(KINDS)
    if unknown or not kinds:
        raise CalibrationError(f"unknown statistics {sorted(unknown)}; there are: {', '.join(KINDS)}")
    config: Any = getattr(model, "config", None)
    vocabulary = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
    worst = int(windows.min()) if int(windows.min()) < 0 else int(windows.max())
    if vocabulary and not 0 <= worst < vocabulary:
        raise CalibrationError(
            f"token id {worst} is outside the model's vocabulary of {vocabulary}: is this its tokenizer?"
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise WeightError(
                f"{name} is on the meta device, so it cannot be measured: load the model on a real device"
            )
    if not layers:
        raise CalibrationError("no layer to measure")


@contextmanager
def calibration_mode(
    model: nn.Module, backward: bool, *, checkpointing: bool = True, autocast: bool = True
) -> Iterator[torch.dtype | None]:
    """Evaluation mode, gradients to activations only, bfloat16 where the machine has it; all restored afterwards.

    Args:
        backward: whether gradients are wanted.
        checkpointing: whether blocks are computed again in backward, to save memory.
        autocast: whether bfloat16 may be used.

    Yields the dtype of autocast, or None where the model runs as it is.
    """
    training = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    dtype = torch.bfloat16 if _dtype(model) == torch.float32 and has_fast_bfloat16(_device(model)) else None
    dtype = dtype if autocast else None
    try:
        with ExitStack() as stack:
            model.eval()
            for parameter in wanted:
                parameter.requires_grad_(False)
            if backward:
                for embeddings in _input_embeddings(model):
                    handle = embeddings.register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
                    stack.callback(handle.remove)
                if checkpointing:
                    stack.enter_context(checkpointed_blocks(model))
            if dtype is not None:
                stack.enter_context(torch.autocast(_device(model).type, dtype))
            yield dtype
    finally:
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
        for module, flag in training.items():
            module.training = flag


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    """The input embeddings, and those tied to them: a T5 has one module for the encoder and one for the decoder."""
    named: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    tied = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is named.weight and m is not named]
    return [named, *tied]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 in hardware, so that calibration in it is faster."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return False


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
