# SPDX-License-Identifier: Apache-2.0
"""Register the quantizer plug-in with transformers, now or when transformers comes to be imported.

Standard library only: `import eigenprune` runs this. transformers has no entry point for quantizers, so a finder waits
for the one module that holds its table of them.
"""

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TABLE = "transformers.quantizers.auto"
PLUGIN = "eigenprune.integrations.transformers"


def register_with_transformers() -> None:
    """Register now if transformers' table of quantizers is loaded, else as soon as it is; any number of calls."""
    if TABLE in sys.modules:
        import_module(PLUGIN)
    elif not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


class _TableFinder(MetaPathFinder):
    """Lets the table be imported as ever, and imports the plug-in right after it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_then_register(module: ModuleType) -> None:
            run(module)
            import_or_warn(PLUGIN)

        spec.loader.exec_module = run_then_register  # type: ignore[method-assign]
        return spec


def import_or_warn(plugin: str) -> None:
    """Import `plugin`; if that fails, say so, and let the library that is being imported go on without it."""
    try:
        import_module(plugin)
    except Exception as error:  # noqa: BLE001 - the environment may not want pruned models at all
        logging.getLogger("eigenprune").warning(
            "eigenprune does not work with this transformers, and pruned models will not load: %r", error
        )
