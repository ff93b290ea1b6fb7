# SPDX-License-Identifier: Apache-2.0
"""Let every adapter of peft pass our check on its way into a model.

Imported right after `peft.tuners.tuners_utils`, which is before peft as a whole is there: peft imports torch, and torch
may be what loads this package. So the plug-in itself is imported when the first adapter is made.
"""

import functools
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn


def _install() -> None:
    """Wrap `BaseTuner.inject_adapter`, once."""
    inject = BaseTuner.inject_adapter
    if getattr(inject, "checked_by_eigenprune", False):
        return

    @functools.wraps(inject)
    def inject_adapter(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        from eigenprune.integrations.peft import check_new_adapter

        check_new_adapter(self, model, self.peft_config[adapter_name], kwargs.get("state_dict"))
        inject(self, model, adapter_name, *args, **kwargs)

    inject_adapter.checked_by_eigenprune = True  # type: ignore[attr-defined]
    BaseTuner.inject_adapter = inject_adapter  # type: ignore[method-assign]


_install()
