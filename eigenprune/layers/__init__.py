# SPDX-License-Identifier: Apache-2.0
"""Factored layers: what they are, which layers become one, and the way in and out of a model."""

from eigenprune.layers.dense import dense_like, dense_weight, is_conv1d, is_dense, layer_shape, with_shape
from eigenprune.layers.low_rank_linear import LAYOUTS, LowRankLinear, factored_parameters
from eigenprune.layers.quantised import (
    BITS,
    dequantize_,
    is_quantised,
    plain_values,
    quantised_bits,
    quantised_bytes,
    quantised_linears,
    tensor_bytes,
)
from eigenprune.layers.select import Selection, select_layers
from eigenprune.layers.swap import low_rank_layers, replace_module_, to_dense_
from eigenprune.layers.undo import undo_on_error, weights_kept

__all__ = [
    "BITS",
    "LAYOUTS",
    "LowRankLinear",
    "Selection",
    "dense_like",
    "dense_weight",
    "dequantize_",
    "factored_parameters",
    "is_conv1d",
    "is_dense",
    "is_quantised",
    "layer_shape",
    "low_rank_layers",
    "plain_values",
    "quantised_bits",
    "quantised_bytes",
    "quantised_linears",
    "replace_module_",
    "select_layers",
    "tensor_bytes",
    "to_dense_",
    "undo_on_error",
    "weights_kept",
    "with_shape",
]
