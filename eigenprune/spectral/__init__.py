# SPDX-License-Identifier: Apache-2.0
"""Weights to spectra in a metric, spectra to worth, worth to ranks, ranks to factors."""

from eigenprune.spectral.allocation import ALLOCATIONS, Choice, allocate
from eigenprune.spectral.decompose import Components, Spectrum, components, spectrum
from eigenprune.spectral.factored import layer_of_factors
from eigenprune.spectral.methods import METHODS, WORTHS, Method, find_method
from eigenprune.spectral.metric import Metric, layer_metric
from eigenprune.spectral.pieces import (
    SlicePieces,
    removed_output,
    slice_parts,
    slice_pieces,
    stack_rows,
    without_pieces,
)
from eigenprune.spectral.pivot import pivot_factors
from eigenprune.spectral.slices import KINDS, VIEWS, LayerView, Slice, check_kinds, is_rotary, layer_view, layer_views
from eigenprune.spectral.worth import Options, rank_options

__all__ = [
    "ALLOCATIONS",
    "KINDS",
    "METHODS",
    "VIEWS",
    "WORTHS",
    "Choice",
    "Components",
    "LayerView",
    "Method",
    "Metric",
    "Options",
    "Slice",
    "SlicePieces",
    "Spectrum",
    "allocate",
    "check_kinds",
    "components",
    "find_method",
    "is_rotary",
    "layer_metric",
    "layer_of_factors",
    "layer_view",
    "layer_views",
    "pivot_factors",
    "rank_options",
    "removed_output",
    "slice_parts",
    "slice_pieces",
    "spectrum",
    "stack_rows",
    "without_pieces",
]
