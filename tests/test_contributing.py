"""What a contributor finds: CI, hooks, templates, the citation. They agree with the Makefile."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import megatron_moe
from tests.test_packaging import PYTHONS, make

ROOT = Path(__file__).resolve().parent.parent
GITHUB = ROOT / ".github"
TEMPLATES = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))


def read(path: Path) -> Any:
    """A YAML file."""
    return yaml.safe_load(path.read_text())


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile."""
    done = make(ROOT, "--dry-run", "--always-make", "-o", ".venv/bin/python", target)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_workflow_runs_the_same_script_on_every_python() -> None:
    job = read(GITHUB / "workflows" / "ci.yml")["jobs"]["check-and-test"]
    assert job["strategy"]["matrix"]["python-version"] == list(PYTHONS)
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    setup = next(step for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert setup["with"]["python-version"] == "${{ matrix.python-version }}"


def test_hooks_are_the_commands_of_make_check() -> None:
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local", "other repositories bring versions of their own"
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert all(hook["language"] == "system" for hook in hooks.values())
    lines = (line for line in recipe("check") if line.startswith(".venv/bin/"))
    commands = [line for line in lines if " -m pip " not in line]
    checks = [line.removesuffix(" .") for line in commands if "shellcheck" not in line]
    entries = [hook["entry"].removesuffix(" --force-exclude") for hook in hooks.values()]
    assert [entry for entry in entries if "shellcheck" not in entry] == checks
    (shellcheck,) = (line.split() for line in commands if "shellcheck" in line)
    assert " ".join(shellcheck[:2]) == hooks["shellcheck"]["entry"]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    scripts = [f for f in tracked.stdout.split() if re.search(hooks["shellcheck"]["files"], f)]
    assert sorted(scripts) == sorted(shellcheck[2:])


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_issue_templates(path: Path) -> None:
    template = read(path)
    if path.name == "config.yml":
        assert template == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= template.keys()
    identifiers = [field["id"] for field in template["body"]]
    assert len(set(identifiers)) == len(identifiers)
    assert all(field["attributes"]["label"] for field in template["body"])


def test_citation_has_what_the_format_requires() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == megatron_moe.__version__
    assert citation["license"] == "Apache-2.0"
    assert citation["type"] == "software"
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()
        for author in reference["authors"]:
            assert author.keys() == {"family-names", "given-names"}
        (identifier,) = reference["identifiers"]
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", identifier["value"])
    values = [reference["identifiers"][0]["value"] for reference in citation["references"]]
    assert len(set(values)) == len(values)


def test_every_paper_that_is_implemented_is_cited() -> None:
    """Papers of the models that `analysis` reads are not implemented here."""
    sources = [*(ROOT / "megatron_moe").rglob("*.py"), *(ROOT / "fused_kernels").rglob("*.py")]
    named = {
        number
        for path in sources
        if "analysis" not in path.parts
        for number in re.findall(r"arXiv[: ](\d{4}\.\d{4,5})", path.read_text())
    }
    assert len(named) > 5
    citation = (ROOT / "CITATION.cff").read_text()
    assert sorted(number for number in named if f"arXiv:{number}" not in citation) == []


def test_make_lists_every_target_that_is_meant_for_people() -> None:
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.M)
    done = make(ROOT, "help")
    assert [line.split()[1] for line in done.stdout.splitlines()] == phony.split()
    assert {"docs", "compare"} <= set(phony.split())


def test_compare_needs_a_revision() -> None:
    (stamp,) = re.findall(r"touch (\S+)", "\n".join(recipe("setup")))
    done = make(ROOT, "-o", stamp, "-o", ".venv/bin/python", "compare", "BASE=")
    assert done.returncode == 2
    assert "BASE must be a revision or the folder of a checkout (got '')" in done.stderr
