# SPDX-License-Identifier: Apache-2.0
"""Would one right factor for the Linears that read one input (q, k, v; gate, up) lose less at equal parameters?

Protocol. SmolLM2-135M-Instruct, method `kfac`, the calibration of quality.py. A group is decomposed as one weight, its
members' rows below each other, each in its own output metric; the input metric is theirs in common. Three choices are
solved exactly at each budget: all matrices alone, all groups shared, and each group the better of both. The figure is
the estimated loss, in nats per token, as a multiple of that of all alone.

    python benchmarks/sharing.py
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from environment import ROOT, environment, shared_folder
from get_smollm2 import get_smollm2
from quality import Bench

from eigenprune.calibrate import collect_statistics, default_cache_dir
from eigenprune.layers import dense_weight
from eigenprune.spectral import (
    METHODS,
    Decomposed,
    Options,
    Spectrum,
    layer_metric,
    parameter_cost,
    rank_options,
    solve_allocation,
)

GROUPS = {"attention": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
RESULTS = ROOT / "benchmarks" / "results" / "sharing.jsonl"


def group_spectra(bench: Bench, decomposed: Decomposed) -> tuple[dict[str, Spectrum], dict[str, list[str]]]:
    """The spectrum of every group, and its members."""
    members: dict[str, list[str]] = {}
    for name in bench.layers:
        for kind, endings in GROUPS.items():
            if name.endswith(endings):
                members.setdefault(f"{name.rsplit('.', 1)[0]}.{kind}", []).append(name)
    spectra = {}
    for group, names in members.items():
        root = layer_metric(METHODS["kfac"], decomposed.statistics, names[0]).inner
        gram = torch.zeros(())
        for name in names:
            # right = U^T R W with U square and orthonormal: right^T right = W^T F W.
            weight = dense_weight(bench.layers[name])
            found = root.right_multiply(decomposed.components(name, bench.layers[name], min(weight.shape)).right)
            gram = gram + found.t() @ found
        spectra[group] = Spectrum(torch.linalg.eigvalsh(gram).clamp_min(0).flip(0))
    return spectra, members


def group_options(options: dict[str, Options], shared: Options, names: list[str]) -> Options:
    """A group as one matrix that is factored alone or together: the best of every cost."""
    alone = {0: 0.0}  # cost: loss, of the members so far
    for name in names:
        pairs = list(zip(options[name].costs.tolist(), options[name].losses.tolist(), strict=True))
        sums: dict[int, float] = {}
        for cost, loss in alone.items():
            for more, lost in pairs:
                if loss + lost < sums.get(cost + more, torch.inf):
                    sums[cost + more] = loss + lost
        alone, best = {}, torch.inf
        for cost in sorted(sums):
            if sums[cost] < best:
                alone[cost], best = sums[cost], sums[cost]
    for cost, loss in zip(shared.costs.tolist(), shared.losses.tolist(), strict=True):
        alone[cost] = min(loss, alone.get(cost, torch.inf))
    costs = sorted(alone)
    return Options(
        torch.zeros(len(costs)).long(), torch.tensor(costs), torch.tensor([alone[c] for c in costs]).double()
    )


def main() -> None:
    """Solve the choices, and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / ".models", help="where the model is kept")
    parser.add_argument("--components", type=Path, help="a folder of the cache that holds the components")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    texts = shared_folder()
    if texts is None:
        sys.exit("sharing.py needs the texts of the shared folder: set EIGENPRUNE_SHARED")
    bench = Bench(get_smollm2(arguments.models), texts)
    statistics = collect_statistics(
        bench.model, bench.calibration_windows("wikitext2"), bench.layers, cache_dir=default_cache_dir()
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    default_cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, arguments.out.open("a", encoding="utf-8") as out:
        decomposed = Decomposed(METHODS["kfac"], statistics, 0, arguments.components or Path(temporary))
        spectra, members = group_spectra(bench, decomposed)
        shapes = {name: tuple(dense_weight(module).shape) for name, module in bench.layers.items()}
        for layout in ("pair", "pivot"):
            alone = {n: rank_options(s, decomposed.spectrum(n, bench.layers[n]), layout, 8) for n, s in shapes.items()}
            grouped = {name for names in members.values() for name in names}
            shared = {name: found for name, found in alone.items() if name not in grouped}
            either = dict(shared)
            for group, names in members.items():
                shape = (sum(shapes[name][0] for name in names), shapes[names[0]][1])
                cost = parameter_cost(shape, layout)
                shared[group] = rank_options(shape, spectra[group], layout, 8, cost=cost)
                either[group] = group_options(alone, shared[group], names)
            for keep in (0.9, 0.8, 0.6, 0.4):
                found = {
                    kind: solve_allocation(options, keep, "global").loss
                    for kind, options in {"alone": alone, "shared": shared, "either": either}.items()
                }
                row = {"layout": layout, "keep": keep, **found}
                out.write(json.dumps(row | environment()) + "\n")
                cells = [f"{found[kind] / found['alone']:.4f}" for kind in ("shared", "either")]
                print(f"| {layout} | {keep:g} | {found['alone']:.4f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
