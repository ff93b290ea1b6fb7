# SPDX-License-Identifier: Apache-2.0
"""The facts of a sparse delta that its file and the config beside it both state, and what each may be."""

import re
from collections.abc import Mapping

from eigenprune.errors import ConfigError

DELTA_VERSION = 1
# How values are stored: as they were, or rounded to the type that safetensors calls so.
PRECISIONS = {"exact": None, "bfloat16": "BF16", "float16": "F16"}
DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_TEXTS = {
    "base_model": re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?", re.ASCII),
    "base_revision": re.compile(r"([0-9a-f]{7,64})?", re.ASCII),
    "base_sha256": DIGEST,
    "rule": _WORD,
    "scope": _WORD,
    "precision": re.compile("|".join(PRECISIONS)),
}
HEADER = (*_TEXTS, "keep", "format_version")


def check_delta_header(header: object) -> None:
    """Check the fields of a delta's header.

    Raises:
        ConfigError: it is no mapping, a field is missing, unknown or impossible, or the version is newer.
    """
    if not isinstance(header, Mapping):
        raise ConfigError(f"delta must be a mapping, not {type(header).__name__}")
    version = header.get("format_version")
    _check(type(version) is int and version >= 1, "format_version", version)
    if isinstance(version, int) and version > DELTA_VERSION:
        raise ConfigError(
            f"this delta has format {version}, and this eigenprune knows up to {DELTA_VERSION}: "
            "update it (pip install -U eigenprune)"
        )
    odd = sorted(map(str, set(header) ^ set(HEADER)))
    if odd:
        raise ConfigError(f"unknown or missing fields of a delta: {', '.join(odd)[:200]}")
    for name, shape in _TEXTS.items():
        _check(isinstance(header[name], str) and shape.fullmatch(header[name]), name, header[name])
    keep = header["keep"]
    _check(isinstance(keep, int | float) and not isinstance(keep, bool) and 0 <= keep <= 1, "keep", keep)


def _check(good: object, name: str, value: object) -> None:
    if not good:
        raise ConfigError(f"{name} of a delta cannot be {value!r:.120}")
