# SPDX-License-Identifier: Apache-2.0
"""Save two models over one folder in turn until killed: `python -m tests.helpers.save_and_die OLD NEW FOLDER`.

For every line on standard input a forked child does so (a start of Python for each would cost seconds), its process id
is printed, and the parent waits until somebody has killed it.
"""

import os
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from eigenprune.hub import save_model


def main() -> None:
    """Load both models once, then serve."""
    models = [AutoModelForCausalLM.from_pretrained(source) for source in sys.argv[1:3]]
    folder = Path(sys.argv[3])
    print("ready", flush=True)
    for _ in sys.stdin:
        child = os.fork()
        while child == 0:
            for model in models:
                save_model(model, folder, overwrite=True, max_shard_size="60KB")
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)


if __name__ == "__main__":
    main()
