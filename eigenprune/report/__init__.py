# SPDX-License-Identifier: Apache-2.0
"""What a run did, as an object, as JSON, and as tables."""

from eigenprune.report.prune_report import LayerReport, PruneReport
from eigenprune.report.tables import layer_table, summary_table

__all__ = ["LayerReport", "PruneReport", "layer_table", "summary_table"]
