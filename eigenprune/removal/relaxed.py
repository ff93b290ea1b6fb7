# SPDX-License-Identifier: Apache-2.0
"""A start for the search: every component kept to a part between 0 and 1, the parts then driven to the ends.

One component at a time hides those that gain only together. Here every component has a gate, its frozen part stands in
the bias, and the gates go down the slope of the same objective by the same signed worth, taken anew at each step at the
gates as they are (it is exactly the derivative: worth_i = -dJ/dgate_i). A pressure
away from CENTRE that grows from step to step leaves, at the end, gates of 0 and 1 only: a mask, which the search then
checks and mends with real forward passes. Weights are not trained: the model stays a sum of its own components.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from eigenprune.removal.examples import Judges
from eigenprune.removal.frozen import FrozenPieces
from eigenprune.removal.one_shot import State, entry_of
from eigenprune.removal.removal import RemovalRound
from eigenprune.removal.search import Search, SearchSettings, objective_slopes

RATE = 0.03  # of a step; a gate can go from 1 to 0 in some thirty
MOMENTS = (0.9, 0.999)  # Adam's
FREE = 0.15  # of the steps have no pressure
PRESSURE = (0.002, 0.3)  # then it grows by a constant factor between these, in nats an example
CENTRE = 0.5  # gates above are driven to 1, those below to 0
COST = 0.001  # nats an example that each frozen component must be worth


def searched(search: Search) -> Iterator[tuple[RemovalRound, State]]:
    """The model as it came, then, with `settings.steps`, the start found by gates, then the rounds of the search."""
    frozen, judges, settings = search.frozen, search.judges, search.settings
    if settings.steps:
        yield entry_of(frozen, judges, 0), frozen.state()
        gates = relaxed_gates(frozen, judges, search.means, search.allowed, settings)
        search.start_(masks_of(gates, settings.limit))
    yield from search.run()


def relaxed_gates(
    frozen: FrozenPieces,
    judges: Judges,
    means: dict[str, Tensor],
    allowed: dict[str, Tensor],
    settings: SearchSettings,
) -> dict[str, Tensor]:
    """{layer: [slices, rank] float64 in 0..1}; the model has its base weights again afterwards."""
    gates = {name: torch.ones(mask.shape, dtype=torch.float64) for name, mask in allowed.items()}
    first = {name: torch.zeros_like(gate) for name, gate in gates.items()}
    second = {name: torch.zeros_like(gate) for name, gate in gates.items()}
    for step in tqdm(range(settings.steps), desc="relaxing", disable=not settings.progress, leave=False):
        for name, gate in gates.items():
            frozen.blend_(name, gate, means[name])
        worths = objective_slopes(frozen, judges, means, settings)
        press = pressure(step, settings.steps)
        for name, gate in gates.items():
            slope = -worths[name].nan_to_num() - COST + press * 2 * (CENTRE - gate)
            first[name] = MOMENTS[0] * first[name] + (1 - MOMENTS[0]) * slope
            second[name] = MOMENTS[1] * second[name] + (1 - MOMENTS[1]) * slope.square()
            mean = first[name] / (1 - MOMENTS[0] ** (step + 1))
            size = (second[name] / (1 - MOMENTS[1] ** (step + 1))).sqrt() + 1e-8
            moved = (gate - RATE * mean / size).clamp(0, 1)
            gates[name] = torch.where(allowed[name], moved, gate)
    frozen.undo_all_()
    return gates


def pressure(step: int, steps: int) -> float:
    """Nothing at first, then growing by a constant factor until nine tenths of the steps are done."""
    free = FREE * steps
    if step < free:
        return 0.0
    share = min(1.0, (step - free) / (0.75 * steps))
    return PRESSURE[0] * float((PRESSURE[1] / PRESSURE[0]) ** share)


def masks_of(gates: dict[str, Tensor], limit: int) -> dict[str, Tensor]:
    """Components whose gate is below a half, the lowest `limit` of them: {layer: [slices, rank] bool}."""
    values = torch.cat([gate.flatten() for gate in gates.values()])
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[values.argsort(stable=True)[:limit]] = True
    parts = (chosen & (values < 0.5)).split([gate.numel() for gate in gates.values()])
    masks = {name: part.view_as(gate) for (name, gate), part in zip(gates.items(), parts, strict=True)}
    return {name: mask for name, mask in masks.items() if bool(mask.any())}
