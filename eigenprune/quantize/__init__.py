# SPDX-License-Identifier: Apache-2.0
"""Weights in few bits: int8 and int4, weight-only, by torchao (`pip install eigenprune[quantize]`)."""

from eigenprune.quantize.options import KeptLosses, options_with_bits, rounding_loss
from eigenprune.quantize.quantize import quantize_, quantize_layers_
from eigenprune.quantize.stored import NUMBERS, SCALE, StoredWeight, check_savable, finish_stored_, plain_state_
from eigenprune.quantize.tensors import quantised_weight, require_torchao

__all__ = [
    "NUMBERS",
    "SCALE",
    "KeptLosses",
    "StoredWeight",
    "check_savable",
    "finish_stored_",
    "options_with_bits",
    "plain_state_",
    "quantised_weight",
    "quantize_",
    "quantize_layers_",
    "require_torchao",
    "rounding_loss",
]
