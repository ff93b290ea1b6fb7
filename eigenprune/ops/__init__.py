# SPDX-License-Identifier: Apache-2.0
"""The Python face of the operators: public wrappers, pure-torch references and the state of the extension.

Importing this package always leaves `torch.ops.eigenprune.*` defined: by the compiled extension when it can
be loaded, by the pure-torch references otherwise. `extension_status()` says which, and why.
"""

from eigenprune.ops._autocast import has_autocast
from eigenprune.ops._library import ExtensionStatus, extension_status
from eigenprune.ops._pivots import source_positions
from eigenprune.ops._svd_paths import SvdPath
from eigenprune.ops.gram_svd import gram_svd, gram_svd_reference
from eigenprune.ops.grouped_linear import grouped_linear, grouped_linear_reference
from eigenprune.ops.low_rank_linear import low_rank_linear, low_rank_linear_reference
from eigenprune.ops.merge_columns import merge_columns, merge_columns_reference
from eigenprune.ops.pivot_linear import pivot_linear, pivot_linear_reference
from eigenprune.ops.split_columns import split_columns, split_columns_reference
from eigenprune.ops.truncated_svd import TruncatedSVD, truncated_svd, truncated_svd_reference

__all__ = [
    "ExtensionStatus",
    "SvdPath",
    "TruncatedSVD",
    "extension_status",
    "gram_svd",
    "gram_svd_reference",
    "grouped_linear",
    "grouped_linear_reference",
    "has_autocast",
    "low_rank_linear",
    "low_rank_linear_reference",
    "merge_columns",
    "merge_columns_reference",
    "pivot_linear",
    "pivot_linear_reference",
    "source_positions",
    "split_columns",
    "split_columns_reference",
    "truncated_svd",
    "truncated_svd_reference",
]
