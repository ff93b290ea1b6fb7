# SPDX-License-Identifier: Apache-2.0
"""Text files of every kind that is read, and what is said of the ones that are not."""

import gzip
import json
from pathlib import Path

import pytest

from eigenprune.calibrate import builtin_texts, read_texts
from eigenprune.errors import CalibrationError

DOCUMENTS = [
    "A first document.\n\nIt has two paragraphs.",
    "Ein zweites, mit Umlauten: äöü 漢字 🙂.",
    "third\u2028line",
]


def jsonl(documents: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)).encode()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_text_file_is_one_document(tmp_path: Path, packed: bool) -> None:
    raw = DOCUMENTS[1].encode()
    path = tmp_path / ("a.txt.gz" if packed else "a.txt")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert read_texts([path]) == [DOCUMENTS[1]]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_jsonl_file_is_one_document_a_line(tmp_path: Path, packed: bool) -> None:
    raw = jsonl(DOCUMENTS).replace(b"\n", b"\n\n")  # blank lines are allowed
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert read_texts([str(path)]) == DOCUMENTS


def test_unescaped_unicode_line_separators_do_not_split_a_json_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": DOCUMENTS[2]}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_texts([path]) == [DOCUMENTS[2]]


def test_several_files_come_in_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("one")
    (tmp_path / "a.jsonl").write_bytes(jsonl(["two", "three"]))
    assert read_texts([tmp_path / "b.txt", tmp_path / "a.jsonl"]) == ["one", "two", "three"]


def test_one_empty_file_among_others_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("words")
    assert read_texts([tmp_path / "a.txt", tmp_path / "b.txt"]) == ["", "words"]


WHOLE = gzip.compress(DOCUMENTS[0].encode() * 50)
BAD = {
    "not-utf8.txt": (b"abc\xff\xfe", "not UTF-8"),
    "not-utf8-inside.txt.gz": (gzip.compress(b"abc\xff"), "not UTF-8"),
    "no-gzip.txt.gz": (b"these are plain words", "cannot be read"),
    "cut.txt.gz": (WHOLE[: len(WHOLE) // 2], "cannot be read"),
    "flipped.txt.gz": (WHOLE[:30] + bytes([WHOLE[30] ^ 0xFF]) + WHOLE[31:], "cannot be read|not UTF-8"),
    "wrong-checksum.txt.gz": (WHOLE[:-8] + b"\0" * 8, "cannot be read"),
    "no-json.jsonl": (b'{"text": "fine"}\n{"text": \n', "line 2: not JSON"),
    "no-field.jsonl": (b'{"text": "fine"}\n\n{"content": "x"}\n', "line 3: no string field 'text'"),
    "wrong-type.jsonl": (b'{"text": ["a", "b"]}\n', "line 1: no string field 'text'"),
    "no-object.jsonl": (b'"just a string"\n', "line 1: no string field 'text'"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", "line 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_a_calibration_error_that_names_it(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_texts([tmp_path / name])
    assert name in str(caught.value)


def test_a_missing_file_and_a_folder_are_calibration_errors(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no text file at .*nowhere"):
        read_texts([tmp_path / "nowhere.txt"])
    with pytest.raises(CalibrationError, match="is a folder"):
        read_texts([tmp_path])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\n\t\n"])
def test_files_without_a_word_are_a_calibration_error(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match="hold no text"):
        read_texts([tmp_path / name])


def test_no_file_at_all_is_a_calibration_error() -> None:
    with pytest.raises(CalibrationError, match="hold no text"):
        read_texts([])


def test_the_builtin_text_is_prose_enough_for_the_default_windows() -> None:
    texts = builtin_texts()
    assert texts == builtin_texts()
    assert sum(map(len, texts)) > 64 * 1024 * 4  # 64 windows of 1024 tokens, some four characters each
