# SPDX-License-Identifier: Apache-2.0
"""Register each plug-in with its library, now or when that library comes to be imported.

Standard library only: `import eigenprune` runs this. Neither transformers nor peft has an entry point for what the
plug-ins add, so a finder waits for the one module of each that they need.
"""

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# {module that must be there: plug-in that is then imported}; importing a plug-in registers it.
PLUGINS = {
    "transformers.quantizers.auto": "eigenprune.integrations.transformers",
    "peft.tuners.tuners_utils": "eigenprune.integrations.peft_hook",
}


def register_plugins() -> None:
    """Register with the libraries that are loaded, and with the others as soon as they are; any number of calls."""
    for library, plugin in PLUGINS.items():
        if library in sys.modules:
            import_or_warn(plugin, library)
    if not any(isinstance(finder, _PluginFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PluginFinder())


class _PluginFinder(MetaPathFinder):
    """Lets a library be imported as ever, and imports its plug-in right after it.

    It stays where it is: libraries ask whether peft is installed with `importlib.util.find_spec`, so being asked for a
    module does not mean that it is about to run.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in PLUGINS:
            return None
        spec = self._found_by_the_others(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_then_register(module: ModuleType) -> None:
            run(module)
            import_or_warn(PLUGINS[name], name)

        spec.loader.exec_module = run_then_register  # type: ignore[method-assign]
        return spec

    def _found_by_the_others(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        """What is found without this finder; only those behind it are asked, so that two of them never call in turn."""
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
        return None


def import_or_warn(plugin: str, library: str) -> None:
    """Import `plugin`; if that fails, say so, and let the `library` that is being imported go on without it."""
    try:
        import_module(plugin)
    except Exception as error:  # noqa: BLE001 - the environment may not want pruned models at all
        logging.getLogger("eigenprune").warning(
            "eigenprune does not work with this %s; pruned models will not load or train with it: %r",
            library.partition(".")[0],
            error,
        )
