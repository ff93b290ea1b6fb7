# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and adapters on disk and on the Hub: saving, the model card, pushing."""

from eigenprune.hub.adapter import AppliedAdapter, apply_adapter_, save_adapter
from eigenprune.hub.adapter_file import Adapter, read_adapter, write_adapter
from eigenprune.hub.base_weights import BaseWeights, base_weights
from eigenprune.hub.card import CARD_NAME, build_card, write_card
from eigenprune.hub.delta_folder import apply_delta, save_delta
from eigenprune.hub.delta_loading import load_delta
from eigenprune.hub.delta_switch import delta_applied, switch_delta_
from eigenprune.hub.facts import hash_weights
from eigenprune.hub.lora_extraction import LoraExtraction, extract_lora
from eigenprune.hub.push import push_to_hub
from eigenprune.hub.rebuild import rebuild_command
from eigenprune.hub.save import REPORT_NAME, save_model

__all__ = [
    "CARD_NAME",
    "REPORT_NAME",
    "Adapter",
    "AppliedAdapter",
    "BaseWeights",
    "LoraExtraction",
    "apply_adapter_",
    "apply_delta",
    "base_weights",
    "build_card",
    "delta_applied",
    "extract_lora",
    "hash_weights",
    "load_delta",
    "push_to_hub",
    "read_adapter",
    "rebuild_command",
    "save_adapter",
    "save_delta",
    "save_model",
    "switch_delta_",
    "write_adapter",
    "write_card",
]
