# SPDX-License-Identifier: Apache-2.0
"""The table in SECURITY.md names tests that are there, and rows that those tests name too."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
ROWS = [
    line.split("|")[1:3]
    for line in (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and "---" not in line and "Promise |" not in line
]


def test_every_promise_names_tests_that_exist() -> None:
    assert len(ROWS) >= 20
    for promise, tests in ROWS:
        names = re.findall(r"`([^`]+)`", tests)
        assert names, promise
        assert [name for name in names if not (REPOSITORY / "tests" / name).exists()] == []


def test_every_row_of_the_list_of_attacks_is_named_by_a_test_beside_it() -> None:
    for promise, tests in ROWS:
        texts = []
        for name in re.findall(r"`([^`]+)`", tests):
            path = REPOSITORY / "tests" / name
            files = sorted(path.glob("*.py")) if path.is_dir() else [path]
            texts += [file.read_text(encoding="utf-8") for file in files]
        for row in re.findall(r"\bG\d+\b", promise):
            assert re.search(rf"(?i)(\b|_){row}(\b|_)", " ".join(texts)), f"{row}: no test names it"
