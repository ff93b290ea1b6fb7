# SPDX-License-Identifier: Apache-2.0
"""The selection rules, one row each. A published rule is a row here; what it scores or matches is a function beside."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from eigenprune.entries.blocks import Block
from eigenprune.entries.ken import ken, ken_fast
from eigenprune.entries.scores import change, magnitude, random_worth
from eigenprune.errors import ConfigError

SCOPES = ("row", "layer", "global")

Score = Callable[[Block, "Context"], Tensor]
Match = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Context:
    """What a score may look at beside the block."""

    seed: int


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        name: what users write.
        scope: within which the budget is spent unless told otherwise: each `row`, each `layer` (tensor), or `global`.
        needs: fields of `EntryStatistics` that must be there.
        source: paper, or where the rule comes from.
        score: worth of the entries of a block; the highest are kept.
        match: or the mask [rows, m] for tuned rows [rows, m] and a count a row, where a row is chosen as a whole.
    """

    name: str
    scope: str
    source: str
    needs: tuple[str, ...] = ()
    score: Score | None = None
    match: Match | None = None


_KEN = "Mastromattei and Zanzotto, ACL 2024, arXiv 2402.03142"
_ROWS = (
    Rule("ken", "row", _KEN + ": as its code does it", match=ken),
    Rule("ken-fast", "row", _KEN + ": without the density", match=ken_fast),
    Rule("random", "row", "control", score=lambda block, context: random_worth(block, context.seed)),
    Rule("magnitude", "row", "Han et al., NeurIPS 2015, arXiv 1506.02626", score=lambda block, _: magnitude(block)),
    Rule("delta", "global", "size of the change, this package", score=lambda block, _: change(block)),
)
RULES: Mapping[str, Rule] = MappingProxyType({rule.name: rule for rule in _ROWS})


def find_rule(name: str) -> Rule:
    """The row called `name`.

    Raises:
        ConfigError: there is none.
    """
    try:
        return RULES[name]
    except KeyError:
        raise ConfigError(f"selection rule {name!r} is unknown; there are: {', '.join(RULES)}") from None
