# SPDX-License-Identifier: Apache-2.0
"""Pruning a model: `prune_` and its steps, in the order in which it takes them."""

from eigenprune.prune.prune import prune_

__all__ = ["prune_"]
