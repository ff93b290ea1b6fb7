# SPDX-License-Identifier: Apache-2.0
"""Selection over single entries: KEN and its relatives."""

from eigenprune.entries.apply import merge_entries
from eigenprune.entries.groups import EMBEDDINGS, HEADS
from eigenprune.entries.packed import PackedMasks
from eigenprune.entries.rules import RULES, Rule
from eigenprune.entries.select import select_entries

__all__ = ["EMBEDDINGS", "HEADS", "RULES", "PackedMasks", "Rule", "merge_entries", "select_entries"]
