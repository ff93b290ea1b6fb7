# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk, and (to come) on the Hub."""

from eigenprune.hub.save import REPORT_NAME, save_model

__all__ = ["REPORT_NAME", "save_model"]
