# SPDX-License-Identifier: Apache-2.0
"""Where a pruned model comes from: its base, the base's licence, and the versions that made it. No local path."""

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache
from torch import nn

PACKAGES = ("eigenprune", "torch", "transformers", "safetensors")
# What a card carries over from its base's card, and the shape each value must have there.
CARRIED = {
    "license": re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}"),
    "license_name": re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,95}"),
    "license_link": re.compile(r"https://[A-Za-z0-9._~/%#?=&+-]{1,200}|LICENSE(\.md|\.txt)?"),
    "language": re.compile(r"[a-z]{2,3}|multilingual|code"),
    "pipeline_tag": re.compile(r"[a-z0-9-]{2,64}"),
}


def base_facts(model: nn.Module) -> dict[str, Any]:
    """The base's id, revision, and what its card says about licence and language; keys without a value are left out.

    A base in a local folder is named by the last part of its path only: the rest names users and machines.
    """
    config = getattr(model, "config", None)
    name = str(getattr(config, "name_or_path", "") or "")
    revision = getattr(config, "_commit_hash", None)
    facts = {
        "base_model": Path(name).name if Path(name).exists() else name,
        "base_revision": revision,
        "base_card": _carried(_card_file(name, revision)),
    }
    return {key: value for key, value in facts.items() if value or key == "base_model"}


def base_card(folder: Path) -> dict[str, Any]:
    """What the card of the model in `folder` says about licence and language; empty where it has none."""
    return _carried(folder / "README.md")


def versions() -> dict[str, str]:
    """Python and the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _card_file(name: str, revision: str | None) -> Path | None:
    """The card of a local folder, or of a hub model if it is in the cache; nothing is fetched."""
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name) / "README.md"
    try:
        cached = try_to_load_from_cache(name, "README.md", revision=revision)
    except ValueError:  # no possible id
        return None
    return Path(cached) if isinstance(cached, str) else None


def _carried(card: Path | None) -> dict[str, Any]:
    """The fields of a card that have the shape they should have; a card that cannot be read has none."""
    if card is None or not card.is_file():
        return {}
    try:
        data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 - a YAML error of any kind, in a file that is not ours
        return {}
    found: dict[str, Any] = {}
    for key, shape in CARRIED.items():
        values = data.get(key)
        kept = [v for v in (values if isinstance(values, list) else [values]) if isinstance(v, str)]
        kept = [value for value in kept if shape.fullmatch(value)]
        if kept:
            found[key] = kept if key == "language" else kept[0]
    return found
