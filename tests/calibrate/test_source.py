# SPDX-License-Identifier: Apache-2.0
"""Which calibration text is taken: the caller's, the config's files, the model's own, or the one beside Python."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eigenprune import EigenpruneConfig, prune_
from eigenprune.calibrate import (
    BUILTIN,
    CHOICES,
    SAMPLED,
    Sampling,
    calibration_windows,
    choose_indices,
    row_texts,
    sample_windows,
    window_features,
)
from eigenprune.errors import CalibrationError, ConfigError
from eigenprune.layers import select_layers
from tests.helpers.tiny_models import POSITIONS, tiny_model, tiny_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
TEXT = "some words of the caller, and some more. " * 40


def windows(model: nn.Module, **arguments: Any) -> Any:
    arguments = {"tokenizer": tiny_tokenizer(), "count": 3, "window": 16, "progress": False} | arguments
    return calibration_windows(model, **arguments)


def chat_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_causal_model_writes_its_own_text(kind: str) -> None:
    model = tiny_model(kind)
    found = windows(model, seed=5)
    sampling = Sampling(seed=5, windows=3, window=16, document=16)
    assert found.source == SAMPLED
    assert found.sampling == sampling.to_dict()
    assert torch.equal(found.windows, sample_windows(model, tiny_tokenizer(), sampling, progress=False))


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_encoders_and_seq2seq_models_take_the_text_beside_python(kind: str) -> None:
    found = windows(tiny_model(kind))
    assert (found.source, found.sampling) == (BUILTIN, {})
    assert found.windows.shape == (3, 16)


def test_a_named_source_is_taken_and_one_that_cannot_be_is_refused() -> None:
    assert windows(tiny_model("llama"), source=BUILTIN).source == BUILTIN
    with pytest.raises(CalibrationError, match="python-docs"):
        windows(tiny_model("bert"), source=SAMPLED)


@pytest.mark.parametrize("rule", ["random", "el2n", "grand", "prototypes", "coverage"])
def test_a_rule_chooses_from_four_times_as_many_windows(rule: str) -> None:
    model = tiny_model("llama")
    texts = ["".join(chr(40 + (7 * i + j * (i + 1)) % 60) for j in range(16)) for i in range(30)]
    layers = select_layers(model).chosen
    pool = windows(model, texts=texts, count=12).windows
    chosen = windows(model, texts=texts, choose=rule, layers=layers, seed=4).windows
    features = window_features(model, pool, CHOICES[rule].needs, layers=layers, progress=False)
    assert torch.equal(chosen, pool[torch.tensor(choose_indices(rule, features, 3, seed=4))])
    assert len(windows(model, texts=texts[:2], choose=rule, layers=layers).windows) == 2  # no more than there is


def test_any_model_can_be_calibrated_on_random_windows_and_none_without_a_head_on_hard_ones() -> None:
    assert windows(tiny_model("bert"), choose="random").windows.shape == (3, 16)
    with pytest.raises(CalibrationError, match="predicts no next token"):
        windows(tiny_model("bert"), choose="el2n")


def test_texts_go_before_files_and_files_before_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    model = tiny_model("llama")
    assert windows(model, texts=[TEXT], files=["nowhere"]).source == "texts given by the caller"
    assert windows(model, files=[tmp_path / "a.txt"]).source == "a.txt"


def test_a_model_without_a_tokenizer_says_so() -> None:
    with pytest.raises(CalibrationError, match="tokenizer"):
        windows(tiny_model("llama"), tokenizer=None)


def test_windows_are_no_longer_than_the_positions() -> None:
    found = windows(tiny_model("gpt2"), window=5 * POSITIONS)
    assert found.windows.shape == (3, POSITIONS)
    assert found.sampling["window"] == POSITIONS


def test_conversations_of_a_jsonl_file_are_rendered_by_the_chat_template(tmp_path: Path) -> None:
    rows = [{"messages": MESSAGES}, {"text": "plain words"}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = windows(tiny_model("llama"), files=[tmp_path / "chat.jsonl"], tokenizer=chat_tokenizer(), count=1)
    said = "".join(chr(i) for i in found.windows[0].tolist())
    assert said == "[user]hello[assistant]good day\n\nplain words"[:16]


def test_rows_of_a_dataset_are_read_like_strings_and_an_endless_one_ends() -> None:
    def endless() -> Iterator[dict[str, str]]:
        for number in itertools.count():
            yield {"text": f"document {number} " * 9}

    found = windows(tiny_model("llama"), texts=endless())
    assert found.windows.shape == (3, 16)
    rows = [{"text": "one"}, "two", {"messages": MESSAGES, "text": None}]
    assert row_texts(rows, chat_tokenizer()) == ["one", "two", "[user]hello[assistant]good day"]
    assert row_texts(rows, characters=6) == ["one", "two"]


@pytest.mark.parametrize(
    ("row", "tokenizer", "message"),
    [
        ({"content": "x"}, tiny_tokenizer(), "row 1 .*no string field 'text', and no list 'messages'"),
        (7, tiny_tokenizer(), "row 1 .*no string field"),
        ({"messages": "hello"}, chat_tokenizer(), "no list 'messages'"),
        ({"messages": MESSAGES}, None, "no tokenizer is given"),
        ({"messages": MESSAGES}, tiny_tokenizer(), "this tokenizer has none"),
    ],
    ids=["other field", "number", "messages that are a string", "no tokenizer", "no template"],
)
def test_a_row_that_is_no_document_is_refused_by_its_number(row: Any, tokenizer: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        row_texts(["fine", row], tokenizer)


def test_messages_that_the_template_refuses_are_a_calibration_error() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match=r"row 0 .*roles must alternate"):
        row_texts([{"messages": MESSAGES}], tokenizer)


@pytest.mark.parametrize(("kind", "source"), [("llama", SAMPLED), ("bert", BUILTIN)])
def test_the_report_and_the_saved_config_say_which_text_it_was(kind: str, source: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    config = EigenpruneConfig(keep=0.7, windows=3, window=16, seed=2)
    report = prune_(model, config, tokenizer=tiny_tokenizer(), cache_dir=tmp_path, progress=False)
    sampling = Sampling(seed=2, windows=3, window=16, document=16).to_dict() if source == SAMPLED else {}
    assert (report.calibration["source"], report.calibration["sampling"]) == (source, sampling)
    saved = model.config.quantization_config
    assert saved.calibration == source
    assert saved.provenance["calibration"]["sampling"] == sampling


def test_a_config_with_two_sources_or_an_unknown_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="two sources"):
        EigenpruneConfig(texts=["a.txt"], calibration=SAMPLED)
    with pytest.raises(ConfigError, match="calibration 'c4' is unknown"):
        EigenpruneConfig(calibration="c4")
