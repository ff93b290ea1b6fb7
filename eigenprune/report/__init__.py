# SPDX-License-Identifier: Apache-2.0
"""What a run did, as an object, as JSON, and as tables."""

from eigenprune.report.provenance import CARRIED, base_facts, versions
from eigenprune.report.prune_report import LayerReport, PruneReport, dense_reports
from eigenprune.report.tables import layer_table, summary_table

__all__ = [
    "CARRIED",
    "LayerReport",
    "PruneReport",
    "base_facts",
    "dense_reports",
    "layer_table",
    "summary_table",
    "versions",
]
