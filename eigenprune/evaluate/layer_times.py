# SPDX-License-Identifier: Apache-2.0
"""Measured time of a linear layer, dense and factored, at a grid of ranks: the kernel table of a latency budget.

The copies of a layer that take turns are together larger than a last-level cache: in a model a layer's weights come
from memory, and a layer called again and again would be timed from the cache.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eigenprune.errors import ConfigError
from eigenprune.layers import LowRankLinear
from eigenprune.ops.environment import environment

RANK_STEPS = (1 / 32, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0)  # of the smaller side
COLD_BYTES = 64 << 20  # of weights that are read between two calls of one copy
MOST_COPIES = 64
FEW_TOKENS = 16
ROUNDS = 9
PICOSECOND = 1e-12


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one call of a layer.

    Attributes:
        shape: (out, in).
        dense: of the dense layer.
        ranks, factored: of the factored layer at these ranks, rising.
    """

    shape: tuple[int, int]
    dense: float
    ranks: tuple[int, ...]
    factored: tuple[float, ...]

    def seconds(self, rank: int) -> float:
        """At `rank` (0: dense), between measured ranks on the straight line, outside of them at the nearest."""
        if rank == 0:
            return self.dense
        if rank <= self.ranks[0]:
            return self.factored[0]
        for at in range(1, len(self.ranks)):
            if rank <= self.ranks[at]:
                low, high = self.ranks[at - 1], self.ranks[at]
                part = (rank - low) / (high - low)
                return self.factored[at - 1] * (1 - part) + self.factored[at] * part
        return self.factored[-1]

    def cost(self, rank: int) -> int:
        """`seconds` in whole picoseconds."""
        return max(1, round(self.seconds(rank) / PICOSECOND))


def layer_times(
    shape: tuple[int, int],
    layout: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    tokens: int = 1,
    cache_dir: Path | None = None,
) -> LayerTimes:
    """Measure a linear layer `shape` (out, in) on `tokens` tokens at once; seconds the first time, then from the cache.

    Args:
        shape: (out, in).
        layout: of the factored layer.
        dtype: of weights and inputs.
        device: where.
        tokens: 1 for decoding one sequence, more for prompts and batches.
        cache_dir: where measured times are kept, for this machine and these versions; None measures anew.

    Raises:
        ConfigError: `tokens` is below 1.
    """
    if tokens < 1:
        raise ConfigError(f"tokens={tokens!r} must be at least 1: the tokens that a layer is called with at once")
    device = torch.device(device)
    file = None if cache_dir is None else _file(cache_dir, shape, layout, dtype, device, tokens)
    if file is not None and (kept := _read(file, shape)) is not None:
        return kept
    side = min(shape)
    ranks = sorted({max(1, min(side - 1, round(part * side))) for part in RANK_STEPS})  # a full pivot has no mix
    makers: list[Callable[[], nn.Module]] = [
        lambda: nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=dtype),
        *(_factored_maker(shape, rank, layout, dtype, device) for rank in ranks),
    ]
    x = torch.randn(tokens, shape[1], device=device, dtype=dtype)
    dense, *factored = _median_seconds(makers, x)
    found = LayerTimes(shape, dense, tuple(ranks), tuple(factored))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        staged = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        staged.write_text(json.dumps(asdict(found)), encoding="utf-8")
        os.replace(staged, file)
    return found


def _factored_maker(
    shape: tuple[int, int], rank: int, layout: str, dtype: torch.dtype, device: torch.device
) -> Callable[[], nn.Module]:
    return lambda: LowRankLinear(shape[1], shape[0], rank, layout=layout, bias=False, device=device, dtype=dtype)


def _median_seconds(makers: Sequence[Callable[[], nn.Module]], x: torch.Tensor) -> list[float]:
    """The median over the rounds of the seconds of one call, each kind in turn in every round."""
    samples: list[list[float]] = [[] for _ in makers]
    with torch.inference_mode():
        kinds = [[make() for _ in range(_copies(make(), len(x)))] for make in makers]
        for round_ in range(ROUNDS + 1):
            for copies, kept in zip(kinds, samples, strict=True):
                seconds = _seconds_a_call(copies, x)
                if round_:  # the first is the warm-up
                    kept.append(seconds)
    return [sorted(kept)[len(kept) // 2] for kept in samples]


def _copies(layer: nn.Module, tokens: int) -> int:
    """Fewer for many tokens, on which reading a weight is a small part of the work."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters())
    return max(2, min(MOST_COPIES, COLD_BYTES // max(1, size)) // max(1, tokens // FEW_TOKENS))


def _seconds_a_call(copies: Sequence[nn.Module], x: torch.Tensor) -> float:
    _wait(x.device)
    began = time.perf_counter()
    for layer in copies:
        layer(x)
    _wait(x.device)
    return (time.perf_counter() - began) / len(copies)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _file(
    cache_dir: Path, shape: tuple[int, int], layout: str, dtype: torch.dtype, device: torch.device, tokens: int
) -> Path:
    """Named after everything that a time depends on."""
    machine: dict[str, Any] = environment()
    machine["threads now"] = torch.get_num_threads()
    key = json.dumps([machine, shape, layout, str(dtype), str(device), tokens], sort_keys=True, default=str)
    return cache_dir / "layer-times" / f"{sha256(key.encode()).hexdigest()[:32]}.json"


def _read(file: Path, shape: tuple[int, int]) -> LayerTimes | None:
    """What was measured before; a damaged file is dropped."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        found = LayerTimes(
            tuple(values["shape"]), float(values["dense"]), tuple(values["ranks"]), tuple(values["factored"])
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        file.unlink()
        return None
    return found if found.shape == shape and len(found.ranks) == len(found.factored) > 0 else None
