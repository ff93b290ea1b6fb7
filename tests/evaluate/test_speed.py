# SPDX-License-Identifier: Apache-2.0
"""Speed: the right work is timed, in turns, and summed up correctly. No test depends on how fast it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from eigenprune.errors import CalibrationError, ConfigError
from eigenprune.evaluate import Speed, compare_decode, decode_speed, prefill_speed, speed, speed_ratio

PROMPT = torch.tensor([5, 6, 7, 8])


def tiny(layers: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).train()


def record_inputs(model: nn.Module, calls: list[Any], name: str = "") -> None:
    """Append (name, input ids) of every call of the model."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((name, kwargs["input_ids"].tolist()))

    model.register_forward_pre_hook(hook, with_kwargs=True)


def test_decoding_is_greedy_with_a_cache_and_equals_generate() -> None:
    model = tiny(2)
    expected = model.eval().generate(PROMPT[None], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    calls: list[Any] = []
    record_inputs(model, calls)
    decode_speed(model, PROMPT, new_tokens=6, repeats=1)
    one_run = [ids for _, ids in calls[: len(calls) // 2]]  # the other half is the timed run after the warm-up
    assert one_run[0] == [PROMPT.tolist()]
    assert [ids[0][0] for ids in one_run[1:]] == expected[0, len(PROMPT) :].tolist()
    assert all(len(ids[0]) == 1 for ids in one_run[1:])
    assert len(calls) == 2 * (1 + 6)


def test_decode_facts_and_json() -> None:
    model = tiny().bfloat16()
    result = decode_speed(model, torch.stack([PROMPT, PROMPT]), new_tokens=3, repeats=4)
    assert (result.what, result.batch, result.tokens, result.repeats) == ("decode", 2, 3, 4)
    assert (result.dtype, result.device, result.threads) == ("bfloat16", "cpu", torch.get_num_threads())
    assert 0 < result.p20 <= result.tokens_per_second <= result.p80
    assert len(result.samples) == 4
    assert json.loads(json.dumps(result.to_dict()))["samples"] == list(result.samples)
    assert model.training


def test_rates_come_from_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 1.0, 2.0, 4.0, 5.0, 10.0])  # the warm-up is not counted
    monkeypatch.setattr(speed, "_time_decode", lambda *_: next(seconds))
    result = decode_speed(tiny(), torch.stack([PROMPT, PROMPT]), new_tokens=10, repeats=5)
    assert result.samples == (20.0, 10.0, 5.0, 4.0, 2.0)
    assert (result.tokens_per_second, result.p20, result.p80) == pytest.approx((5.0, 3.6, 12.0))


def test_prefill_reads_the_whole_prompt_at_once() -> None:
    model = tiny()
    calls: list[Any] = []
    record_inputs(model, calls)
    result = prefill_speed(model, tokens=20, repeats=2)
    assert (result.what, result.batch, result.tokens, result.repeats) == ("prefill", 1, 20, 2)
    assert [len(ids[0]) for _, ids in calls] == [20, 20, 20]
    assert calls[0] == calls[1]
    assert model.training


def test_compared_models_take_turns_in_alternating_order() -> None:
    models = {"a": tiny(), "b": tiny()}
    calls: list[Any] = []
    for name, model in models.items():
        record_inputs(model, calls, name)
    results = compare_decode(models, PROMPT, new_tokens=1, repeats=3)
    runs = [name for name, ids in calls if len(ids[0]) == len(PROMPT)]
    assert runs == ["a", "b", "a", "b", "b", "a", "a", "b"]  # the first two are the warm-up
    assert list(results) == ["a", "b"]


def example(*samples: float, tokens: int = 8) -> Speed:
    return Speed("decode", 0.0, 0.0, 0.0, 1, tokens, 1, "float32", "cpu", len(samples), samples)


def test_ratio_is_taken_per_turn() -> None:
    # The machine slowed down tenfold in the last turns; the ratio of the two models did not change.
    new, base = example(200.0, 220.0, 20.0, 22.0), example(100.0, 110.0, 10.0, 11.0)
    assert speed_ratio(new, base) == pytest.approx((2.0, 2.0, 2.0))
    with pytest.raises(ConfigError, match="do not compare"):
        speed_ratio(new, example(1.0, 1.0, 1.0, 1.0, tokens=9))


def test_unusable_settings_are_refused() -> None:
    model = tiny()
    with pytest.raises(ConfigError, match="new_tokens is 0"):
        decode_speed(model, PROMPT, new_tokens=0)
    with pytest.raises(ConfigError, match="repeats is 0"):
        prefill_speed(model, repeats=0)
    with pytest.raises(ConfigError, match="models is 0"):
        compare_decode({}, PROMPT)
    with pytest.raises(ConfigError, match="get_input_embeddings"):
        prefill_speed(nn.Linear(2, 2))
    for prompt, message in ((torch.ones(3), "integers"), (torch.ones(0, dtype=torch.int64), "empty")):
        with pytest.raises(CalibrationError, match=message):
            decode_speed(model, prompt)
