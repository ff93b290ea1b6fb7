# SPDX-License-Identifier: Apache-2.0
"""The report of `python -m eigenprune`: versions, the extension, CPU, CUDA, and which way every operator goes here.

Names no user and no host, so that it can be pasted into an issue. Imports torch and nothing heavier.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from eigenprune.ops._checks import SUPPORTED_DTYPES
from eigenprune.ops._library import NAMESPACE, SCHEMAS, extension_status

PACKAGES = ("eigenprune", "torch", "transformers", "peft")
BACKENDS = ("CPU", "CUDA")
EVEN, ODD = 64, 63  # of the sizes of a layer, no more than whether they are even decides a path
MOST_ROWS = 4096  # paths are asked for up to here; far above any row where they change

LinearPath = Callable[[str, int, int, int], str]


def environment() -> dict[str, Any]:
    """Everything the report says, as JSON has it.

    Returns:
        versions: package -> version, None where it is not installed.
        extension: loaded, reason, file (its name), build (facts of the compilation; empty without).
        cpu: name, cores, threads (of torch), features (name -> bool), kernels (instruction set in use, or None).
        cuda: torch (its CUDA version or None), available, devices (name and capability), architectures (that the
            extension was compiled for).
        operators: name -> backend -> "compiled" or "torch" (the pure-torch reference, or torch's own functions).
        linear_paths: what computes a factored linear on CPU: dtype -> list of {rows: [first, last], path}; `last` is
            None where nothing follows. A dtype whose odd sizes go another way has a second key, "<dtype>, odd sizes".
            Empty when the extension is loaded and its fact module is missing.
    """
    status = extension_status()
    build = {key: value for key, value in status.build.items() if key not in ("cpu_features", "cpu_kernels")}
    architectures = str(status.build.get("cuda_architectures", ""))
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "extension": {
            "loaded": status.loaded,
            "reason": status.reason,
            "file": None if status.path is None else status.path.name,
            "build": build,
        },
        "cpu": {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "features": dict(status.build.get("cpu_features", {})),
            "kernels": status.build.get("cpu_kernels"),
        },
        "cuda": {
            "torch": torch.version.cuda,
            "available": torch.cuda.is_available(),
            "devices": [_device(index) for index in range(torch.cuda.device_count())],
            "architectures": [name for name in architectures.split(",") if name],
        },
        "operators": {name: {backend: _backend(name, backend) for backend in BACKENDS} for name in SCHEMAS},
        "linear_paths": _linear_paths(),
    }


def report(facts: dict[str, Any]) -> str:
    """The same for people, in lines of text."""
    return "\n".join(_lines(facts)) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report; with --json as one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m eigenprune",
        description="Say what is installed here, and what computes each operator. "
        "For pruning see `python -m eigenprune.cli --help`.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    wants_json = parser.parse_args(arguments).json
    facts = environment()
    sys.stdout.write(json.dumps(facts, indent=2) + "\n" if wants_json else report(facts))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _device(index: int) -> dict[str, str]:
    major, minor = torch.cuda.get_device_capability(index)
    return {"name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}"}


def _backend(name: str, backend: str) -> str:
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", backend)
    return "compiled" if compiled else "torch"


def _linear_paths() -> dict[str, list[dict[str, Any]]]:
    path = _path_function()
    if path is None:
        return {}
    found = {}
    for dtype in (str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES):
        found[dtype] = _ranges(path, dtype, EVEN)
        odd = _ranges(path, dtype, ODD)
        if odd != found[dtype]:
            found[f"{dtype}, odd sizes"] = odd
    return found


def _path_function() -> LinearPath | None:
    if not extension_status().loaded:
        return lambda dtype, rows, in_features, rank: "torch"
    try:
        facts = importlib.import_module("eigenprune.ops._build_info")
    except ImportError:
        return None
    function: LinearPath = facts.linear_path  # the one that the kernels ask themselves: csrc/cpu/linear_path.cpp
    return function


def _ranges(path: LinearPath, dtype: str, size: int) -> list[dict[str, Any]]:
    ranges: list[dict[str, Any]] = []
    for rows in range(1, MOST_ROWS + 1):
        name = path(dtype, rows, size, size)
        if not ranges or ranges[-1]["path"] != name:
            ranges.append({"rows": [rows, rows], "path": name})
        ranges[-1]["rows"][1] = rows
    ranges[-1]["rows"][1] = None
    return ranges


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    cpu, cuda, extension = facts["cpu"], facts["cuda"], facts["extension"]
    yield _row("versions", ", ".join(f"{name} {found or 'missing'}" for name, found in facts["versions"].items()))
    yield _row("extension", extension["reason"])
    for key, value in extension["build"].items():
        yield _row("", f"{key.replace('_', ' ')}: {value or 'none'}")
    yield _row("CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads")
    if cpu["features"]:
        present = [name for name, found in cpu["features"].items() if found]
        yield _row("", f"has: {' '.join(present) or 'none of ' + ' '.join(cpu['features'])}")
    if cpu["kernels"]:
        yield _row("", f"kernels in use: {cpu['kernels']}")
    if cuda["torch"] is None:
        yield _row("CUDA", "this torch was built without it")
    else:
        yield _row("CUDA", f"torch has {cuda['torch']}; {len(cuda['devices'])} devices")
        for device in cuda["devices"]:
            yield _row("", f"{device['name']}, capability {device['capability']}")
    yield ""
    yield f"{'operator':24}" + "".join(f"{backend:10}" for backend in BACKENDS).rstrip()
    for name, backends in facts["operators"].items():
        yield f"{name:24}" + "".join(f"{backends[backend]:10}" for backend in BACKENDS).rstrip()
    if facts["linear_paths"]:
        yield ""
        yield f"{'factored linear':24}rows of the input on CPU: what computes it"
    for dtype, ranges in facts["linear_paths"].items():
        yield f"{dtype:24}" + ", ".join(f"{_span(*entry['rows'])}: {entry['path']}" for entry in ranges)


def _row(name: str, text: str) -> str:
    return f"{name:14}{text}"


def _span(first: int, last: int | None) -> str:
    if last is None:
        return "any" if first == 1 else f"{first} and more"
    return str(first) if first == last else f"{first}-{last}"
