# SPDX-License-Identifier: Apache-2.0
"""What every test gets: no network, its own cache folder, few threads."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports huggingface_hub or transformers, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the processes that tests start

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    """Tiny matrices lose by threads, and several workers run beside each other."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True, scope="session")
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures that live longer than a test keep their statistics in a temporary folder too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EIGENPRUNE_CACHE", str(tmp_path_factory.mktemp("eigenprune-cache")))
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of one test are never found by another; the user's cache is never touched."""
    monkeypatch.setenv("EIGENPRUNE_CACHE", str(tmp_path / "eigenprune-cache"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with real models and data: $EIGENPRUNE_SHARED, or `../shared` beside the repository."""
    folder = Path(os.environ.get("EIGENPRUNE_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"there is no folder of real models and data at {folder} (set EIGENPRUNE_SHARED)")
    return folder
