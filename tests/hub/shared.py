# SPDX-License-Identifier: Apache-2.0
"""A tiny model pruned from a folder with a card, as the tests of card and push need it."""

from pathlib import Path

from transformers import AutoModelForCausalLM

from eigenprune import EigenpruneConfig, PruneReport, prune_, save_model
from tests.helpers.tiny_models import saved_dense, tiny_tokenizer

BASE = "tiny-base"
TEXT = "the quick brown fox jumps over the lazy dog, and nobody knows why. " * 40


def base_with_card(scratch: Path) -> Path:
    """A dense model with tokenizer and card, and `cal.txt` beside its folder."""
    folder = saved_dense("llama", scratch / BASE)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n# base\n")
    (scratch / "cal.txt").write_text(TEXT)
    return folder


def pruned_folder(scratch: Path, name: str, keep: float = 0.7, **save: str) -> tuple[Path, PruneReport]:
    """A model pruned from the base in `scratch`, saved there under `name`."""
    base = scratch / BASE if (scratch / BASE).is_dir() else base_with_card(scratch)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = EigenpruneConfig(keep=keep, texts=[scratch / "cal.txt"], windows=8, window=32)
    report = prune_(model, config, progress=False)
    return save_model(model, scratch / name, tokenizer=tiny_tokenizer(), report=report, **save), report
