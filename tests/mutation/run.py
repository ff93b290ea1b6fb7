# SPDX-License-Identifier: Apache-2.0
"""Put each fault into a copy of the package, and see the tests named beside it fail: `make mutants`.

python -m tests.mutation.run [PART OF A NAME]...

The libraries are imported once; each fault runs in a forked process of its own.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.mutation.faults import FAULTS, MOST_SURVIVORS, REPOSITORY, Fault

SECONDS = 300  # a fault that makes the tests hang is caught
COPIED = ("eigenprune", "tests", "benchmarks", "pyproject.toml", "_eigenprune_autoload.py")


def main() -> None:
    """Run them all, print a table, and fail if more than one is not caught."""
    wanted = [fault for fault in FAULTS if not sys.argv[1:] or any(part in fault.name for part in sys.argv[1:])]
    for fault in wanted:  # all of them before the first minute is spent
        fault.applied((REPOSITORY / "eigenprune" / fault.file).read_text(encoding="utf-8"))
    _import_libraries()
    rows, known = [], set()
    with tempfile.TemporaryDirectory(prefix="eigenprune-mutants-") as scratch:
        copy = _copy(Path(scratch) / "copy")
        for fault in wanted:
            if fault.tests not in known and (whole := _run(fault, copy)) != "not caught":
                sys.exit(f"without the fault {fault.name!r}, its tests fail ({whole}): mend them first")
            known.add(fault.tests)
            path = copy / "eigenprune" / fault.file
            source = path.read_text(encoding="utf-8")
            path.write_text(fault.applied(source), encoding="utf-8")
            start = time.perf_counter()
            rows.append((fault, _run(fault, copy), time.perf_counter() - start))
            path.write_text(source, encoding="utf-8")
            print(f"{rows[-1][1]:<11} {rows[-1][2]:5.1f} s  {fault.file}: {fault.name}", flush=True)
    survivors = [fault.name for fault, found, _ in rows if found == "not caught"]
    print(f"{len(rows) - len(survivors)} of {len(rows)} faults caught")
    if len(survivors) > (MOST_SURVIVORS if len(rows) == len(FAULTS) else 0):
        sys.exit(f"not caught: {'; '.join(survivors)}")


def _import_libraries() -> None:
    """What all tests need, but nothing of this package: each process takes that from the copy."""
    os.environ |= {"EIGENPRUNE_AUTOLOAD": "0", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.dont_write_bytecode = True  # a patched file may have the size and the second of the one before
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    if any(name.partition(".")[0] == "eigenprune" for name in sys.modules):
        sys.exit("eigenprune was imported too early: its faults would not be seen")


def _copy(place: Path) -> Path:
    place.mkdir()
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(source, place / name)
    return place


def _run(fault: Fault, copy: Path) -> str:
    """`caught`, `not caught`, `hangs`, or what else came of its tests."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = _tests(fault, copy)
        finally:
            os._exit(code)
    ended = time.monotonic() + SECONDS
    while time.monotonic() < ended:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return {0: "not caught", 1: "caught"}.get(code, f"pytest ended with {code}")
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


def _tests(fault: Fault, copy: Path) -> int:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.chdir(copy)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(place for place in sys.path if place not in ("", str(REPOSITORY)))]
    os.environ |= {"PYTHONPATH": str(copy), "EIGENPRUNE_AUTOLOAD": "1"}
    import pytest

    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *fault.tests]))


if __name__ == "__main__":
    main()
