"""Make a small real corpus from files that every Python installation contains.

Two domains, one JSON Lines file each, one document per line: `{"text", "domain", "source"}`.

- `code`: the standard library's sources without tests and docstrings. Docstrings are only in the
  other domain, so that no held-out text is in the training code.
- `text`: the docstrings of each module, the topics of Python's `help()`, licences and notes.

The order of documents depends on their names alone and is pseudo-random, so that `--split` holds
out a representative sample.

    python tools/make_demo_corpus.py --output-dir corpus --megabytes 8
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.command_line import Parser
from megatron_moe.data.progress import progress_bar
from megatron_moe.errors import UsageError, exit_on_usage_error

LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
"""Folders that are not the library's, tests, or generated tables."""
NOTES = {".txt", ".rst"}
_LEAST = 200
"""Characters of the shortest document."""
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Document:
    """One text and its origin."""

    text: str
    domain: str
    source: str


def documents_of_library(root: Path) -> Iterator[Document]:
    """Yield code and prose of the standard library at ``root``."""
    for path in with_progress(list(library_files(root))):
        name = path.relative_to(root).as_posix()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a few test sources are in other encodings
        if path.suffix in NOTES:
            yield Document(text, "text", name)
        else:
            yield from separate(text, name)


def library_files(root: Path) -> Iterator[Path]:
    """Yield sources and notes, in the order of their paths."""
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if name not in LEFT_OUT)
        for name in sorted(names):
            if Path(name).suffix in {".py", *NOTES}:
                yield Path(folder, name)


def with_progress(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the paths, with a progress bar."""
    with progress_bar(len(paths), " files") as bar:
        for path in paths:
            yield path
            bar.update(1)


def separate(source: str, name: str) -> Iterator[Document]:
    """Yield the code without docstrings, and the docstrings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in old sources
            tree = ast.parse(source)
    except SyntaxError:
        return
    lines: list[str | None] = list(source.splitlines())
    prose: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(node, _Documented):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        title = name if isinstance(node, ast.Module) else node.name
        prose.append(f"{title}\n\n{docstring}\n")
        _blank(lines, node)
    yield Document("\n".join(line for line in lines if line is not None) + "\n", "code", name)
    if prose:
        yield Document("\n".join(prose), "text", f"{name}:docstrings")


def _blank(lines: list[str | None], node: _Documented) -> None:
    """Remove a docstring; `pass` replaces it if the body contains nothing else."""
    first = node.body[0]
    alone = len(node.body) == 1 and not isinstance(node, ast.Module)
    end = first.end_lineno or first.lineno
    opening = lines[first.lineno - 1] or ""
    if opening[: first.col_offset].strip():  # `def f(): "..."` on one line
        return
    lines[first.lineno - 1 : end] = [None] * (end - first.lineno + 1)
    if alone:
        lines[first.lineno - 1] = " " * first.col_offset + "pass"


def topics() -> Iterator[Document]:
    """Yield the texts of `help("topic")`."""
    try:
        from pydoc_data.topics import topics as texts
    except ImportError:
        return  # some distributions remove it
    for name, text in sorted(texts.items()):
        yield Document(text, "text", f"help:{name}")


def choose(documents: Iterable[Document], megabytes: float) -> list[Document]:
    """Return distinct texts in a pseudo-random order by name, up to a size."""
    ordered = sorted(
        documents, key=lambda d: hashlib.sha256(f"{d.domain} {d.source}".encode()).digest()
    )
    chosen: list[Document] = []
    seen: set[str] = set()
    room = megabytes * 1e6
    for document in ordered:
        size = len(document.text.encode("utf-8", errors="replace"))
        if len(document.text) >= _LEAST and document.text not in seen and size <= room:
            seen.add(document.text)
            chosen.append(document)
            room -= size
    return chosen


def write(documents: Sequence[Document], path: Path) -> None:
    """Write one document per line; the file appears complete or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        for document in documents:
            record = {
                "text": document.text,
                "domain": document.domain,
                "source": document.source,
            }
            stream.write(json.dumps(record) + "\n")
    os.replace(partial, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser("make_demo_corpus.py", __doc__)
    parser.add_argument("--output-dir", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--megabytes", type=float, default=16.0, help="maximum size of each domain (16)"
    )
    options = parser.parse_args(argv)
    with exit_on_usage_error("make_demo_corpus.py", OSError):
        if options.megabytes <= 0:
            raise UsageError("--megabytes", options.megabytes, "> 0")
        options.output_dir.mkdir(parents=True, exist_ok=True)
        found = [*documents_of_library(Path(sysconfig.get_path("stdlib"))), *topics()]
        for domain in ("code", "text"):
            chosen = choose((d for d in found if d.domain == domain), options.megabytes)
            path = options.output_dir / f"{domain}.jsonl"
            write(chosen, path)
            size = sum(len(document.text) for document in chosen) / 1e6
            print(f"{path}: {len(chosen)} documents, {size:.1f} M characters")


if __name__ == "__main__":
    main()
