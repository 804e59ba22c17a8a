"""The benchmark runner: every record arrives in the table and the file, failures are not hidden."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import bench
from bench.run import main

GOOD = """
from bench.record import Record

def records():
    return [
        Record(name="layer/ours", value=12.3456, unit="ms"),
        Record(name="layer/ratio", value=1.1, unit="x floor", target="<= 1.15", met=True),
        Record(name="layer/other", value=1.7, unit="x floor", target="<= 1.5", met=False),
    ]
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules are benchmarks, in place of the real ones."""
    monkeypatch.setattr(bench, "__path__", [*bench.__path__, str(tmp_path)])
    (tmp_path / "planted_good.py").write_text(GOOD)
    return tmp_path


def test_table_and_file(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = planted / "out.json"
    assert main(["--only", "planted_good", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())
    assert [row["name"] for row in rows] == ["layer/ours", "layer/ratio", "layer/other"]
    assert rows[1] == {
        "name": "layer/ratio",
        "value": 1.1,
        "unit": "x floor",
        "target": "<= 1.15",
        "met": True,
    }
    assert rows[0]["met"] is None
    text = capsys.readouterr().out
    assert "layer/ours   12.35  ms" in text
    assert "1 of 2 targets met" in text
    assert [line.split()[-1] for line in text.splitlines() if "x floor" in line] == [
        "met",
        "MISSED",
    ]


def test_each_benchmark_has_a_process_of_its_own(planted: Path) -> None:
    code = GOOD.replace("value=12.3456", "value=float(os.getpid())")
    for name in ("planted_one", "planted_two"):
        (planted / f"{name}.py").write_text(f"import os\n{code}")
    output = planted / "out.json"
    assert main(["--only", "planted_one", "planted_two", "--output", str(output)]) == 0
    one, two = (row["value"] for row in json.loads(output.read_text()) if row["unit"] == "ms")
    assert len({one, two, os.getpid()}) == 3


def test_strict_fails_on_a_missed_target(planted: Path) -> None:
    output = str(planted / "out.json")
    assert main(["--only", "planted_good", "--output", output, "--strict"]) == 1


def test_a_failing_benchmark_is_reported_and_hides_no_other(
    planted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (planted / "planted_bad.py").write_text("def records():\n    raise RuntimeError('no device')\n")
    output = planted / "out.json"
    assert main(["--only", "planted_bad", "planted_good", "--output", str(output)]) == 1
    assert len(json.loads(output.read_text())) == 3
    error = capsys.readouterr().err
    assert "no device" in error
    assert "failed: planted_bad" in error
