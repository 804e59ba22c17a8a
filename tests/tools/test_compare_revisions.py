"""The comparison of two revisions: equal for the same code, and each kind of difference found."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools import compare_revisions
from tools.compare_revisions import CASES, checkout, differences, main, select_cases

ROOT = Path(__file__).resolve().parents[2]


def tree(folder: Path, planted: str = "") -> Path:
    """The sources of this checkout in another folder, with ``planted`` at the head of training."""
    folder.mkdir()
    for name in ("megatron_moe", "fused_kernels", "tools"):
        (folder / name).symlink_to(ROOT / name)
    script = (ROOT / "pretrain_openmoe.py").read_text()
    future = "from __future__ import annotations\n"
    assert future in script
    (folder / "pretrain_openmoe.py").write_text(script.replace(future, f"{future}{planted}\n"))
    return folder


@pytest.mark.slow
def test_a_revision_equals_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, work = tree(tmp_path / "base"), tmp_path / "work"
    arguments = ["--base", str(base), "--only", "EP2", "--work-dir", str(work)]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert output.endswith("no difference\n")
    assert output.count("EP2: resumed") == 2
    for name in ("base", "head", "mixed"):
        assert (work / name / "EP2" / "metrics.jsonl").stat().st_size


@pytest.mark.slow
def test_another_update_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted = "import sys\nsys.argv += ['--clip-grad', '0.5']"
    head = tree(tmp_path / "head", planted)
    arguments = ["--base", str(ROOT), "--head", str(head), "--only", "single"]
    assert main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    found = [line.split(": base ")[0] for line in lines if ": base " in line]
    assert found == ["single: checkpoint", "single: resumed steps", "single: steps"]
    assert "lm_loss" in next(line for line in lines if line.startswith("single: steps"))


def test_first_difference_of_each_result() -> None:
    base = {"same": ["a"], "steps": ["1 x", "2 x", "3 x"], "short": ["a", "b"], "gone": ["a"]}
    head = {"same": ["a"], "steps": ["1 x", "2 y", "3 z"], "short": ["a"], "new": ["a"]}
    assert differences(base, head) == [
        "gone: 1 lines in base, 0 in head",
        "new: 0 lines in base, 1 in head",
        "short: 2 lines in base, 1 in head",
        "steps: base 2 x | head 2 y",
    ]


def test_nothing_recorded_is_a_difference() -> None:
    assert differences({"steps": []}, {"steps": []}) == ["steps: 0 lines in base, 0 in head"]


def test_cases_by_name() -> None:
    assert select_cases(None) == CASES
    assert [case.name for case in select_cases("UL2,EP2")] == ["UL2", "EP2"]
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one file and two commits, the first of them tagged `old`."""
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.setattr(compare_revisions, "ROOT", folder)
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]

    def git(*arguments: str) -> None:
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)

    git("init")
    for number, content in enumerate(("first", "second")):
        (folder / "file.txt").write_text(content)
        git("add", ".")
        git("commit", "-m", content)
        if number == 0:
            git("tag", "old")
    return folder


def test_checkout_of_a_revision(repository: Path, tmp_path: Path) -> None:
    sources = checkout("old", tmp_path / "sources")
    assert [path.name for path in sources.iterdir()] == ["file.txt"]
    assert (sources / "file.txt").read_text() == "first"
    assert not (repository / ".git" / "worktrees").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--base", ""], "--base must be a revision or the folder of a checkout (got '')"),
        (["--base", "nowhere"], "--base must be a revision or the folder of a checkout (got 'no"),
        (["--base", "old", "--only", "EP2,EP3"], "--only must be some of single, TP2, "),
        (["--base", "old", "--work-dir", "."], "File exists: '.'"),
    ],
)
def test_usage_errors(
    repository: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], error: str
) -> None:
    assert main(arguments) == 2
    assert error in capsys.readouterr().err


def test_a_failing_command_is_an_error_with_its_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tree(tmp_path / "base")
    (base / "tools").unlink()
    (base / "tools").mkdir()
    (base / "tools" / "train_tokenizer.py").write_text("raise SystemExit('no tokenizer')\n")
    assert main(["--base", str(base), "--only", "single"]) == 2
    error = capsys.readouterr().err
    assert str(base) in error
    assert "train_tokenizer.py" in error
    assert "no tokenizer" in error
