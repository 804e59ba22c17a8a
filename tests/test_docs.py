"""The documentation names files and flags that exist, and the site has all of it."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from megatron_moe.config.cli import all_flags
from megatron_moe.config.megatron_flags import accepted_flags
from tests.config.megatron_lists import megatron_flags, script_flags

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.md")]
)
FOLDERS = "bench|docs|examples|fused_kernels|megatron_moe|tests|tools"
SLURM = {
    *("--parsable", "--dependency", "--kill-on-invalid-dep", "--array", "--cpus-per-task"),
    *("--ntasks-per-node", "--gpus-per-task", "--gpu-bind", "--kill-on-bad-exit", "--exclusive"),
    *("--mem", "--requeue", "--open-mode"),
    *("--error", "--label", "--cpu-bind", "--nodes", "--distribution"),
}
ADDRESSES = {
    "--long",
    "--max-restarts",
    "--local-addr",
    "--master-addr",
    "--master-port",
    "--network",
}
PIP = {"--no-build-isolation", "--no-deps"}
LAUNCHER = {
    *(
        "--nproc-per-node",
        "--help",
        "--durations",
        "--shutdown-timeout",
        "--signal",
        "--max-restarts",
    ),
    *(*SLURM, *ADDRESSES, *PIP),
}
"""Flags of other programs that the pages show."""


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Flags of the run and of every command."""
    commands = [*(ROOT / "tools").glob("*.py"), *(ROOT / "bench").glob("*.py")]
    commands += (ROOT / "examples" / "experiments").glob("*.py")
    commands.append(ROOT / "megatron_moe" / "inference" / "command.py")
    commands.append(ROOT / "megatron_moe" / "data" / "preprocess" / "megatron_flags.py")
    own = {flag for path in commands for flag in re.findall(r'"(--[a-z0-9-]+)"', path.read_text())}
    return set(all_flags()) | own | LAUNCHER | set(accepted_flags())


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
    if page.name == "migrating_from_megatron.md":
        named -= {*megatron_flags(), *(row.flag for row in script_flags())}
    assert named - flags == set()


def test_every_page_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.md") if f"docs/{p.name}" not in text] == []


def test_the_readme_reaches_the_documentation_in_two_screens() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("## Documentation") <= 80


@pytest.fixture
def hooks() -> ModuleType:
    """The hooks that MkDocs loads, from a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def navigation(entries: list[Any]) -> list[str]:
    """Paths of the pages in a `nav` of mkdocs.yml, in order."""
    pages: list[str] = []
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        pages += navigation(value) if isinstance(value, list) else [value]
    return pages


def test_every_page_is_in_the_navigation_of_the_site(hooks: ModuleType) -> None:
    pages = navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    docs = ROOT / "docs"
    own = [path.relative_to(docs).as_posix() for path in docs.rglob("*.md")]
    assert sorted(pages) == sorted([*own, *hooks.PAGES.values(), *hooks.api_pages()])
    assert pages[0] == "index.md"


def is_public(module: Path) -> bool:
    """Whether a source defines a public class, function or documented constant."""
    if any(part.startswith("_") for part in module.parts if part != "__init__.py"):
        return False
    nodes = ast.parse((ROOT / module).read_text()).body
    defined = [n.name for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    assigned = [target for n in nodes if isinstance(n, ast.Assign) for target in n.targets]
    assigned += [n.target for n in nodes if isinstance(n, ast.AnnAssign)]
    names = [*defined, *(target.id for target in assigned if isinstance(target, ast.Name))]
    return not all(name.startswith("_") for name in names)


def test_every_public_module_is_in_the_api_reference_once(hooks: ModuleType) -> None:
    pages = hooks.api_pages()
    listed = [name for text in pages.values() for name in re.findall(r"^::: (\S+)$", text, re.M)]
    folders = ("megatron_moe", "fused_kernels")
    sources = [path.relative_to(ROOT) for top in folders for path in (ROOT / top).rglob("*.py")]
    public = [".".join(path.with_suffix("").parts) for path in sources if is_public(path)]
    assert sorted(listed) == sorted(name.removesuffix(".__init__") for name in public)
    assert "::: megatron_moe.moe.router\n" in pages["api/moe.md"]
    for page in pages.keys() - {"api/index.md"}:
        assert f"({page.removeprefix('api/')})" in pages["api/index.md"]


@pytest.mark.parametrize(
    ("source", "page", "target", "expected"),
    [
        ("docs/model.md", "model.md", "routing.md", "routing.md"),
        ("docs/model.md", "model.md", "../CONTRIBUTING.md", "contributing.md"),
        ("docs/model.md", "model.md", "../examples/quickstart.sh", "files/examples/quickstart.sh"),
        ("README.md", "index.md", "docs/routing.md", "routing.md"),
        ("README.md", "index.md", "CHANGELOG.md", "changelog.md"),
        ("README.md", "index.md", "LICENSE", "files/LICENSE"),
    ],
)
def test_links_on_the_site(
    hooks: ModuleType, source: str, page: str, target: str, expected: str
) -> None:
    assert hooks.site_link(ROOT / source, page, target) == expected


def test_only_links_change_on_the_site(hooks: ModuleType) -> None:
    class File:
        src_uri = "index.md"

    class Page:
        file = File()

    text = "[R](docs/routing.md#groups), [a](https://a.org/docs/x.md), `docs/data.md`, [t](#top)"
    assert hooks.on_page_markdown(text, Page(), None, None) == (
        "[R](routing.md#groups), [a](https://a.org/docs/x.md), [`docs/data.md`](data.md), [t](#top)"
    )


def test_files_that_pages_link_to_are_copied(hooks: ModuleType, tmp_path: Path) -> None:
    hooks.ROOT, hooks.DOCS = tmp_path, tmp_path / "docs"
    (tmp_path / "docs").mkdir()
    for name in hooks.PAGES:
        (tmp_path / name).write_text("[license](LICENSE) [page](docs/a.md) [web](https://a.org/b)")
    (tmp_path / "docs/a.md").write_text("[script](../examples/run.sh#L3) [home](../README.md)")
    assert hooks.linked_files() == {"LICENSE", "examples/run.sh"}
