# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk, and (to come) on the Hub."""

from eigenprune.hub.save import save_model

__all__ = ["save_model"]
