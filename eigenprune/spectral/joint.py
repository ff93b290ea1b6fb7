# SPDX-License-Identifier: Apache-2.0
"""The layers of a channel group as one choice: how many channels stay, and which rank each layer then has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigenprune.spectral.allocation import Choice, choice_of
from eigenprune.spectral.channels import ChannelPlan
from eigenprune.spectral.worth import Cost, Options, rank_options

# Prices of a unit of cost at which the layers of a group choose: the part of the whole loss of the group that all of
# its cost would then be worth. Between two prices lie 4 %.
PRICES = torch.logspace(-7, 2, 513, dtype=torch.float64)

Shape = tuple[int, int]


@dataclass(frozen=True)
class JointOptions:
    """What the layers of one group can have.

    Attributes:
        options: to choose from as if they were of one matrix. `ranks` number them from 1 on, and 0 is the last: dense.
        picks: of each number, the plan and the number of the own option of each layer.
        own: by plan, the options of each layer.
        plans: the plans.
    """

    options: Options
    picks: tuple[tuple[int, tuple[int, ...]], ...]
    own: tuple[tuple[Options, ...], ...]
    plans: Sequence[ChannelPlan]

    def choices(self, number: int) -> tuple[list[Choice], Tensor | None]:
        """What each layer gets, the consumer last, and the channels that stay; None where all do.

        The consumer bears the loss of the channels that go.
        """
        if number == 0:
            return [choice_of(options, -1) for options in self.own[0]], None
        plan, columns = self.picks[number - 1]
        found = [choice_of(options, i) for options, i in zip(self.own[plan], columns, strict=True)]
        found[-1] = replace(found[-1], loss=found[-1].loss + self.plans[plan].loss)
        return found, self.plans[plan].kept if plan else None


def joint_options(
    plans: Sequence[ChannelPlan],
    shapes: Mapping[str, Shape],
    layout: str,
    multiple: int,
    *,
    cost_of: Callable[[str, Shape], Cost],
    min_keep: float = 0.0,
) -> JointOptions:
    """The options of a group: at every plan and price the cheapest sum, as far as nothing is better in both.

    Args:
        plans: the first with all channels.
        shapes: (out, in) of the dense layers, the consumer last.
        layout, multiple: as in `rank_options`.
        cost_of: of a layer, by name and shape.
        min_keep: of its parameters, what each layer keeps at least.
    """
    own = tuple(_options_of(plan, shapes, layout, multiple, cost_of, min_keep) for plan in plans)
    dense = sum(int(options.costs[-1]) for options in own[0])
    whole = sum(options.whole for options in own[0])
    prices = PRICES * max(whole, torch.finfo(torch.float64).tiny) / dense
    found: dict[tuple[float, float], tuple[int, tuple[int, ...]]] = {}
    for number, (plan, layers) in enumerate(zip(plans, own, strict=True)):
        if not layers:
            continue
        columns = torch.stack([_at_prices(options, prices) for options in layers], 1).unique(dim=0)
        for row in columns.tolist():
            cost = sum(float(options.costs[i]) for options, i in zip(layers, row, strict=True))
            loss = plan.loss + sum(float(options.losses[i]) for options, i in zip(layers, row, strict=True))
            found.setdefault((cost, loss), (number, tuple(row)))
    kept: list[tuple[float, float, tuple[int, tuple[int, ...]]]] = []
    for (cost, loss), pick in sorted(found.items(), reverse=True):  # by falling cost, so that the loss must rise
        while kept and kept[-1][1] >= loss:  # dearer, and no better
            kept.pop()
        if cost < dense:
            kept.append((cost, loss, pick))
    costs, losses, picks = zip(*reversed(kept), strict=True) if kept else ((), (), ())
    numbers = torch.arange(1, len(picks) + 1)
    options = Options(
        ranks=torch.cat([numbers, numbers.new_zeros(1)]),
        costs=torch.tensor([*map(int, costs), dense]),
        losses=torch.tensor([*losses, 0.0], dtype=torch.float64),
        whole=whole,
    )
    return JointOptions(options, tuple(picks), own, plans)


def _options_of(
    plan: ChannelPlan,
    shapes: Mapping[str, Shape],
    layout: str,
    multiple: int,
    cost_of: Callable[[str, Shape], Cost],
    min_keep: float,
) -> tuple[Options, ...]:
    """Of each layer when the channels of `plan` stay; none where that is too little of one."""
    found = []
    *_, consumer = shapes
    for (name, (m, n)), spectrum in zip(shapes.items(), plan.spectra, strict=True):
        shape = (m, len(plan.kept)) if name == consumer else (len(plan.kept), n)
        part = shape[0] * shape[1] / (m * n)
        if part < min_keep:
            return ()
        cost = cost_of(name, shape)
        found.append(rank_options(shape, spectrum, layout, multiple, cost=cost, min_keep=min_keep / part))
    return tuple(found)


def _at_prices(options: Options, prices: Tensor) -> Tensor:
    """[prices]: the option that is best at each price."""
    return (options.losses + prices.unsqueeze(1) * options.costs.double()).argmin(1)
