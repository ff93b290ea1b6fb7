# SPDX-License-Identifier: Apache-2.0
"""The command line: `eigenprune prune | eval | inspect`."""

from eigenprune.cli.main import main

__all__ = ["main"]
