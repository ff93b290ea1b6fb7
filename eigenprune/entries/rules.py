# SPDX-License-Identifier: Apache-2.0
"""The selection rules, one row each. A published rule is a row here; what it scores or matches is a function beside."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from eigenprune.entries.blocks import Block
from eigenprune.entries.brain_surgeon import icbs
from eigenprune.entries.ken import ken, ken_fast
from eigenprune.entries.scores import Context, d_pruner, delta, delta_fisher, magnitude, random_worth, wanda
from eigenprune.errors import ConfigError

SCOPES = ("row", "layer", "global")

Score = Callable[[Block, Context], Tensor]
Match = Callable[[Block, int, Context], Tensor]


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        name: what users write.
        scope: within which the budget is spent unless told otherwise: each `row`, each `layer` (tensor), or `global`.
        source: paper, or where the rule comes from.
        needs: fields of `EntryStatistics` that must be there; `general` stands for a second set of them.
        score: worth of the entries of a block, not negative; the highest are kept.
        match: or the mask [rows, m] of a block for a count of entries a row, where a row is chosen as a whole.
        by_index: the shares of the tensors follow their PQ index; the budget is the whole model's.
    """

    name: str
    scope: str
    source: str
    needs: tuple[str, ...] = ()
    score: Score | None = None
    match: Match | None = None
    by_index: bool = False

    @property
    def scopes(self) -> tuple[str, ...]:
        """Those open to it."""
        if self.match is not None:
            return ("row",)
        return ("global",) if self.by_index else SCOPES


_KEN = "Mastromattei and Zanzotto, ACL 2024, arXiv 2402.03142"
_FISHER = ("gradient", "squared_gradient")
_ROWS = (
    Rule("ken", "row", _KEN + ": as its code does it", match=lambda block, count, _: ken(block.tuned, count)),
    Rule("ken-fast", "row", _KEN + ": without the density", match=lambda block, count, _: ken_fast(block.tuned, count)),
    Rule("random", "row", "control", score=random_worth),
    Rule("magnitude", "row", "Han et al., NeurIPS 2015, arXiv 1506.02626", score=magnitude),
    Rule("delta", "global", "size of the change", score=delta),
    Rule("delta-fisher", "global", "change^2 x Fisher", ("squared_gradient",), score=delta_fisher),
    Rule("wanda", "row", "Sun et al., ICLR 2024, arXiv 2306.11695", ("input_square",), score=wanda),
    Rule("sap", "global", "Diao et al., ICLR 2023, arXiv 2302.05601", score=magnitude, by_index=True),
    Rule("d-pruner", "global", "Zhang et al., NAACL 2024, arXiv 2405.06275", (*_FISHER, "general"), score=d_pruner),
    Rule("icbs", "row", "Rosenberg et al., 2024, arXiv 2411.17796", ("input_gram",), match=icbs),
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
