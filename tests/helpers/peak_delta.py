# SPDX-License-Identifier: Apache-2.0
"""Write a delta and apply it, and print, as JSON, what each took: `python -m tests.helpers.peak_delta FOLDER`.

FOLDER holds base.safetensors and tuned.safetensors.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from eigenprune.hub.delta_decode import DeltaFile
from eigenprune.hub.delta_encode import write_delta
from eigenprune.hub.weight_source import WeightSource
from eigenprune.memory import release_unused
from tests.helpers.deltas import written
from tests.helpers.peak_memory import Peak, memory


def peak_of(work: Callable[[], object]) -> dict[str, int]:
    """The most bytes above what was there before."""
    release_unused()
    before, peak = memory(), Peak()
    peak.start()
    work()
    peak.ended.set()
    peak.join()
    return {name: peak.most[name] - before[name] for name in before}


def main() -> None:
    """Warm up on small tensors, so that no library is loaded later, then measure."""
    folder = Path(sys.argv[1])
    written(folder / "warm.safetensors")

    def encode() -> None:
        with WeightSource(folder / "base.safetensors") as base, WeightSource(folder / "tuned.safetensors") as tuned:

            def mask(name: str) -> torch.Tensor:
                return torch.rand(tuned.specs[name][1], generator=torch.Generator().manual_seed(0)) < 0.75

            write_delta(folder / "delta.safetensors", base, tuned, mask, base_model="b", rule="random", keep=0.75)

    def decode() -> None:
        with DeltaFile(folder / "delta.safetensors") as delta, WeightSource(folder / "base.safetensors") as base:
            delta.write_merged(folder / "merged.safetensors", base)

    print(json.dumps({"encode": peak_of(encode), "decode": peak_of(decode)}))


if __name__ == "__main__":
    main()
