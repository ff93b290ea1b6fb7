# SPDX-License-Identifier: Apache-2.0
"""The rows of a benchmark: a JSONL file that grows as they are measured, and the options that all such scripts have."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from environment import ROOT, environment, shared_folder

RESULTS_FOLDER = ROOT / "benchmarks" / "results"


def command_line(description: str | None, results: Path) -> argparse.ArgumentParser:
    """A parser with the options `models`, `out` (by default `results`) and `table`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / ".models", help="where the models are kept")
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--table", action="store_true", help="print the rows kept so far, and measure nothing")
    return parser


def kept_rows(path: Path) -> list[dict[str, Any]]:
    """The rows measured so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def keep_row(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Add a row to the file, with machine, versions and commit, and return it so."""
    row = row | environment()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")
    return row


def shared_or_exit() -> Path:
    """The folder of texts and tasks; without one the script ends and says how to name it."""
    shared = shared_folder()
    if shared is None:
        sys.exit(f"{Path(sys.argv[0]).name} needs the texts and tasks of the shared folder: set EIGENPRUNE_SHARED")
    return shared
