# SPDX-License-Identifier: Apache-2.0
"""The command line: `eigenprune prune | eval | inspect | card | push`."""

from eigenprune.cli.main import main

__all__ = ["main"]
