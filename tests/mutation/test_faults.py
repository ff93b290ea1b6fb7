# SPDX-License-Identifier: Apache-2.0
"""The list of faults follows the source; `make mutants` runs them."""

import ast

import pytest

from tests.mutation.faults import FAULTS, MOST_SURVIVORS, REPOSITORY, Fault


def test_there_are_enough_faults_and_each_is_one_of_its_kind() -> None:
    assert len(FAULTS) >= 25
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert MOST_SURVIVORS <= 1


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_has_its_place_in_the_source_and_its_tests(fault: Fault) -> None:
    source = (REPOSITORY / "eigenprune" / fault.file).read_text(encoding="utf-8")
    changed = fault.applied(source)
    assert changed != source
    if fault.file.endswith(".py"):
        ast.parse(changed)  # a fault that no interpreter takes would be caught by anything
    for name in fault.tests[: fault.tests.index("-k") if "-k" in fault.tests else None]:
        assert (REPOSITORY / name).is_file()


def test_fault_whose_place_is_gone_is_an_error() -> None:
    fault = Fault("none", "prune.py", "text that is not there", "", ())
    with pytest.raises(LookupError, match="0 places"):
        fault.applied("x")
    with pytest.raises(LookupError, match="2 places"):
        Fault("two", "prune.py", "x", "", ()).applied("x x")
