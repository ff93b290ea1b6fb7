# SPDX-License-Identifier: Apache-2.0
"""The last step of pruning: the bits of every layer that the budget counts."""

from dataclasses import replace

from torch import nn

from eigenprune.layers import low_rank_layers
from eigenprune.prune.run import Run
from eigenprune.prune.savable import model_size
from eigenprune.quantize import quantize_layers_, require_torchao
from eigenprune.report import PruneReport
from eigenprune.spectral import Allocation


def check_bits_possible(bits: int | str | None) -> None:
    """Raise ConfigError if `bits` are asked for and there is no torchao; said before minutes of work."""
    if bits is not None:
        require_torchao(f"bits={bits!r}")


def quantise(run: Run, report: PruneReport, found: Allocation) -> PruneReport:
    """Quantise the pruned model of `run`, dense layers that the allocation left alone included.

    GPT-2's `Conv1D` stays in floating point where it is left dense.
    """
    bits = {name: _bits(run.config.bits, choice.bits) for name, choice in found.choices.items()}
    factored = low_rank_layers(run.model)
    wanted = {
        name: value
        for name, value in bits.items()
        if value and (name in factored or type(run.model.get_submodule(name)) is nn.Linear)
    }
    if wanted:
        quantize_layers_(run.model, wanted)
    layers = tuple(replace(layer, bits=wanted.get(layer.name)) for layer in report.layers)
    return replace(report, layers=layers, model_bytes=(report.model_bytes[0], model_size(run.model)[1]))


def _bits(asked: int | str | None, chosen: int) -> int:
    return asked if isinstance(asked, int) else chosen
