# SPDX-License-Identifier: Apache-2.0
"""Push a pruned model, pull it again, generate: with the real client, against the server of the tests on loopback.

python benchmarks/hub_round_trip.py FOLDER [PROMPT]     # FOLDER: as `eigenprune prune` wrote it

The server is `tests/hub/server.py`, in memory; nothing leaves the machine. The client is a process of its own, since
its library reads where the Hub is when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from environment import ROOT

REPO = "demo/pruned"
NEW_TOKENS = 24
CLIENT = """
import json, sys
import torch
import eigenprune
from eigenprune.calibrate.cache import model_fingerprint
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, repo, prompt, new_tokens = sys.argv[1:]
commit = eigenprune.push_to_hub(folder, repo)
model = AutoModelForCausalLM.from_pretrained(repo, revision=commit)
tokenizer = AutoTokenizer.from_pretrained(repo, revision=commit)
with torch.no_grad():
    output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=int(new_tokens), do_sample=False)
text = " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())
print(json.dumps([commit, model_fingerprint(model), text]))
"""


@dataclass(frozen=True)
class RoundTrip:
    """What came of it.

    Attributes:
        commit: id on the server.
        files: {name: bytes} in the repository.
        requests: that the server answered.
        fingerprint: of the pulled model, as `model_fingerprint` makes it.
        text: the prompt with greedy tokens after it.
        seconds: for all of it.
    """

    commit: str
    files: dict[str, int]
    requests: int
    fingerprint: str
    text: str
    seconds: float


def round_trip(folder: Path, prompt: str) -> RoundTrip:
    """Push the model in `folder` to a new server, pull it with plain `from_pretrained`, and continue `prompt`."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from tests.hub.server import TOKEN, Hub

    began = time.perf_counter()
    others = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    with tempfile.TemporaryDirectory() as home, Hub() as hub:
        mine = {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_TOKEN": TOKEN}
        mine |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", CLIENT, str(folder), REPO, prompt, str(NEW_TOKENS)]
        done = subprocess.run(command, env=others | mine, capture_output=True, text=True, check=False)
        hub.shutdown()
        if done.returncode != 0:
            raise RuntimeError(f"push or pull failed:\n{done.stderr[-3000:]}")
        commit, fingerprint, text = json.loads(done.stdout.splitlines()[-1])
        files = {name: len(content) for name, content in hub.files(REPO).items()}
        requests = len(hub.requests)
    return RoundTrip(commit, files, requests, fingerprint, text, time.perf_counter() - began)


def told(found: RoundTrip) -> str:
    """One paragraph."""
    size = sum(found.files.values())
    return (
        f"Pushed {len(found.files)} files, {size / 1e6:.0f} MB, to a Hub on loopback in one commit "
        f"({found.commit[:12]}) and pulled them with plain from_pretrained: {found.requests} requests, "
        f"{found.seconds:.0f} s. It says: {found.text}"
    )


if __name__ == "__main__":
    print(told(round_trip(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "The capital of France is")))
