# SPDX-License-Identifier: Apache-2.0
"""The build: unknown switches are refused, and the CUDA kernels compile for every shipped architecture."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.helpers import ROOT

NVCC = shutil.which("nvcc")


def run_setup(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("EIGENPRUNE_BUILD", "gpu", "EIGENPRUNE_BUILD='gpu' is unknown; use one of: auto, cpu, cuda, none."),
        ("EIGENPRUNE_SANITIZE", "address,thread", "EIGENPRUNE_SANITIZE names ['thread']"),
    ],
)
def test_unknown_switch_is_refused(variable, value, message):
    result = run_setup(**{variable: value})
    assert result.returncode != 0
    assert message in result.stderr


def test_known_switch_is_accepted():
    result = run_setup(EIGENPRUNE_BUILD="none")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("0.1.0")


@pytest.mark.slow  # about 10 s for each architecture on one core
@pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH: the CUDA kernels were not compiled")
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_kernels_compile_without_warnings_or_spills(architecture, tmp_path):
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        command = [
            NVCC,
            "-std=c++20",
            "-O3",
            "-Werror",
            "all-warnings",
            "-Xptxas",
            "-v",
            f"-arch=sm_{architecture}",
        ]
        result = subprocess.run(
            [*command, "-c", str(source), "-o", str(tmp_path / (source.stem + ".o"))],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert result.returncode == 0, result.stderr
        reports = [line for line in (result.stdout + result.stderr).splitlines() if "spill stores" in line]
        assert reports, "nvcc reported no kernel"
        assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in reports), reports


def included(path: Path) -> set[Path]:
    """A file of ours and every file of ours that it includes, however deep."""
    found = {path}
    for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
        found |= included((path.parent / name).resolve())
    return found


def test_kernel_sources_include_no_torch_header():
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    assert len(sources) >= 2
    files = set().union(*(included(source) for source in sources))
    assert {"decode_tiles.cuh", "pivot_rows.cuh", "decode_linear.h"} <= {path.name for path in files}
    for path in files:
        assert not re.search(r"#include\s*<(torch|ATen|c10)", path.read_text()), path.name


def test_the_build_knows_every_cuda_file():
    # A header that setup.py does not name causes no rebuild; a suffix that MANIFEST.in does not name is not shipped.
    names = set(re.findall(r'"(?:csrc/cuda/)?(\w+)(?:\.cu|\.cpp)?"', (ROOT / "setup.py").read_text()))
    files = sorted((ROOT / "csrc" / "cuda").iterdir())
    assert {path.stem for path in files} <= names
    suffixes = re.findall(r"\*(\.\w+)", (ROOT / "MANIFEST.in").read_text())
    assert {path.suffix for path in files} <= set(suffixes)
