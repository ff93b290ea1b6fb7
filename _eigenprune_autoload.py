# SPDX-License-Identifier: Apache-2.0
"""What `import torch` runs of eigenprune, by the entry point group `torch.backends`.

It makes plain `from_pretrained` load a pruned model without `import eigenprune`. An entry point that raises breaks
`import torch` for the whole environment, so this file stands outside the package, needs the standard library only, and
lets nothing out. EIGENPRUNE_AUTOLOAD=0 turns it off; so does torch's own TORCH_DEVICE_BACKEND_AUTOLOAD=0.
"""

import logging
import os


def register() -> None:
    """Have the plug-in registered as soon as transformers loads its table of quantizers; never raises."""
    if os.environ.get("EIGENPRUNE_AUTOLOAD") == "0":
        return
    try:
        import eigenprune  # noqa: F401 - its import registers, and is light
    except Exception:
        logging.getLogger("eigenprune").debug("eigenprune did not load beside torch", exc_info=True)
