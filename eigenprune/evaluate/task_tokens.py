# SPDX-License-Identifier: Apache-2.0
"""Text rows to token ids: no special token inside, a first one where it belongs, the right cut before an answer."""

from typing import Any

from eigenprune.calibrate import token_ids
from eigenprune.errors import CalibrationError
from eigenprune.evaluate.task_rows import TaskRow
from eigenprune.evaluate.token_example import TokenExample


def token_example(tokenizer: Any, row: TaskRow, *, bos: bool | None = None) -> TokenExample:
    """`row` in token ids.

    An answer's tokens are those of prompt and answer together beyond those of the prompt. Where the prompt's last token
    would merge with the answer, the answer is tokenised by itself, if the two then still read as the whole text does.

    Args:
        tokenizer: of transformers. Its own special tokens are never added (a chat or classifier template has no place
            in the middle of a text), the first one excepted.
        row: spaces at the end of its prompt move to the answers, where most vocabularies want them.
        bos: begin with the token of that name; None does as the tokenizer does by itself.

    Raises:
        CalibrationError: no tokens can be found that read as prompt and answer, one of them is empty, or `bos` is asked
            of a tokenizer that has none.
    """
    text = row.prompt.rstrip(" ")
    spaces = row.prompt[len(text) :]
    first = _first_token(tokenizer, bos)
    prompt = token_ids(tokenizer, text)
    found = {answer: _answer_ids(tokenizer, text, prompt, spaces + answer) for answer in (row.answer, *row.choices)}
    return TokenExample((*first, *prompt), found[row.answer], tuple(found[choice] for choice in row.choices))


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins a text with its `bos_token` by itself."""
    bos = getattr(tokenizer, "bos_token_id", None)
    with_special: list[int] = tokenizer("a")["input_ids"]
    return bos is not None and with_special[:1] == [bos] and token_ids(tokenizer, "a")[:1] != [bos]


def _first_token(tokenizer: Any, bos: bool | None) -> tuple[int, ...]:
    if bos is None:
        bos = adds_bos(tokenizer)
    if not bos:
        return ()
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None:
        raise CalibrationError("this tokenizer has no bos_token to begin with: leave bos unset")
    return (int(token),)


def _answer_ids(tokenizer: Any, text: str, prompt: list[int], answer: str) -> tuple[int, ...]:
    whole = token_ids(tokenizer, text + answer)
    if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
        return tuple(whole[len(prompt) :])
    alone = token_ids(tokenizer, answer)
    if not alone or tokenizer.decode(prompt + alone) != tokenizer.decode(whole):
        raise CalibrationError(
            f"no cut between the tokens of {text[-40:]!r} and {answer[:40]!r}: this tokenizer joins them; "
            "end the prompt at a word, or put a line break between"
        )
    return tuple(alone)
