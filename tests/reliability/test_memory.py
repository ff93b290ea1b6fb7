# SPDX-License-Identifier: Apache-2.0
"""Peak memory of prune-on-load: at most the dense model, 4 times its largest matrix, and the statistics (row G40)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eigenprune.layers import select_layers
from tests.helpers.tiny_models import VOCABULARY, tiny_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent.parent
KEEP = 0.8
# The allocator keeps freed pieces, and the size of a process is counted in pages: 1/50 of the model, some 2 MB.
SLACK = 0.02

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status"),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A random Llama of about 100 MB, its vocabulary large beside its layers as in real ones; the bytes of it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64 * VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("large") / "model"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weights = {name: module.weight for name, module in select_layers(model).chosen.items()}
    one_input = ("k_proj", "v_proj", "up_proj")  # read what q_proj and gate_proj read: their Grams are shared
    sizes = {
        "dense": sum(parameter.numel() * 4 for parameter in model.parameters()),
        "largest": max(parameter.numel() * 4 for parameter in model.parameters()),
        "statistics": sum(
            4 * weight.shape[0] ** 2 + (0 if name.endswith(one_input) else 4 * weight.shape[1] ** 2)
            for name, weight in weights.items()
        ),
    }
    return folder, sizes


@pytest.fixture(scope="module", params=["svd", "kfac"])
def measured(request: pytest.FixtureRequest, dense: tuple[Path, dict[str, int]]) -> dict[str, int]:
    """Sizes and peaks in bytes of one pruning in a process of its own."""
    folder, sizes = dense
    command = [sys.executable, "-m", "tests.helpers.peak_memory", str(folder), request.param, str(KEEP)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    statistics = sizes["statistics"] if request.param == "kfac" else 0
    found = json.loads(done.stdout.splitlines()[-1]) | {"dense": sizes["dense"], "statistics": statistics}
    found["bound"] = sizes["dense"] + 4 * sizes["largest"] + statistics
    print(request.param, {key: f"{value / 1e6:.1f} MB" for key, value in found.items()})
    assert found["pruned"] < 0.9 * sizes["dense"]  # it was pruned
    return dict(found)


def test_prune_on_load_holds_no_second_model_in_anonymous_memory(measured: dict[str, int]) -> None:
    """What the machine must have: the pages of the mapped dense checkpoint are cache, dropped at need."""
    assert measured["anonymous"] <= measured["bound"] + SLACK * measured["dense"]


def test_prune_on_load_holds_no_second_model_in_resident_memory(measured: dict[str, int]) -> None:
    assert measured["resident"] <= measured["bound"] + SLACK * measured["dense"]
