# SPDX-License-Identifier: Apache-2.0
"""How far the model's own loss rises when one layer is pruned, as a multiple of what the metric estimates."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from eigenprune.calibrate import (
    BlockChain,
    Statistics,
    cache_key,
    calibration_mode,
    find_chain,
    model_inputs,
    save_tensors,
    windows_hash,
)
from eigenprune.errors import WeightError
from eigenprune.layers import dense_like, dense_weight, is_conv1d, replace_module_
from eigenprune.memory import release_unused
from eigenprune.spectral.decompose import components
from eigenprune.spectral.methods import Method
from eigenprune.spectral.metric import layer_metric
from eigenprune.spectral.worth import Options

# A layer is tried at the rank whose estimated loss is nearest to this, in nats per token: that of one of some 200
# layers at a keep of 0.5, and far above rounding.
TRIAL_LOSS = 0.005
TRIAL_WINDOWS, TRIAL_WINDOW = 2, 256  # tokens of the calibration text that are tried: the ends of evenly spaced windows
MOST_BLOCKS = 11  # blocks that are measured; those between are interpolated, since what is wrong varies slowly
LARGEST_SCALE = 32.0  # either way; beyond, one of the two numbers is noise


def probed_scales(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    options: Mapping[str, Options],
    method: Method,
    statistics: Statistics,
    windows: Tensor,
    *,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """What to multiply the losses of `options` by, for every layer, so that they say what the model says.

    A layer of every measured block is pruned alone, at one rank, and the KL divergence of the model's predictions from
    those of the dense one is divided by the estimate (LEMS, 2026, measures each matrix at one rank too). In between,
    the logarithm is interpolated over the blocks, among layers of one name. Layers outside the chain of blocks get the
    geometric mean of all; where the blocks cannot run on their own, see `find_chain`, or the model has no logits, all
    get 1.

    Args:
        layers: the dense layers by name; the model is as before afterwards.
        options: their ranks with estimated losses, of a metric in nats.
        statistics: those of the estimate.
        windows: [windows, window] int64 token ids.
        cache_dir: where the result is kept, for any budget.
    """
    chosen = _ends(windows)
    key = [repr(method), statistics.facts.texts_hash, repr(sorted(layers)), str(TRIAL_LOSS), str(MOST_BLOCKS)]
    file = (
        None if cache_dir is None else cache_dir / f"scales-{cache_key(model, windows_hash(chosen), key)}.safetensors"
    )
    known = _read(file, layers)
    if known is not None:
        return known
    measured = _measured(model, layers, options, method, statistics, chosen, progress)
    scales = _between(measured, layers)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({name: torch.tensor(scale, dtype=torch.float64) for name, scale in scales.items()}, file)
    return scales


def scaled(options: Mapping[str, Options], scales: Mapping[str, float]) -> dict[str, Options]:
    """The `options` with their losses times their scales."""
    return {name: Options(o.ranks, o.costs, o.losses * scales[name]) for name, o in options.items()}


def _measured(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    options: Mapping[str, Options],
    method: Method,
    statistics: Statistics,
    windows: Tensor,
    progress: bool,
) -> dict[tuple[int, str], float]:
    """{(block, layer): logarithm of the measured over the estimated loss}; of no layer where it cannot be measured."""
    windows = windows.to(next(model.parameters()).device)
    found: dict[tuple[int, str], float] = {}
    with calibration_mode(model, backward=False, autocast=False), torch.no_grad():
        chain = find_chain(model, windows, layers)
        if chain is None:
            return {}
        hidden = chain.first_hidden(model, windows)
        dense = _predictions(model, chain, windows, 0, hidden)
        if dense is None:
            return {}
        wanted = {round(i * (len(chain.names) - 1) / (MOST_BLOCKS - 1)) for i in range(MOST_BLOCKS)}
        orders = [order if block in wanted else () for block, order in enumerate(chain.orders)]
        tasks = [[name for name in order if _has_ranks(options.get(name))] for order in orders]
        with tqdm(total=sum(map(len, tasks)), desc="probing", unit="layer", disable=not progress, leave=False) as bar:
            for block, names in enumerate(tasks):
                for name in names:
                    trial, estimate = _trial(layers[name], name, options[name], method, statistics)
                    with _replaced(model, name, trial):
                        pruned = _predictions(model, chain, windows, block, hidden)
                    rise = math.nan if pruned is None else _divergence(dense, pruned)
                    if not math.isfinite(rise):
                        raise WeightError(f"{name}: the model's predictions are NaN or infinite once it is pruned")
                    if estimate > 0 and rise > 0:
                        limit = math.log(LARGEST_SCALE)
                        found[block, name] = min(max(math.log(rise / estimate), -limit), limit)
                    release_unused()
                    bar.update()
                hidden = chain.run(model, block, hidden)
    return found


def _has_ranks(options: Options | None) -> bool:
    return options is not None and bool((options.ranks > 0).any())


def _trial(
    module: nn.Module, name: str, options: Options, method: Method, statistics: Statistics
) -> tuple[nn.Module, float]:
    """The dense layer of the product of the factors at the rank of the trial, and the loss estimated for it."""
    factored = options.ranks > 0
    distance = torch.where(factored, (options.losses.clamp_min(1e-30) / TRIAL_LOSS).log().abs(), torch.inf)
    index = int(distance.argmin())
    weight = dense_weight(module)
    metric = layer_metric(method, statistics, name, weight.device)
    left, right = components(weight.detach(), metric, int(options.ranks[index])).truncated(int(options.ranks[index]))
    product = (left @ right).to(weight.dtype)
    bias = module.bias if isinstance(module.bias, Tensor) else None
    return dense_like(product, bias, conv1d=is_conv1d(module)), float(options.losses[index])


def _predictions(
    model: nn.Module, chain: BlockChain, windows: Tensor, block: int, hidden: Sequence[Tensor]
) -> list[Tensor] | None:
    """Log-probabilities of every position of every window, the model run from `block` on; None without logits."""
    states = list(hidden)
    for number in range(block, len(chain.names)):
        states = chain.run(model, number, states)
    predictions = []
    for ids, state in zip(windows.split(1), states, strict=True):
        with chain.ended_with(model, state):
            logits = getattr(model(**model_inputs(model, ids)), "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
            return None
        predictions.append(logits[0].float().log_softmax(-1))
    return predictions


def _divergence(dense: Sequence[Tensor], pruned: Sequence[Tensor]) -> float:
    """Mean KL divergence of the pruned predictions from the dense ones, in nats per position."""
    total = sum(float((p.exp() * (p - q)).sum(dtype=torch.float64)) for p, q in zip(dense, pruned, strict=True))
    return total / sum(len(p) for p in dense)


def _between(measured: Mapping[tuple[int, str], float], layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """Scales of all `layers`, from the logarithms of the measured ones."""
    if not measured:
        return dict.fromkeys(layers, 1.0)
    mean = sum(measured.values()) / len(measured)
    points: dict[str, list[tuple[int, float]]] = {}
    for (_, name), value in measured.items():
        kind, number = _place(name)
        points.setdefault(kind, []).append((number, value))
    scales = {}
    for name in layers:
        kind, number = _place(name)
        scales[name] = math.exp(_interpolated(sorted(points[kind]), number) if kind in points else mean)
    return scales


def _place(name: str) -> tuple[str, int]:
    """A layer's name without its first number, and that number, which is its block's."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return (name, 0) if index is None else (".".join(parts[:index] + parts[index + 1 :]), int(parts[index]))


def _interpolated(points: Sequence[tuple[int, float]], number: int) -> float:
    """Linear between neighbours, level outside."""
    below = [point for point in points if point[0] <= number]
    above = [point for point in points if point[0] >= number]
    if not below or not above:
        return (below or above)[-1 if below else 0][1]
    (left, low), (right, high) = below[-1], above[0]
    return low if left == right else low + (high - low) * (number - left) / (right - left)


def _ends(windows: Tensor) -> Tensor:
    """The last TRIAL_WINDOW tokens of evenly spaced windows."""
    count = min(TRIAL_WINDOWS, len(windows))
    rows = [(2 * index + 1) * len(windows) // (2 * count) for index in range(count)]
    return windows[rows, -TRIAL_WINDOW:]


def _read(file: Path | None, layers: Mapping[str, nn.Module]) -> dict[str, float] | None:
    """The scales in `file`, if they are there and whole."""
    if file is None or not file.exists():
        return None
    try:
        found = load_file(file)
        scales = {name: float(found[name]) for name in layers}
    except (SafetensorError, KeyError):
        file.unlink()
        return None
    return scales if all(math.isfinite(scale) and scale > 0 for scale in scales.values()) else None


@contextmanager
def _replaced(model: nn.Module, name: str, new: nn.Module) -> Iterator[None]:
    old = model.get_submodule(name)
    with ExitStack() as stack:
        stack.callback(replace_module_, model, name, old)
        replace_module_(model, name, new)
        yield
