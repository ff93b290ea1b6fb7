# SPDX-License-Identifier: Apache-2.0
"""The ranks of a model as a picture made of characters, which every reader of a card can show."""

import re
from collections.abc import Iterable

from eigenprune.hub.facts import FactoredLayer

STEPS = "▁▂▃▄▅▆▇"
DENSE = "█"
FIRST_NUMBER = re.compile(r"\.(\d+)(?=\.)")


def rank_picture(layers: Iterable[FactoredLayer]) -> str:
    """One row for each kind of layer, one mark for each block of the model: the kept share of its parameters.

    A row whose kind is nowhere factored is not shown.
    """
    rows: dict[str, dict[int, FactoredLayer]] = {}
    for layer in layers:
        found = FIRST_NUMBER.search(layer.name)
        depth = int(found.group(1)) if found else 0
        kind = FIRST_NUMBER.sub(".*", layer.name, count=1)
        rows.setdefault(kind, {})[depth] = layer
    if not rows:
        return ""
    prefix = _common_prefix(list(rows))
    blocks = 1 + max(max(row) for row in rows.values())
    width = max(len(kind) - len(prefix) for kind in rows)
    lines = []
    for kind, row in sorted(rows.items()):
        marks = "".join(_mark(row[depth]) if depth in row else DENSE for depth in range(blocks))
        ranks = sorted(layer.rank for layer in row.values())
        span = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
        first = next(iter(row.values()))
        lines.append(f"{kind[len(prefix) :]:<{width}}  {marks}  rank {span} of {min(first.shape)}")
    return "\n".join(lines)


def _mark(layer: FactoredLayer) -> str:
    return STEPS[min(int(layer.kept * len(STEPS)), len(STEPS) - 1)]


def _common_prefix(kinds: list[str]) -> str:
    """What all names begin with, up to a dot."""
    shortest, longest = min(kinds), max(kinds)
    same = next((i for i, (a, b) in enumerate(zip(shortest, longest, strict=False)) if a != b), 0)
    return shortest[: shortest.rfind(".", 0, same) + 1]
