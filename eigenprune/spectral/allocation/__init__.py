# SPDX-License-Identifier: Apache-2.0
"""Ranks for all matrices under one budget."""

from eigenprune.spectral.allocation.rows import ALLOCATIONS, Allocation, allocate, solve_allocation
from eigenprune.spectral.allocation.table import Choice

__all__ = ["ALLOCATIONS", "Allocation", "Choice", "allocate", "solve_allocation"]
