# SPDX-License-Identifier: Apache-2.0
"""What a run did, as an object, as JSON, and as tables."""

from eigenprune.report.provenance import CARRIED, base_card, base_facts, versions
from eigenprune.report.prune_report import LayerReport, PruneReport, dense_reports
from eigenprune.report.tables import layer_table, summary_table
from eigenprune.report.task_pictures import write_pictures
from eigenprune.report.task_views import TaskViews

__all__ = [
    "CARRIED",
    "LayerReport",
    "PruneReport",
    "TaskViews",
    "base_card",
    "base_facts",
    "dense_reports",
    "layer_table",
    "summary_table",
    "versions",
    "write_pictures",
]
