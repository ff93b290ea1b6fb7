# SPDX-License-Identifier: Apache-2.0
"""Where a prompt ends and its answer begins in tokens, with tokenizers that merge, prefix, and add special tokens."""

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from eigenprune.errors import CalibrationError
from eigenprune.evaluate.task_rows import TaskRow
from eigenprune.evaluate.task_tokens import adds_bos, token_example
from tests.helpers.tiny_models import tiny_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent.parent
LETTERS = "0123456789abcdefghijklmnopqrstuvwxyzĠ=:Ċ"


def byte_level(merges: list[tuple[str, str]], *, bos: bool = False, split: bool = True) -> PreTrainedTokenizerFast:
    """BPE as of GPT-2 (a space is part of the word after it); without `split` also words merge with each other."""
    words = ["<s>", "<unk>", *LETTERS, *("".join(merge) for merge in merges)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def words(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(ids))


def test_answer_is_what_follows_the_prompt_and_may_have_many_tokens() -> None:
    tokenizer = byte_level([("1", "2"), ("Ġ", "12")])
    found = token_example(tokenizer, TaskRow("3 x 4 =", " 123"))
    assert words(tokenizer, found.prompt) == ["3", "Ġ", "x", "Ġ", "4", "Ġ", "="]
    assert words(tokenizer, found.answer) == ["Ġ12", "3"]


def test_first_token_is_added_where_the_tokenizer_adds_one_and_nowhere_else() -> None:
    """The trap of the released code: element 0 of an answer tokenised with special tokens is the special token."""
    plain, special = byte_level([]), byte_level([], bos=True)
    row = TaskRow("a =", " b", (" b", " c"))
    assert not adds_bos(plain)
    assert adds_bos(special)
    without, with_bos = token_example(plain, row), token_example(special, row)
    assert with_bos.prompt == (0, *without.prompt)
    assert (with_bos.answer, with_bos.choices) == (without.answer, without.choices)
    assert words(special, with_bos.answer) == ["Ġ", "b"]
    assert token_example(plain, row, bos=True) == with_bos
    assert token_example(special, row, bos=False) == without


def test_space_at_the_end_of_a_prompt_belongs_to_the_answers() -> None:
    tokenizer = byte_level([("Ġ", "y"), ("Ġ", "n")])
    found = token_example(tokenizer, TaskRow("q: ", "y", ("y", "n")))
    assert words(tokenizer, found.prompt) == ["q", ":"]
    assert [words(tokenizer, choice) for choice in found.choices] == [["Ġy"], ["Ġn"]]


def test_answer_that_would_merge_into_the_prompt_is_tokenised_by_itself() -> None:
    tokenizer = byte_level([("a", "b")])
    found = token_example(tokenizer, TaskRow("a", "bc", ("bc", "cb")))
    assert words(tokenizer, found.prompt) == ["a"]
    assert words(tokenizer, found.answer) == ["b", "c"]
    assert tokenizer.decode([*found.prompt, *found.answer]) == "abc"


def test_cut_that_changes_the_text_is_refused() -> None:
    """One token a word, and no token for half of one: alone, the answer reads as unknown."""
    vocabulary = {"<unk>": 0, "one": 1, "two": 2, "onetwo": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert token_example(wrapped, TaskRow("one", " two")).answer == (2,)
    with pytest.raises(CalibrationError, match="no cut"):
        token_example(wrapped, TaskRow("one", "two"))


def test_bos_is_refused_where_there_is_none() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(CalibrationError, match="no bos_token"):
        token_example(tokenizer, TaskRow("a", "b"), bos=True)


def test_smollm2_gives_the_digits_of_an_answer_after_a_space() -> None:
    folder = Path(os.environ.get("EIGENPRUNE_MODELS") or REPOSITORY / ".models") / "smollm2-135m-instruct"
    if not folder.is_dir():
        pytest.skip("no SmolLM2: run benchmarks/get_smollm2.py, or set EIGENPRUNE_MODELS")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    found = token_example(tokenizer, TaskRow("12 x 12 =", " 144"))
    assert words(tokenizer, found.answer) == ["Ġ", "1", "4", "4"]
