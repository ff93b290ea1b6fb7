# SPDX-License-Identifier: Apache-2.0
"""Prune while loading and print, as JSON, what it took.

python -m tests.helpers.peak_memory FOLDER METHOD KEEP [WINDOWS WINDOW]
"""

import json
import sys
import tempfile
import threading
import warnings
from pathlib import Path

from transformers import AutoModelForCausalLM

from eigenprune import EigenpruneConfig, prune_
from tests.helpers.tiny_models import saved_dense, tiny_model, token_windows


def memory() -> dict[str, int]:
    """Bytes: all resident pages, and the anonymous ones among them, without the pages of mapped files."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(rows[field].split()[0]) * 1024 for name, field in (("resident", "VmRSS"), ("anonymous", "RssAnon"))
    }


class Peak(threading.Thread):
    """The most of both, looked at every 2 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = memory()
        self.ended = threading.Event()

    def run(self) -> None:
        """Look until told to end."""
        while not self.ended.wait(0.002):
            self.most = {name: max(value, self.most[name]) for name, value in memory().items()}


def main() -> None:
    """Warm up on a tiny model, so that no library is loaded later, then measure."""
    warnings.simplefilter("ignore")
    folder, method, keep = sys.argv[1], sys.argv[2], float(sys.argv[3])
    windows, window = map(int, sys.argv[4:6]) if len(sys.argv) > 4 else (2, 64)
    config = EigenpruneConfig(keep=keep, method=method, windows=windows, window=window)
    with tempfile.TemporaryDirectory() as scratch:
        saved_dense("llama", Path(scratch) / "tiny")
        AutoModelForCausalLM.from_pretrained(
            Path(scratch) / "tiny", quantization_config=EigenpruneConfig(keep=keep, window=32)
        )
    prune_(tiny_model("llama"), config, windows=token_windows(), progress=False)
    baseline, peak = memory(), Peak()
    peak.start()
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    peak.ended.set()
    peak.join()
    found = {name: peak.most[name] - baseline[name] for name in baseline}
    found["pruned"] = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
