# SPDX-License-Identifier: Apache-2.0
"""Factor a model's layers one after another, each for the inputs that the factored ones before it give."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from eigenprune.calibrate import ShiftedMoments, Statistics, cache_key, save_tensors, sequential_moments, windows_hash
from eigenprune.layers import LowRankLinear, dense_weight, replace_module_
from eigenprune.memory import page_span, release_pages, release_unused
from eigenprune.spectral.decompose import components
from eigenprune.spectral.factored import layer_of_factors, layer_of_parts
from eigenprune.spectral.methods import Method
from eigenprune.spectral.metric import Metric, output_root
from eigenprune.spectral.shifted import retained_beta, shifted_target

# Tokens on which the shift of the inputs is measured: 12 windows of 1024 are what was tried on SmolLM2-135M-Instruct. A
# window takes longer here than in the statistics that come before, so not all of them are taken.
SHIFT_TOKENS = 12_288


def factor_sequentially_(
    model: nn.Module,
    layers: dict[str, nn.Module],
    ranks: Mapping[str, int],
    method: Method,
    statistics: Statistics,
    windows: Tensor,
    layout: str,
    *,
    most_tokens: int = SHIFT_TOKENS,
    cache_dir: Path | None = None,
    keep_dense: bool = True,
    progress: bool = True,
) -> None:
    """Replace the `layers` of the chain of blocks of `model`, in place, at their `ranks`; leaves the others dense.

    Args:
        layers: the dense layers by name; without `keep_dense`, those that were replaced are taken out.
        ranks: of the layers to replace, at least 1.
        method: a row with a `shift`.
        statistics: of the dense model, for the output side.
        windows: [windows, window] int64 token ids, run through the dense and the pruned blocks.
        most_tokens: evenly spaced ones of the `windows` are taken, as many as this allows, and at least one.
        cache_dir: where finished layers wait, so that a killed run goes on behind them; emptied at the end.
    """
    windows = _some(windows, max(1, most_tokens // windows.shape[1]))
    settings = [repr(method), layout, repr(sorted(ranks.items())), statistics.facts.texts_hash]
    folder = None if cache_dir is None else cache_dir / f"factors-{cache_key(model, windows_hash(windows), settings)}"
    wanted = {name: module for name, module in layers.items() if name in ranks}
    done = {} if folder is None else _finished(folder, wanted)
    for moments in sequential_moments(model, windows, wanted, statistics.input_group, done=done, progress=progress):
        new: dict[str, LowRankLinear] = {}
        for name in moments.layers:
            new[name] = _factored(wanted[name], name, moments, ranks[name], method, statistics, layout)
            release_unused()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            save_tensors(_tensors(new), folder / f"{moments.layers[0]}.safetensors")
        for name, layer in new.items():
            replace_module_(model, name, layer)
            if not keep_dense:
                span = page_span(dense_weight(wanted.pop(name)))
                del layers[name]
                release_pages(span)
    if folder is not None and folder.exists():
        for file in folder.glob("*.safetensors"):
            file.unlink()
        folder.rmdir()


def _some(windows: Tensor, count: int) -> Tensor:
    """`count` evenly spaced rows of `windows`, or all of them."""
    if count >= len(windows):
        return windows
    return windows[[index * len(windows) // count for index in range(count)]]


def _factored(
    module: nn.Module,
    name: str,
    moments: ShiftedMoments,
    rank: int,
    method: Method,
    statistics: Statistics,
    layout: str,
) -> LowRankLinear:
    weight = dense_weight(module).detach()
    shrinkage = method.shrink_input
    if isinstance(method.shift, float):
        beta = method.shift
    else:
        beta = retained_beta(weight, moments.gram, moments.cross, moments.tokens, rank, shrinkage)
    target, inner = shifted_target(
        weight,
        moments.gram,
        moments.cross,
        moments.tokens,
        beta,
        residual=moments.residual if method.mend_residual else None,
        shrinkage=shrinkage,
    )
    metric = Metric(output_root(method, statistics, name, weight.device), inner)
    return layer_of_factors(module, *components(target, metric, rank).truncated(rank), layout)


def _tensors(layers: Mapping[str, LowRankLinear]) -> dict[str, Tensor]:
    """What a layer is made of beside its bias, by `NAME/part`."""
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        found |= {f"{name}/left": layer.left.weight.detach(), f"{name}/right": layer.right.weight.detach()}
        if layer.layout == "pivot":
            found[f"{name}/pivots"] = layer.pivots
    return found


def _finished(folder: Path, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers that an interrupted run has left in `folder`; a file that cannot be read is dropped."""
    done: dict[str, nn.Module] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors = load_file(file)
        except SafetensorError:
            file.unlink()
            continue
        for name in {key.rpartition("/")[0] for key in tensors} & layers.keys():
            parts = [tensors.get(f"{name}/{part}") for part in ("left", "right", "pivots")]
            device = dense_weight(layers[name]).device
            left, right, pivots = (None if part is None else part.to(device) for part in parts)
            if left is not None and right is not None:
                done[name] = layer_of_parts(layers[name], left, right, pivots)
    return done
