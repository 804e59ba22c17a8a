"""The documentation names files and flags that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_moe.config.cli import all_flags

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FOLDERS = "bench|docs|examples|fused_kernels|megatron_moe|tests|tools"
SLURM = {"--parsable", "--dependency", "--kill-on-invalid-dep", "--array", "--cpus-per-task"}
LAUNCHER = {"--nproc-per-node", "--help", "--durations", *SLURM}
"""Flags of other programs that the pages show."""


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Flags of the run and of every command."""
    commands = [*(ROOT / "tools").glob("*.py"), *(ROOT / "bench").glob("*.py")]
    commands.append(ROOT / "megatron_moe" / "inference" / "command.py")
    own = {flag for path in commands for flag in re.findall(r'"(--[a-z0-9-]+)"', path.read_text())}
    return set(all_flags()) | own | LAUNCHER


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    paths = re.findall(rf"`((?:{FOLDERS})/[\w/.-]*)`", page.read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page: Path, flags: set[str]) -> None:
    named = set(
        re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]*[a-z0-9])(?![\w-]*[*<{/])", page.read_text())
    )
    assert named - flags == set()


def test_every_page_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.md") if f"docs/{p.name}" not in text] == []
