"""MkDocs hooks: what the documentation site has besides the pages of `docs/`.

The pages are written to be read in the repository as well, so they link to files outside `docs/`,
and those files link back. On the site, README is the home page, CONTRIBUTING and CHANGELOG are
pages, and any other linked file is copied. The API reference is one page for each package; its text
comes from the docstrings, which mkdocstrings reads without importing anything.

`api_pages` and `linked_files` need no MkDocs, so that tests can call them anywhere.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from posixpath import relpath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files of the root that are pages of the site."""
MODULES = ("errors", "files", "text", "console", "command_line", "processes")
"""Modules of `megatron_moe` that belong to no package, first in the API reference."""
PACKAGES = (
    "config",
    "platform",
    "tokenizer",
    "data",
    "model",
    "moe",
    "parallel",
    "training",
    "checkpoint",
    "convert",
    "inference",
    "analysis",
    "planning",
)
"""Packages of `megatron_moe`, in the order of the API reference: as a run uses them."""
LINK = re.compile(r"\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
MENTION = re.compile(r"(?<!\[)`docs/(?P<page>\w+\.md)`")
"""A page that is named as code rather than linked: `docs/routing.md`."""


def public_modules(folder: Path) -> list[str]:
    """Dotted names of the modules below ``folder``, packages first, that define public names.

    Modules with a private name, or without a public class, function or constant, are left out.
    """
    paths = sorted(folder.rglob("*.py"), key=lambda path: (path.parent, path.stem))
    found = []
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_private = any(part.startswith("_") for part in parts if part != "__init__")
        if not is_private and _has_public_names(ast.parse(path.read_text())):
            found.append(".".join(part for part in parts if part != "__init__"))
    return found


def _has_public_names(tree: ast.Module) -> bool:
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return any(not name.startswith("_") for name in names)


def api_pages() -> dict[str, str]:
    """Path and Markdown source of each page of the API reference, the index first."""
    top = {f"api/{name}.md": f"megatron_moe.{name}" for name in MODULES}
    titles, sources = dict(top), {page: [module] for page, module in top.items()}
    for package in (*PACKAGES, "fused_kernels"):
        folder = ROOT / package if package == "fused_kernels" else ROOT / "megatron_moe" / package
        page = f"api/{package}.md"
        titles[page] = ".".join(folder.relative_to(ROOT).parts)
        sources[page] = public_modules(folder)
    # A package is documented by its docstring, a module by mkdocstrings.
    pages = {"api/index.md": _api_index(titles)}
    for page, modules in sources.items():
        head = [f"# {titles[page]}", _docstring(titles[page])]
        entries = [f"::: {module}" for module in modules]
        pages[page] = "\n\n".join((head[:1] if page in top else head) + entries) + "\n"
    return pages


def _api_index(titles: dict[str, str]) -> str:
    lines = [
        "# API reference",
        "",
        "Generated from the docstrings of the sources, one page for each package.",
        "",
        "| package | |",
        "|---|---|",
    ]
    for page, name in titles.items():
        summary = _docstring(name).partition("\n\n")[0].replace("\n", " ")
        lines.append(f"| [{name}]({page.removeprefix('api/')}) | {summary} |")
    return "\n".join(lines) + "\n"


def _docstring(name: str) -> str:
    path = ROOT.joinpath(*name.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.get_docstring(ast.parse(source.read_text())) or ""


def linked_files() -> set[str]:
    """Files outside `docs/` that a page links to and that are not pages, relative to the root."""
    found = set()
    for source in [*(ROOT / name for name in PAGES), *DOCS.glob("*.md")]:
        for match in LINK.finditer(source.read_text()):
            target = (source.parent / match["target"]).resolve()
            if not target.is_relative_to(DOCS):
                found.add(str(target.relative_to(ROOT)))
    return found - PAGES.keys()


def site_link(source: Path, page: str, target: str) -> str:
    """Where a link leads on the site.

    Args:
        source: the file that holds the link.
        page: path of its page on the site.
        target: the link, relative to ``source``.
    """
    path = (source.parent / target).resolve()
    if path.is_relative_to(DOCS):
        there = str(path.relative_to(DOCS))
    else:
        name = str(path.relative_to(ROOT))
        there = PAGES.get(name, f"files/{name}")
    return relpath(there, str(Path(page).parent))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and files from outside `docs/`, and the API reference."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    for page, content in api_pages().items():
        files.append(File.generated(config, page, content=content))
    for name in sorted(linked_files()):
        files.append(File.generated(config, f"files/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to their place on the site, and link the pages that are named as code."""
    uri = page.file.src_uri
    if uri.startswith("api/"):
        return markdown
    source = next((ROOT / name for name, own in PAGES.items() if own == uri), DOCS / uri)

    def link(match: re.Match[str]) -> str:
        return f"]({site_link(source, uri, match['target'])}{match['anchor'] or ''})"

    def mention(match: re.Match[str]) -> str:
        return f"[{match[0]}]({relpath(match['page'], str(Path(uri).parent))})"

    return MENTION.sub(mention, LINK.sub(link, markdown))
