# SPDX-License-Identifier: Apache-2.0
"""Where calibration and evaluation texts come from: files, rows of a dataset, or the text that ships with Python."""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from eigenprune.errors import CalibrationError

BUILTIN = "python-docs"


def read_texts(paths: Iterable[str | Path], tokenizer: Any = None) -> list[str]:
    """The documents of text files, in order.

    A `.jsonl` file has one JSON object a line, see `row_text`; any other file is one document. Either may be gzipped
    (`.gz`). Text is UTF-8.

    Args:
        paths: of the files.
        tokenizer: whose chat template renders the lines that are conversations; None where there are none.

    Raises:
        CalibrationError: a file is missing, unreadable, not text, or holds no document.
    """
    texts = [text for path in paths for text in _read_file(Path(path), tokenizer)]
    if not any(text.strip() for text in texts):
        raise CalibrationError("the text files hold no text; give at least one file with a few thousand words")
    return texts


def _read_file(path: Path, tokenizer: Any) -> list[str]:
    if ".jsonl" not in path.suffixes:
        return [file_text(path)]
    return [row_text(row, tokenizer, f"{path}, line {number}") for number, row in json_lines(path)]


def file_text(path: Path) -> str:
    """The UTF-8 text of a file, unpacked where it ends in `.gz`.

    Raises:
        CalibrationError: it is missing, a folder, unreadable, or not text.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8")
    except FileNotFoundError as error:
        raise CalibrationError(f"no text file at {path}") from error
    except IsADirectoryError as error:
        raise CalibrationError(f"{path} is a folder; name the text files in it") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start}); is it a text file?") from error
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line of a file of JSON lines that is not blank; `.gz` is unpacked.

    Raises:
        CalibrationError: the file cannot be read, or a line, which is named, is not JSON.
    """
    for number, line in enumerate(io.StringIO(file_text(path)), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{path}, line {number}: not JSON ({error})") from error


def row_texts(rows: Iterable[Any], tokenizer: Any = None, *, characters: int | None = None) -> list[str]:
    """The documents of `rows`: strings, or what `row_text` reads, such as a `datasets.Dataset`, streamed or not.

    Args:
        rows: read in order, from the first on.
        tokenizer: whose chat template renders conversations.
        characters: stop once the documents have as many, since a streamed dataset may have no end; None reads all.

    Raises:
        CalibrationError: a row is no document; its number is named.
    """
    texts: list[str] = []
    total = 0
    for number, row in enumerate(rows):
        texts.append(row if isinstance(row, str) else row_text(row, tokenizer, f"row {number} of the texts"))
        total += len(texts[-1])
        if characters is not None and total >= characters:
            break
    return texts


def row_text(row: Any, tokenizer: Any, where: str) -> str:
    """The document of one row: its string `text`, or its conversation `messages`, rendered by the chat template.

    Args:
        row: a mapping with `text`, or with `messages`: [{"role": ..., "content": ...}, ...].
        tokenizer: of transformers; only `messages` needs it.
        where: the row, in words, for errors.

    Raises:
        CalibrationError: neither field, a tokenizer without template, or a conversation that the template refuses.
    """
    if not isinstance(row, Mapping) or not (isinstance(row.get("text"), str) or isinstance(row.get("messages"), list)):
        raise CalibrationError(f"{where}: no string field 'text', and no list 'messages'")
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{where}: 'messages' are rendered by the tokenizer's chat template, and "
            f"{'no tokenizer is given' if tokenizer is None else 'this tokenizer has none'}: give rows with 'text'"
        )
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CalibrationError(f"{where}: the chat template refuses these messages ({error})") from error


def builtin_texts() -> list[str]:
    """The language reference that ships with Python (`pydoc_data.topics`), by topic.

    About 700 kB of English technical prose, which needs no download: the calibration text of models that cannot write
    their own. Text of the model's own domain is better: the table of `benchmarks/quality.py` says by how much.
    """
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
