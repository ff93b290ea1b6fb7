# SPDX-License-Identifier: Apache-2.0
"""Weights to spectra in a metric, spectra to worth, worth to ranks, ranks to factors."""

from eigenprune.spectral.allocation import ALLOCATIONS, Allocation, Choice, allocate, solve_allocation
from eigenprune.spectral.decompose import Components, Spectrum, components, spectrum
from eigenprune.spectral.factored import layer_of_factors
from eigenprune.spectral.methods import METHODS, Method, find_method
from eigenprune.spectral.metric import Metric, layer_metric
from eigenprune.spectral.pivot import pivot_factors
from eigenprune.spectral.worth import Options, rank_options

__all__ = [
    "ALLOCATIONS",
    "METHODS",
    "Allocation",
    "Choice",
    "Components",
    "Method",
    "Metric",
    "Options",
    "Spectrum",
    "allocate",
    "components",
    "find_method",
    "layer_metric",
    "layer_of_factors",
    "pivot_factors",
    "rank_options",
    "solve_allocation",
    "spectrum",
]
