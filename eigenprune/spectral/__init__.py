# SPDX-License-Identifier: Apache-2.0
"""Weights to spectra in a metric, spectra to worth, worth to ranks, ranks to factors."""

from eigenprune.spectral.allocation import (
    ALLOCATIONS,
    Allocation,
    AllocationRow,
    Choice,
    Evidence,
    allocate,
    solve_allocation,
)
from eigenprune.spectral.channels import ChannelPlan, channel_plans, reduced_weights
from eigenprune.spectral.decompose import Components, Spectrum, components, spectrum
from eigenprune.spectral.decomposed import MOST_BYTES, Decomposed, component_bytes
from eigenprune.spectral.evidence import GRADIENTS, gather_evidence
from eigenprune.spectral.factored import layer_of_factors
from eigenprune.spectral.joint import JointOptions, joint_options
from eigenprune.spectral.measure import method_statistics
from eigenprune.spectral.methods import METHODS, WORTHS, Method, find_method
from eigenprune.spectral.metric import Metric, layer_metric
from eigenprune.spectral.ordered import first_order_changes, ordered_components, ordered_spectrum
from eigenprune.spectral.pieces import (
    SlicePieces,
    removed_output,
    slice_parts,
    slice_pieces,
    stack_rows,
    without_pieces,
)
from eigenprune.spectral.pivot import pivot_factors
from eigenprune.spectral.probe_scale import probed_scales, scaled
from eigenprune.spectral.sequential import factor_sequentially_
from eigenprune.spectral.shifted import retained_beta, shifted_target
from eigenprune.spectral.slices import KINDS, VIEWS, LayerView, Slice, check_kinds, is_rotary, layer_view, layer_views
from eigenprune.spectral.worth import BUDGETS, Cost, Options, layer_cost, parameter_cost, rank_options

__all__ = [
    "ALLOCATIONS",
    "BUDGETS",
    "GRADIENTS",
    "KINDS",
    "METHODS",
    "MOST_BYTES",
    "VIEWS",
    "WORTHS",
    "Allocation",
    "AllocationRow",
    "ChannelPlan",
    "Choice",
    "Components",
    "Cost",
    "Decomposed",
    "Evidence",
    "JointOptions",
    "LayerView",
    "Method",
    "Metric",
    "Options",
    "Slice",
    "SlicePieces",
    "Spectrum",
    "allocate",
    "channel_plans",
    "check_kinds",
    "component_bytes",
    "components",
    "factor_sequentially_",
    "find_method",
    "first_order_changes",
    "gather_evidence",
    "is_rotary",
    "joint_options",
    "layer_cost",
    "layer_metric",
    "layer_of_factors",
    "layer_view",
    "layer_views",
    "method_statistics",
    "ordered_components",
    "ordered_spectrum",
    "parameter_cost",
    "pivot_factors",
    "probed_scales",
    "rank_options",
    "reduced_weights",
    "removed_output",
    "retained_beta",
    "scaled",
    "shifted_target",
    "slice_parts",
    "slice_pieces",
    "solve_allocation",
    "spectrum",
    "stack_rows",
    "without_pieces",
]
