# SPDX-License-Identifier: Apache-2.0
"""Load the model and tokenizer that a command names."""

from pathlib import Path
from typing import Any

import torch

from eigenprune.errors import CheckpointError, ConfigError
from eigenprune.hub.model_class import model_class

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_model(name: str, dtype: str = "auto", *, revision: str | None = None, quiet: bool = False) -> Any:
    """The model of a folder or hub id, in the class that its config names, without its remote code or pickles.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
        ConfigError: unknown dtype.
    """
    import transformers
    from transformers.utils import logging

    from eigenprune.hub.digests import check_digests
    from eigenprune.hub.limits import check_folder

    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; there are: {', '.join(DTYPES)}")
    if quiet:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if Path(name).is_dir():
        check_folder(Path(name))
        check_digests(Path(name))
    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision)
        loader = model_class(config) or transformers.AutoModelForCausalLM
        return loader.from_pretrained(name, revision=revision, dtype=DTYPES[dtype], use_safetensors=True)
    except OSError as error:
        raise CheckpointError(f"{name}: no model that can be loaded ({_first_line(error)})") from error
    except (RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError | ConfigError):
            raise
        raise CheckpointError(f"{name} cannot be loaded: {_first_line(error)}") from error


def load_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{name}: no tokenizer beside the model ({_first_line(error)})") from error


def checkpoint_folder(name: str, *, revision: str | None = None, tokenizer: bool = False) -> Path:
    """The folder of a model on disk, or of a hub id, whose config and safetensors files are fetched to the cache.

    Args:
        name: folder or id.
        revision: of a hub model.
        tokenizer: also fetch the small files beside them.

    Raises:
        CheckpointError: there is none, or it cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if Path(name).is_dir():
        return Path(name)
    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    if tokenizer:
        wanted += ["*.json", "*.txt", "*.model", "*.jinja", "SHA256SUMS", "README.md", "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise CheckpointError(f"{name}: no such folder, and no model on the hub ({_first_line(error)})") from error


def folder_bytes(folder: Path) -> int:
    """Bytes of the weight files in `folder`."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
