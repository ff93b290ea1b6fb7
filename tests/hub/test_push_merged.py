# SPDX-License-Identifier: Apache-2.0
"""A pruned model with a merged LoRA goes to the Hub, and comes back by plain `from_pretrained`."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from eigenprune import save_model
from eigenprune.layers import low_rank_layers
from tests.helpers.adapters import difference, trained_
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import logits, tiny_tokenizer
from tests.hub.client import Client
from tests.hub.server import TOKEN, Hub
from tests.hub.shared import pruned_folder

peft = pytest.importorskip("peft")
REPO = "me/merged"


def test_merged_model_is_pushed_and_pulled_bit_for_bit(tmp_path: Path) -> None:
    pruned, _ = pruned_folder(tmp_path, "pruned")
    base = AutoModelForCausalLM.from_pretrained(pruned)
    ranks = {name: layer.rank for name, layer in low_rank_layers(base).items()}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = trained_(peft.get_peft_model(base, config))
    output = logits(model)
    folder = save_model(model.merge_and_unload(), tmp_path / "merged", tokenizer=tiny_tokenizer())
    with Hub() as hub:
        with Client(hub.url, tmp_path, HF_TOKEN=TOKEN) as client:
            pushed = client("push", folder=str(folder), repo=REPO, base_model="me/base")
            assert "value" in pushed, pushed.get("traceback")
            pulled = client("pull", repo=REPO)
            assert "value" in pulled, pulled.get("traceback")
        assert not [name for name in hub.files(REPO) if "adapter" in name]
        hub.shutdown()
    local = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert pulled["value"]["state"] == state_hashes(local)
    assert difference(logits(local), output) <= 1e-5
    grown = {name: layer.rank - ranks[name] for name, layer in low_rank_layers(local).items()}
    assert {name.rpartition(".")[2] for name, rank in grown.items() if rank == 4} == {"q_proj", "v_proj"}
