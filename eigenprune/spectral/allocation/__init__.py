# SPDX-License-Identifier: Apache-2.0
"""Ranks for all matrices under one budget."""

from eigenprune.spectral.allocation.case import Evidence
from eigenprune.spectral.allocation.probed import ASVD_KEEPS, LEMS_RANK
from eigenprune.spectral.allocation.rows import ALLOCATIONS, Allocation, AllocationRow, allocate, solve_allocation
from eigenprune.spectral.allocation.table import Choice, choice_of

__all__ = [
    "ALLOCATIONS",
    "ASVD_KEEPS",
    "LEMS_RANK",
    "Allocation",
    "AllocationRow",
    "Choice",
    "Evidence",
    "allocate",
    "choice_of",
    "solve_allocation",
]
