# SPDX-License-Identifier: Apache-2.0
"""The same seed gives the same bits, in this process and in others; nobody else's random numbers change (row G42)."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eigenprune import EigenpruneConfig, prune_, save_model
from tests.helpers.compare import file_hashes, state_hashes
from tests.helpers.tiny_models import tiny_model, token_windows

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RUNS = 5
SAVE = """
import json, sys
from pathlib import Path
from tests.reliability.test_determinism import saved
print(json.dumps(saved(Path(sys.argv[1]))))
"""


def _pruned(kind: str, method: str, seed: int = 0) -> torch.nn.Module:
    model = tiny_model(kind)
    prune_(model, EigenpruneConfig(keep=0.6, method=method, seed=seed), windows=token_windows(), progress=False)
    return model


def saved(folder: Path) -> dict[str, str]:
    """The files of a pruned and saved model."""
    return file_hashes(save_model(_pruned("llama", "kfac"), folder))


@pytest.mark.parametrize("method", ["kfac", "svd-llm", "asvd", "svd"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.filterwarnings("ignore:method 'svd'")
def test_g42_runs_differ_in_no_bit(kind: str, method: str) -> None:
    """A masked language model (bert) draws the labels of its objective; each run finds another random state."""
    states = []
    for run in range(RUNS):
        os.environ["EIGENPRUNE_CACHE"] = f"{os.environ['EIGENPRUNE_CACHE']}-{run}"  # nothing is taken from the last run
        torch.manual_seed(run)
        states.append(state_hashes(_pruned(kind, method)))
    assert all(state == states[0] for state in states)


def test_g42_another_process_writes_the_same_files(tmp_path: Path) -> None:
    here = saved(tmp_path / "here")
    variables = {
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONHASHSEED": "17",
        "EIGENPRUNE_CACHE": str(tmp_path / "c"),
    }
    command = [sys.executable, "-c", SAVE, str(tmp_path / "there")]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | variables, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == here


def test_g42_global_random_states_are_left_alone() -> None:
    torch.manual_seed(3)
    model = tiny_model("bert")
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    prune_(model, EigenpruneConfig(keep=0.6), windows=token_windows(), progress=False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_g42_another_seed_is_another_measurement_where_labels_are_drawn() -> None:
    """So that the equalities above are not those of something that ignores the seed."""
    assert state_hashes(_pruned("bert", "kfac", seed=1)) != state_hashes(_pruned("bert", "kfac", seed=2))
