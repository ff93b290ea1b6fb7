# SPDX-License-Identifier: Apache-2.0
"""truncated_svd beside its peers: time, and Frobenius error over the optimum.

Every case is timed in turns within one run (ours, then every peer, again and again); ratios are of medians, with the
20th and 80th percentile kept, and of processor time, which a busy machine disturbs less. `machine` writes the floor:
the rates of the products that the method is made of.

    python benchmarks/bench_svd.py --models .models --out benchmarks/results/svd.jsonl
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, environment
from torch import Tensor

from eigenprune.ops import SvdPath, gram_svd, truncated_svd

SIZE = 2048
PARTS = (16, 8, 4, 2)
Triple = tuple[Tensor, Tensor, Tensor]


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def power_law(size: int) -> Tensor:
    """Random singular vectors, singular values i^-1/2."""
    u, v = torch.linalg.qr(gaussian(2, size, size))[0]
    return (u * torch.arange(1, size + 1).float() ** -0.5) @ v


def smollm2(models: Path) -> tuple[Tensor, Tensor]:
    """Real weights: 30 gate projections [30, 1536, 576], and the query heads [270, 64, 576]."""
    from safetensors import safe_open

    file = next(models.rglob("model.safetensors"))
    with safe_open(file, "pt") as weights:
        gates = [weights.get_tensor(f"model.layers.{i}.mlp.gate_proj.weight").float() for i in range(30)]
        heads = [weights.get_tensor(f"model.layers.{i}.self_attn.q_proj.weight").float() for i in range(30)]
    return torch.stack(gates), torch.stack(heads).reshape(-1, 64, heads[0].shape[1])


def peers(a: Tensor, rank: int, slow: bool) -> dict[str, Callable[[], Triple]]:
    """Name -> function that gives U, S, Vh; libraries that are not installed are left out."""

    def exact() -> Triple:
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        return u[..., :rank], s[..., :rank], vh[..., :rank, :]

    def lowrank() -> Triple:
        u, s, v = torch.svd_lowrank(a, q=rank, niter=2)
        return u, s, v.mT

    def scikit() -> Triple:
        from sklearn.utils.extmath import randomized_svd

        found = [randomized_svd(x.numpy(), rank, random_state=0) for x in a.reshape(-1, *a.shape[-2:])]
        u, s, vh = (torch.stack([torch.from_numpy(one[i]) for one in found]) for i in range(3))
        return u, s, vh

    def scipy() -> Triple:
        from scipy.sparse.linalg import svds

        u, s, vh = svds(a.numpy(), k=rank, random_state=0)
        order = s.argsort()[::-1].copy()
        return torch.from_numpy(u[:, order]), torch.from_numpy(s[order].copy()), torch.from_numpy(vh[order])

    found: dict[str, Callable[[], Triple]] = {"torch.linalg.svd": exact}
    if rank < min(a.shape[-2:]):
        found["torch.svd_lowrank(niter=2)"] = lowrank
        if importlib.util.find_spec("sklearn"):
            found["sklearn randomized_svd"] = scikit
        if slow and importlib.util.find_spec("scipy") and a.dim() == 2:
            found["scipy svds"] = scipy
    return found


def best_errors(a: Tensor, rank: int) -> list[float]:
    """The smallest possible Frobenius error of every matrix, from singular values in float64."""
    values = [torch.linalg.svdvals(one.double()) for one in a.reshape(-1, *a.shape[-2:])]
    return [float(one[rank:].square().sum().sqrt()) for one in values]


def excess(a: Tensor, found: Triple, best: list[float]) -> float:
    """The worst relative excess of the Frobenius error over the optimum, formed in float64."""
    u, s, vh = (x.double().reshape(-1, *x.shape[-k:]) for x, k in zip(found, (2, 1, 2), strict=True))
    wide = a.double().reshape(-1, *a.shape[-2:])
    return max(float((one - (u[i] * s[i]) @ vh[i]).norm()) / best[i] - 1 for i, one in enumerate(wide))


def ratios(a: Tensor, found: Triple) -> list[float]:
    """LAPACK's scaled residual and orthogonality ratios, the worst of the batch."""
    size, ulp = max(a.shape[-2:]), torch.finfo(torch.float32).eps
    one, u, s, vh = a.double(), *(x.double() for x in found)
    norm = torch.linalg.matrix_norm
    eye = torch.eye(s.shape[-1]).double()
    return [
        float((norm(one - (u * s.unsqueeze(-2)) @ vh, 1) / (norm(one, 1) * size * ulp)).max()),
        float(norm(u.mT @ u - eye, 1).max() / (size * ulp)),
        float(norm(vh @ vh.mT - eye, 1).max() / (size * ulp)),
    ]


def in_turns(functions: dict[str, Callable[[], Any]], turns: int) -> dict[str, dict[str, float]]:
    """Median, 20th and 80th percentile of the wall time, and the median time of the processor, in seconds."""
    wall: dict[str, list[float]] = {name: [] for name in functions}
    work: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            started, worked = time.perf_counter(), time.process_time()
            function()
            if turn:  # the first warms up
                wall[name].append(time.perf_counter() - started)
                work[name].append(time.process_time() - worked)
    return {
        name: {
            "median": statistics.median(times),
            "p20": sorted(times)[int(0.2 * (len(times) - 1))],
            "p80": sorted(times)[-1 - int(0.2 * (len(times) - 1))],
            "processor": statistics.median(work[name]),
        }
        for name, times in wall.items()
    }


def measure(name: str, a: Tensor, rank: int, turns: int, slow: bool, emit: Callable[[dict[str, Any]], None]) -> None:
    """One case: ours and every peer."""
    full = rank == min(a.shape[-2:])
    functions: dict[str, Callable[[], Any]] = {"eigenprune": lambda: truncated_svd(a, rank)}
    functions |= peers(a, rank, slow)
    times = in_turns(functions, turns)
    best = [] if full else best_errors(a, rank)
    for peer, function in functions.items():
        found = function()
        row: dict[str, Any] = {"case": name, "rank": rank, "function": peer, "turns": turns, **times[peer]}
        for clock in ("median", "processor"):
            base, own = times["torch.linalg.svd"][clock], times["eigenprune"][clock]
            row[f"{clock}_svd_over_this"] = base / times[peer][clock]
            row[f"{clock}_this_over_ours"] = times[peer][clock] / own
        row |= {"ratios": ratios(a, found[:3])} if full else {"excess": excess(a, found[:3], best)}
        if peer == "eigenprune":
            row |= {"paths": [SvdPath(i).name for i in found.path.unique().tolist()]}
            row |= {"estimate": float(found.excess.max())}
        emit(row)


def measure_machine(emit: Callable[[dict[str, Any]], None]) -> None:
    """Rates of products, and of the eigensolver that bounds the Gram paths from below."""
    a = gaussian(SIZE, SIZE)
    low, wide = a.bfloat16(), a.double()
    gram = a @ a.T
    functions: dict[str, tuple[Callable[[], Any], float]] = {
        "mm float32": (lambda: a @ a, 2.0 * SIZE**3),
        "mm float64": (lambda: wide @ wide, 2.0 * SIZE**3),
        "mm bfloat16": (lambda: low @ low, 2.0 * SIZE**3),
        "mm bfloat16, 160 columns": (lambda: low @ low[:, :160], 2.0 * SIZE**2 * 160),
        "copy float32": (lambda: a.clone(), 8.0 * SIZE**2),
        "eigh float32": (lambda: torch.linalg.eigh(gram), 9.0 * SIZE**3),
    }
    times = in_turns({name: function for name, (function, _) in functions.items()}, 3)
    for name, (_, amount) in functions.items():
        unit = "GB/s" if name.startswith("copy") else "GF/s"
        emit(
            {
                "case": "machine",
                "function": name,
                "rate": amount / times[name]["median"] / 1e9,
                "unit": unit,
                **times[name],
            }
        )


def measure_dispatch(emit: Callable[[dict[str, Any]], None]) -> None:
    """The evidence for the table in eigenprune/ops/_svd_paths.py: every method on shapes around its borders."""
    for shape, rank in (
        ((8, 64, 576), 64), ((8, 64, 576), 16), ((8, 128, 512), 32), ((2, 576, 1536), 256), ((2, 576, 1536), 64),
        ((2, 576, 1536), 576), ((1, 768, 768), 96), ((1, 1024, 1024), 128), ((1, 1024, 1024), 1024),
        ((1, 1536, 1536), 1536), ((1, 1024, 4096), 1024),
    ):  # fmt: skip
        a = gaussian(*shape)
        methods = ("gram", "lapack") if rank == shape[1] else ("gram", "lapack", "rounded", "subspace")
        auto = SvdPath(int(truncated_svd(a, rank).path[0])).name
        for method, times in in_turns({m: partial(truncated_svd, a, rank, method=m) for m in methods}, 3).items():
            emit({"case": "dispatch", "shape": shape, "rank": rank, "function": method, "auto": auto, **times})


def main() -> None:
    """All cases of the claim, in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / ".models", help="where SmolLM2 is; without it, skipped")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["machine", "dispatch", "gaussian", "power", "gates", "heads"])
    parser.add_argument("--scipy", action="store_true", help="svds too, which takes minutes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = environment()

    def emit(row: dict[str, Any]) -> None:
        shown = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
        print(json.dumps(shown), flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(shown | {"load": round(os.getloadavg()[0], 2)} | facts) + "\n")

    gram_svd(gaussian(1, 2, 2), 1)  # loads LAPACK
    if "machine" in options.only:
        measure_machine(emit)
    if "dispatch" in options.only:
        measure_dispatch(emit)
    for name, make in (("gaussian", lambda: gaussian(SIZE, SIZE)), ("power", lambda: power_law(SIZE))):
        if name in options.only:
            a = make()
            for part in PARTS:
                measure(f"{name} {SIZE}", a, SIZE // part, options.turns, options.scipy, emit)
    real = smollm2(options.models) if any(options.models.rglob("model.safetensors")) else None
    if real is None:
        print("no SmolLM2 in --models: real weights are skipped", file=sys.stderr)
    if "gates" in options.only:
        measure("gaussian 30 x 576 x 1536", gaussian(30, 576, 1536), 256, options.turns, False, emit)
        if real:
            measure("SmolLM2 gate_proj 30 x 1536 x 576", real[0], 256, options.turns, False, emit)
    if "heads" in options.only:
        measure("gaussian 270 x 64 x 576", gaussian(270, 64, 576), 64, options.turns, False, emit)
        if real:
            measure("SmolLM2 q_proj heads 270 x 64 x 576", real[1], 64, options.turns, False, emit)


if __name__ == "__main__":
    main()
