# SPDX-License-Identifier: Apache-2.0
"""Where calibration and evaluation texts come from: files, or the text that ships with Python."""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from eigenprune.errors import CalibrationError

BUILTIN = "python-docs"


def read_texts(paths: Iterable[str | Path]) -> list[str]:
    """The documents of text files, in order.

    A `.jsonl` file has one JSON object a line with the document under `text`; any other file is one document. Either
    may be gzipped (`.gz`). Text is UTF-8.

    Raises:
        CalibrationError: a file is missing, unreadable, not text, or holds no document.
    """
    texts = [text for path in paths for text in _read_file(Path(path))]
    if not any(text.strip() for text in texts):
        raise CalibrationError("the text files hold no text; give at least one file with a few thousand words")
    return texts


def _read_file(path: Path) -> list[str]:
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        text = raw.decode("utf-8")
    except FileNotFoundError as error:
        raise CalibrationError(f"no text file at {path}") from error
    except IsADirectoryError as error:
        raise CalibrationError(f"{path} is a folder; name the text files in it") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start}); is it a text file?") from error
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error
    if ".jsonl" in path.suffixes:
        return list(_jsonl_documents(path, text))
    return [text]


def _jsonl_documents(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise CalibrationError(f"{path}, line {number}: no string field 'text'")
        yield row["text"]


def builtin_texts() -> list[str]:
    """The default calibration text: the language reference that ships with Python (`pydoc_data.topics`), by topic.

    About 700 kB of English technical prose, which needs no download. Text of the model's own domain is better: the
    table of `benchmarks/quality.py` says by how much.
    """
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
