# SPDX-License-Identifier: Apache-2.0
"""The Python face of the operators: public wrappers, pure-torch references and the state of the extension.

Importing this package always leaves `torch.ops.eigenprune.*` defined: by the compiled extension when it can
be loaded, by the pure-torch references otherwise. `extension_status()` says which, and why.
"""

from eigenprune.ops._autocast import has_autocast
from eigenprune.ops._library import ExtensionStatus, extension_status
from eigenprune.ops.grouped_linear import grouped_linear, grouped_linear_reference
from eigenprune.ops.low_rank_linear import low_rank_linear, low_rank_linear_reference
from eigenprune.ops.pivot_linear import pivot_linear, pivot_linear_reference

__all__ = [
    "ExtensionStatus",
    "extension_status",
    "grouped_linear",
    "grouped_linear_reference",
    "has_autocast",
    "low_rank_linear",
    "low_rank_linear_reference",
    "pivot_linear",
    "pivot_linear_reference",
]
