# SPDX-License-Identifier: Apache-2.0
"""`TokenExample`: one prompt with its answer in token ids, the form in which tasks are scored and measured."""

from dataclasses import dataclass

from eigenprune.errors import CalibrationError


@dataclass(frozen=True)
class TokenExample:
    """A prompt and its right answer; where the task offers alternatives, all of them.

    Attributes:
        prompt: token ids, at least one.
        answer: token ids of the right answer, at least one.
        choices: token ids of every alternative, the right one among them; empty where the answer is free text.

    Raises:
        CalibrationError: a part is empty, or the answer is none of the choices.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt or not self.answer or not all(self.choices):
            raise CalibrationError("an example needs at least one token in its prompt, its answer and every choice")
        if self.choices and self.answer not in self.choices:
            raise CalibrationError(f"the answer {self.answer} is none of the {len(self.choices)} choices")
