# SPDX-License-Identifier: Apache-2.0
"""Factored models trained by DDP and FSDP2 on two CPU processes, against one process with the whole batch."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.two_processes import KINDS, LAYOUTS

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# The same gradients, summed in another order, over a few steps.
SAME = 1e-4


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("two") / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.helpers.two_processes", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stderr=pipe, text=True, start_new_session=True
    ) as run:
        try:
            _, said = run.communicate(timeout=280)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # the launcher alone would leave its two processes behind
            raise
    assert run.returncode == 0, said[-4000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.slow  # 15 s alone on two cores
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_get_where_one_does(way: str, kind: str, layout: str, found: dict[str, Any]) -> None:
    assert found[f"{way}-{kind}-{layout}"] <= SAME


@pytest.mark.slow
def test_trained_rank_pruning_leaves_both_processes_with_the_same_bits(found: dict[str, Any]) -> None:
    one, other = found["trained-rank"]
    assert one == other
    assert any(json.loads(one["ranks"]).values())
