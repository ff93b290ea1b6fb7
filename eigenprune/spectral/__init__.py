# SPDX-License-Identifier: Apache-2.0
"""Weights to spectra in a metric, spectra to worth, worth to ranks, ranks to factors."""

from eigenprune.spectral.allocation import ALLOCATIONS, Choice, allocate
from eigenprune.spectral.decompose import Components, Spectrum, components, spectrum
from eigenprune.spectral.factored import layer_of_factors
from eigenprune.spectral.methods import METHODS, Method, find_method
from eigenprune.spectral.metric import Metric, layer_metric
from eigenprune.spectral.pivot import pivot_factors
from eigenprune.spectral.probe_scale import probed_scales, scaled
from eigenprune.spectral.sequential import factor_sequentially_
from eigenprune.spectral.shifted import retained_beta, shifted_target
from eigenprune.spectral.worth import Options, rank_options

__all__ = [
    "ALLOCATIONS",
    "METHODS",
    "Choice",
    "Components",
    "Method",
    "Metric",
    "Options",
    "Spectrum",
    "allocate",
    "components",
    "factor_sequentially_",
    "find_method",
    "layer_metric",
    "layer_of_factors",
    "pivot_factors",
    "probed_scales",
    "rank_options",
    "retained_beta",
    "scaled",
    "shifted_target",
    "spectrum",
]
