"""Every fault can be planted, every row of the page has one, and the page says which."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.planted.__main__ import ROOT, first_error, planted, selected
from tests.planted.entry import Planted, StaleError
from tests.planted.page import rows
from tests.planted.table import NONE, PLANTED

ROWS = rows(ROOT)


@cache
def functions(file: str) -> set[str]:
    """Names of the test functions of a file."""
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", dict.fromkeys(entry.row for entry in PLANTED))
def test_each_fault_can_be_planted_and_the_page_names_it_with_its_test(row: str) -> None:
    for entry in (entry for entry in PLANTED if entry.row == row):
        text = entry.source(ROOT).read_text()
        changed = entry.planted_in(text)
        assert changed != text
        if entry.file.endswith(".py"):
            ast.parse(changed)
        file, _, name = entry.function.partition("::")
        assert name in functions(file), entry.test
        assert entry.function in ROWS[row].tests, f"{row} does not name {entry.function}"
        assert entry.fault in ROWS[row].planted.split("; "), f"{row} does not say {entry.fault!r}"


def test_each_row_has_a_fault_or_says_why_not_and_names_no_other() -> None:
    with_fault = {entry.row for entry in PLANTED}
    assert not with_fault & NONE.keys()
    assert list(ROWS) == [row for row in ROWS if row in with_fault | NONE.keys()]
    assert with_fault | NONE.keys() == ROWS.keys()
    assert {row: ROWS[row].planted for row in NONE} == NONE
    for row in with_fault:
        faults = [entry.fault for entry in PLANTED if entry.row == row]
        assert ROWS[row].planted.split("; ") == faults, row


def test_a_fault_whose_place_has_changed_is_an_error(tmp_path: Path) -> None:
    entry = Planted(row="case 1", fault="f", file="a.py", old="x = 1\n", new="x = 2\n", test="t")
    for text, found in (("", "got 0 times"), ("x = 1\nx = 1\n", "got 2 times")):
        with pytest.raises(StaleError, match=found):
            entry.planted_in(text)
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.cpython-311.pyc").touch()
    with planted(entry, tmp_path):
        assert (tmp_path / "a.py").read_text() == "x = 2\n"
        assert list((tmp_path / "__pycache__").iterdir()) == []
    assert (tmp_path / "a.py").read_text() == "x = 1\n"


def test_rows_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = selected(["feature-4", "case 15"])
    assert {entry.row for entry in chosen} == {"feature 4", "case 15"}
    with pytest.raises(SystemExit) as caught:
        selected(["case 99"])
    assert caught.value.code == 2
    assert "--only must be of case " in capsys.readouterr().err


def test_the_error_of_a_test_is_its_first() -> None:
    output = "F\n____ test_a ____\n    assert f() == 1\nE   assert 2 == 1\nE    +  where 2\n"
    assert first_error(output) == "assert 2 == 1"
