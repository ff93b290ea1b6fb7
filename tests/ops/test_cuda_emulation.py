# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a CPU: compiled as plain C++, every CUDA thread a fiber, every bit compared with a reference.

This finds wrong indices, foreign reads, misaligned 16-byte loads, forgotten barriers and deadlocks. It cannot find what
only the hardware does: see tests/ops/test_cuda_decode.py for that, where there is a GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

EMULATION = Path(__file__).parent / "cuda_emulation"
COMPILER = shutil.which("c++")
# -fno-tree...: a loop of the machine must not become a memcpy, which ThreadSanitizer would watch.
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wno-unknown-pragmas", "-fno-tree-loop-distribute-patterns"]
SANITIZERS = {
    "plain": [],
    "address_undefined": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
# Every n-th of the small cases: a sanitizer costs about ten times the time. 10 to 20 s each, half to compile.
EVERY = {"plain": "5", "address_undefined": "25", "thread": "25"}  # prime to the 12 kinds of small cases

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on PATH: the CUDA kernels were not emulated")


def compile_cpp(flags: list[str], *sources: Path, output: Path) -> None:
    command = [str(COMPILER), *FLAGS, *flags, "-I", str(EMULATION), *map(str, sources), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Path:
    """The emulator itself, without a sanitizer: it switches stacks."""
    output = tmp_path_factory.mktemp("cuda_emulation") / "emulator.o"
    compile_cpp(["-c"], EMULATION / "emulator.cpp", output=output)
    return output


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_every_bit_is_right(sanitizer, machine, tmp_path):
    flags = SANITIZERS[sanitizer]
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    probe = [str(COMPILER), *flags, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")]
    if subprocess.run(probe, capture_output=True, check=False, timeout=60).returncode != 0:
        pytest.skip(f"this compiler has no run-time library for {' '.join(flags)}")
    compile_cpp(flags, EMULATION / "check_kernels.cpp", machine, output=tmp_path / "check")
    command = [str(tmp_path / "check"), EVERY[sanitizer]]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    found = re.search(r"(\d+) runs, 0 failures", result.stdout)
    assert found, result.stdout
    assert int(found[1]) >= 150, "too few cases ran to mean anything"
