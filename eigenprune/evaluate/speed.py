# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of a causal language model: greedy decoding with a KV cache, and prefill.

Wall time on a shared machine drifts. So models that are to be compared are measured in one run that takes
turns (`compare_decode`), all samples are kept, and a ratio is taken per turn (`speed_ratio`).
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eigenprune.errors import CalibrationError, ConfigError
from eigenprune.evaluate._mode import evaluation, input_device, vocabulary_size


@dataclass(frozen=True)
class Speed:
    """One model's speed in one run.

    what: "decode" (one new token at a time, from a cache) or "prefill" (a whole prompt at once).
    tokens_per_second: batch * tokens / seconds, the median over the repeats; p20, p80: its percentiles.
    batch: sequences at once. tokens: new tokens, or prompt tokens, of each sequence.
    threads: CPU threads of one torch operator. dtype, device: of the model's first parameter with data.
    repeats: timed runs, after one warm-up. samples: their tokens per second, in the order they ran.
    """

    what: Literal["decode", "prefill"]
    tokens_per_second: float
    p20: float
    p80: float
    batch: int
    tokens: int
    threads: int
    dtype: str
    device: str
    repeats: int
    samples: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return dataclasses.asdict(self)


def decode_speed(model: nn.Module, prompt_ids: Tensor, new_tokens: int = 32, repeats: int = 5) -> Speed:
    """Measure greedy decoding: `new_tokens` steps of one token after the prompt.

    prompt_ids: integers `[n]` or `[batch, n]`, no padding; read before the clock starts. Raises as
    `compare_decode`.
    """
    return compare_decode({"model": model}, prompt_ids, new_tokens, repeats)["model"]


def compare_decode(
    models: Mapping[str, nn.Module], prompt_ids: Tensor, new_tokens: int = 32, repeats: int = 5
) -> dict[str, Speed]:
    """`decode_speed` of several models in one run: in each repeat they take turns, in alternating order.

    Each model stays on its device and gets its modes back. Raises `ConfigError` for no model, or `new_tokens`
    or `repeats` below 1, and `CalibrationError` for an empty prompt or one that is no integer tensor.
    """
    _check_counts(new_tokens=new_tokens, repeats=repeats, models=len(models))
    prompt = _as_batch(prompt_ids)
    trials = {name: partial(_time_decode, model, prompt, new_tokens) for name, model in models.items()}
    seconds = _take_turns(trials, repeats)
    return {name: _summary("decode", model, len(prompt), new_tokens, seconds[name]) for name, model in models.items()}


def prefill_speed(model: nn.Module, tokens: int = 512, repeats: int = 5) -> Speed:
    """Measure reading one prompt of `tokens` seeded random ids into a fresh cache, as generation does.

    Only the last position's logits are asked for where the model can do that. Raises as `compare_prefill`.
    """
    return compare_prefill({"model": model}, tokens, repeats)["model"]


def compare_prefill(models: Mapping[str, nn.Module], tokens: int = 512, repeats: int = 5) -> dict[str, Speed]:
    """Measure `prefill_speed` of several models in turns, so that their ratio is fair on a noisy machine.

    Raises `ConfigError` for no model, `tokens` or `repeats` below 1, or a model whose vocabulary is unknown.
    """
    _check_counts(tokens=tokens, repeats=repeats, models=len(models))
    sizes = {name: vocabulary_size(model) for name, model in models.items()}
    for name, size in sizes.items():
        if size is None:
            raise ConfigError(f"{type(models[name]).__name__} has no get_input_embeddings(): a prompt cannot be made")
    smallest = min(size for size in sizes.values() if size is not None)
    prompt = torch.randint(smallest, (1, tokens), generator=torch.Generator().manual_seed(0))
    seconds = _take_turns({name: partial(_time_prefill, model, prompt) for name, model in models.items()}, repeats)
    return {name: _summary("prefill", model, 1, tokens, seconds[name]) for name, model in models.items()}


def speed_ratio(new: Speed, base: Speed) -> tuple[float, float, float]:
    """How many times as fast `new` is: median, 20th and 80th percentile over the turns of one run.

    Raises `ConfigError` if the two are not of the same kind, batch, length and number of repeats.
    """
    kinds = [(speed.what, speed.batch, speed.tokens, speed.repeats) for speed in (new, base)]
    if kinds[0] != kinds[1]:
        raise ConfigError(f"speeds of different runs do not compare: {kinds[0]} and {kinds[1]}")
    return _percentiles([mine / other for mine, other in zip(new.samples, base.samples, strict=True)])


def _time_decode(model: nn.Module, prompt: Tensor, new_tokens: int) -> float:
    """Seconds for `new_tokens` greedy steps after `prompt [batch, n]`."""
    with evaluation(model):
        device = input_device(model)
        output = _prefill(model, prompt.to(device))
        cache, token = output.past_key_values, _greedy(output, device)
        began = _clock(device)
        for _ in range(new_tokens):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache, token = output.past_key_values, _greedy(output, device)
        return _clock(device) - began


def _time_prefill(model: nn.Module, prompt: Tensor) -> float:
    """Seconds to read `prompt [batch, n]` into a fresh cache."""
    with evaluation(model):
        device = input_device(model)
        ids = prompt.to(device)
        began = _clock(device)
        _prefill(model, ids)
        return _clock(device) - began


def _prefill(model: nn.Module, ids: Tensor) -> Any:
    """Read a prompt; the result has `.logits` (of the last position at least) and `.past_key_values`."""
    last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"logits_to_keep": 1} if last_only else {}
    return model(input_ids=ids, use_cache=True, **options)


def _greedy(output: Any, device: torch.device) -> Tensor:
    """The most likely next token of each sequence, `[batch, 1]`."""
    token: Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
    return token.to(device)


def _clock(device: torch.device) -> float:
    """Seconds, read after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _take_turns(trials: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run each trial once untimed, then `repeats` rounds over all of them, every second round backwards."""
    for trial in trials.values():
        trial()
    seconds: dict[str, list[float]] = {name: [] for name in trials}
    for repeat in range(repeats):
        names = list(trials)
        for name in names if repeat % 2 == 0 else names[::-1]:
            seconds[name].append(trials[name]())
    return seconds


def _summary(
    what: Literal["decode", "prefill"], model: nn.Module, batch: int, tokens: int, seconds: list[float]
) -> Speed:
    """Median and spread of the samples, with the facts that belong beside them."""
    samples = tuple(batch * tokens / second for second in seconds)
    middle, low, high = _percentiles(list(samples))
    floating = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return Speed(
        what=what,
        tokens_per_second=middle,
        p20=low,
        p80=high,
        batch=batch,
        tokens=tokens,
        threads=torch.get_num_threads(),
        dtype=str(next(floating, "none")).removeprefix("torch."),
        device=str(input_device(model)),
        repeats=len(seconds),
        samples=samples,
    )


def _percentiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile, with linear interpolation."""
    points = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    middle, low, high = torch.quantile(torch.tensor(values, dtype=torch.float64), points).tolist()
    return middle, low, high


def _as_batch(prompt_ids: Tensor) -> Tensor:
    """`[n]` or `[batch, n]` integers as `[batch, n]` int64."""
    integers = prompt_ids.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
    if not integers or prompt_ids.dim() not in (1, 2):
        found = f"{prompt_ids.dtype} of shape {list(prompt_ids.shape)}"
        raise CalibrationError(f"prompt ids must be integers [n] or [batch, n], got {found}")
    if prompt_ids.numel() == 0:
        raise CalibrationError("the prompt is empty: give at least one token")
    return prompt_ids.reshape(-1, prompt_ids.shape[-1]).to(torch.int64)


def _check_counts(**counts: int) -> None:
    """Every count must be at least 1."""
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} is {count}: it must be at least 1")
