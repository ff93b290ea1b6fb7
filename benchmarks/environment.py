# SPDX-License-Identifier: Apache-2.0
"""Where a figure comes from: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, object]:
    """Facts to keep beside every raw row; no host name, no path."""
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "machine": f"{_cpu_name()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "eigenprune": version("eigenprune"),
    }


def shared_folder() -> Path | None:
    """The folder of texts and tasks, `$EIGENPRUNE_SHARED` or `../shared` beside the checkout; None without one."""
    folder = Path(os.environ.get("EIGENPRUNE_SHARED") or ROOT.parent / "shared")
    return folder if (folder / "data").is_dir() else None


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
