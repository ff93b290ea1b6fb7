# SPDX-License-Identifier: Apache-2.0
"""The rows of tasks as text: what is asked, the right answer, and the alternatives; the templates of every known form.

The prompts are those of the released code of Eigenpruning (arXiv 2404.03147), letter by letter; no code of it is used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from eigenprune.errors import CalibrationError

CB_ANSWERS = (" entails", " contradicts", " is neutral")  # by label
RTE_ANSWERS = (" entails", " contradicts")
COPA_ANSWERS = (" 1", " 2")
COPA_QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}
SUMS_BELOW = 100
PRODUCTS_BELOW = 20


@dataclass(frozen=True)
class TaskRow:
    """One question.

    Attributes:
        prompt: text before the answer.
        answer: the right continuation, with the space that belongs between.
        choices: every alternative, the right one among them; empty where the answer is free text.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.answer.strip() or not all(choice.strip() for choice in self.choices):
            raise CalibrationError("an answer or a choice is empty")
        if self.choices and self.answer not in self.choices:
            raise CalibrationError(f"the answer {self.answer!r:.80} is none of the {len(self.choices)} choices")
        if len(set(self.choices)) != len(self.choices):
            raise CalibrationError("two choices are the same")


def sum_rows() -> list[TaskRow]:
    """All 10,000 ordered pairs of 0..99: `{i} + {j} =`."""
    numbers = range(SUMS_BELOW)
    return [TaskRow(f"{i} + {j} =", f" {i + j}") for i in numbers for j in numbers]


def product_rows() -> list[TaskRow]:
    """All 400 ordered pairs of 0..19: `{i} x {j} =`, with the letter x."""
    numbers = range(PRODUCTS_BELOW)
    return [TaskRow(f"{i} x {j} =", f" {i * j}") for i in numbers for j in numbers]


def cb_row(row: Mapping[str, Any]) -> TaskRow:
    """CommitmentBank in the form of SuperGLUE: premise, hypothesis, label 0 entailment, 1 contradiction, 2 neutral."""
    prompt = (
        f"Premise: {_text(row, 'premise')}\n\nHypothesis: {_text(row, 'hypothesis')}\n\n"
        "Does the premise entail, contradict or is neutral to the hypothesis?\n"
        "Answer (entails, contradicts, is neutral): The premise"
    )
    return TaskRow(prompt, CB_ANSWERS[_label(row, len(CB_ANSWERS))], CB_ANSWERS)


def rte_row(row: Mapping[str, Any]) -> TaskRow:
    """RTE in the form of SuperGLUE: premise, hypothesis, label 0 entailment, 1 not."""
    prompt = (
        f"Premise: {_text(row, 'premise')}\n\nHypothesis: {_text(row, 'hypothesis')}\n\n"
        "Does the premise entail or contradict to the hypothesis?\n"
        "Answer (entails or contradicts): The premise"
    )
    return TaskRow(prompt, RTE_ANSWERS[_label(row, len(RTE_ANSWERS))], RTE_ANSWERS)


def copa_row(row: Mapping[str, Any]) -> TaskRow:
    """COPA in the form of SuperGLUE: premise, question (cause or effect), choice1, choice2, label 0 or 1."""
    kind = _text(row, "question")
    if kind not in COPA_QUESTIONS:
        raise CalibrationError(f"'question' is {kind!r:.80}, and neither cause nor effect")
    prompt = (
        f"Premise: {_text(row, 'premise')}\n{COPA_QUESTIONS[kind]}\n\n"
        f"Alternative 1: {_text(row, 'choice1')}\nAlternative 2: {_text(row, 'choice2')}\n\n"
        "What is the correct alternative?\nThe correct alternative is alternative"
    )
    return TaskRow(prompt, COPA_ANSWERS[_label(row, len(COPA_ANSWERS))], COPA_ANSWERS)


def arithmetic_row(row: Mapping[str, Any]) -> TaskRow:
    """basic_arithmetic of Ai2: question (`Calculate 58 * 160 =`), choices {text, label}, answerKey."""
    choices = row.get("choices")
    texts = choices.get("text") if isinstance(choices, Mapping) else None
    labels = choices.get("label") if isinstance(choices, Mapping) else None
    if not _strings(texts) or not _strings(labels) or len(texts) != len(labels):
        raise CalibrationError("'choices' does not hold the lists 'text' and 'label' of one length")
    key = _text(row, "answerKey")
    if key not in labels:
        raise CalibrationError(f"'answerKey' {key!r:.80} is none of the labels")
    return TaskRow(_text(row, "question"), f" {texts[labels.index(key)]}", tuple(f" {text}" for text in texts))


def plain_row(row: Mapping[str, Any]) -> TaskRow:
    """Anyone's row: `prompt`, `answer` (text, or with `choices` its number from 0), and where there are some `choices`.

    The parts are joined as they are: the space between belongs to the end of the prompt, or to the answer and choices.
    """
    choices = row.get("choices")
    if choices is not None and not _strings(choices):
        raise CalibrationError("'choices' is no list of strings")
    answer = row.get("answer")
    if choices and isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise CalibrationError(f"'answer' is {answer}, and there are {len(choices)} choices, counted from 0")
        answer = choices[answer]
    if not isinstance(answer, str):
        raise CalibrationError("no string field 'answer'" + (", and no number of a choice" if choices else ""))
    return TaskRow(_text(row, "prompt"), answer, tuple(choices or ()))


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise CalibrationError(f"no string field {field!r}")
    return value


def _label(row: Mapping[str, Any], count: int) -> int:
    value = row.get("label")
    if isinstance(value, bool) or not isinstance(value, int):
        raise CalibrationError("no integer field 'label'")
    if not 0 <= value < count:
        hidden = "; the test sets of SuperGLUE have no labels, take the validation set" if value < 0 else ""
        raise CalibrationError(f"'label' is {value}, and there are {count} answers{hidden}")
    return value


def _strings(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
