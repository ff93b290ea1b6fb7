# SPDX-License-Identifier: Apache-2.0
"""What an allocation is given: the options, the budget, and what was measured beside them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from eigenprune.errors import ConfigError
from eigenprune.spectral.allocation.table import Table
from eigenprune.spectral.worth import Options


@dataclass(frozen=True)
class Evidence:
    """What some allocations need beside the options, by matrix; empty where it was not measured.

    Attributes:
        tokens: of the calibration, by which means become the sums that some formulas are written in.
        fisher: the sum of the squared entries of dL/dW, averaged over windows.
        influence: of the block a matrix stands in: 1 - cosine between its input and its output, averaged over tokens.
        changes: [min(m, n)] first-order change of the loss when each component is removed, the strongest first.
        probed: {rank: loss or KL, in nats per token, when this matrix alone has that rank}.
    """

    tokens: int = 1
    fisher: Mapping[str, float] = field(default_factory=dict)
    influence: Mapping[str, float] = field(default_factory=dict)
    changes: Mapping[str, Tensor] = field(default_factory=dict)
    probed: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One allocation to make.

    Attributes:
        options: by name, in the order of the rows of `table`.
        table: the same, padded.
        budget: in the unit of the costs.
        keep: the budget as a fraction of the dense cost.
        evidence: see `Evidence`.
    """

    options: Mapping[str, Options]
    table: Table
    budget: float
    keep: float
    evidence: Evidence

    def of_all(self, kind: str, values: Mapping[str, float]) -> list[float]:
        """The `values` of all matrices, measurements of `kind`.

        Raises:
            ConfigError: one has none.
        """
        missing = [name for name in self.options if name not in values]
        if missing:
            raise ConfigError(
                f"this allocation needs the {kind} of every matrix, and {missing[0]} has none: measure it"
            )
        return [values[name] for name in self.options]
