"""Make a small real corpus of conversations from files that every Python installation contains.

One JSON Lines file, one conversation per line (`--objective sft`). The user asks what a function,
class or topic of Python is, and the answer is the first paragraph of its documentation; for a
class, a second question is about one of its methods. Sources are the standard library's docstrings
and the topics of Python's `help()`.

Each answer occurs once, and the order of conversations depends on their text alone and is
pseudo-random, so that `--split` holds out a representative sample.

    python tools/make_demo_chat.py --output chat.jsonl --conversations 4000
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_moe_tools.make_demo_corpus import library_files, topics, with_progress

from megatron_moe.command_line import Parser
from megatron_moe.errors import UsageError, exit_on_usage_error

SYSTEM = "You explain Python and its standard library."
SHORTEST, LONGEST = 20, 600
"""Characters of an answer."""
_Function = ast.FunctionDef | ast.AsyncFunctionDef

Turn = dict[str, str]
Conversation = list[Turn]


def conversations_of_library(root: Path) -> Iterator[Conversation]:
    """Yield conversations about the functions and classes of the library at ``root``."""
    for path in with_progress(list(library_files(root))):
        if path.suffix != ".py":
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd escapes in old sources
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, SyntaxError):
            continue  # a few test sources are in other encodings
        relative = path.relative_to(root).with_suffix("")
        yield from conversations_of_module(tree, ".".join(relative.parts))


def conversations_of_module(tree: ast.Module, module: str) -> Iterator[Conversation]:
    """Yield conversations about the documented functions and classes of one module."""
    for node in tree.body:
        if isinstance(node, _Function):
            yield conversation([_exchange(node, module)])
        elif isinstance(node, ast.ClassDef):
            methods = [_exchange(m, node.name) for m in node.body if isinstance(m, _Function)]
            documented = [exchange for exchange in methods if exchange is not None]
            about = ast.get_docstring(node)
            asked = f"What is the class {node.name} of the module {module}?"
            first = (asked, first_paragraph(about)) if about else None
            yield conversation([first, *documented[:1]])


def _exchange(node: _Function, where: str) -> tuple[str, str] | None:
    """Return a question about a function and its answer, if it is documented."""
    about = ast.get_docstring(node)
    if about is None:
        return None
    call = f"{where}.{node.name}({ast.unparse(node.args)})"
    return f"What does {call} do?", first_paragraph(about)


def conversations_of_topics() -> Iterator[Conversation]:
    """Yield conversations about the topics of `help()`."""
    for document in topics():
        name = document.source.partition(":")[2]
        _, _, text = document.text.partition("\n\n")  # after the title
        yield conversation([(f"What does help({name!r}) say?", first_paragraph(text))])


def first_paragraph(text: str) -> str:
    """Return the text up to the first blank line, as one line."""
    return " ".join(text.strip().partition("\n\n")[0].split())


def conversation(exchanges: Iterable[tuple[str, str] | None]) -> Conversation:
    """Return the turns of the exchanges whose answer is neither too short nor too long."""
    turns = [{"role": "system", "content": SYSTEM}]
    for exchange in exchanges:
        if exchange is not None and SHORTEST <= len(exchange[1]) <= LONGEST:
            turns.append({"role": "user", "content": exchange[0]})
            turns.append({"role": "assistant", "content": exchange[1]})
    return turns


def choose(found: Iterable[Conversation], most: int) -> list[Conversation]:
    """Return conversations with distinct answers, in a pseudo-random order."""
    ordered = sorted(found, key=lambda turns: hashlib.sha256(json.dumps(turns).encode()).digest())
    chosen: list[Conversation] = []
    seen: set[str] = set()
    for turns in ordered:
        answers = {turn["content"] for turn in turns if turn["role"] == "assistant"}
        if answers and not answers & seen and len(chosen) < most:
            seen |= answers
            chosen.append(turns)
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser("make_demo_chat.py", __doc__)
    parser.add_argument("--output", required=True, type=Path, help="JSON Lines file")
    parser.add_argument("--conversations", type=int, default=4000, help="maximum number (4000)")
    options = parser.parse_args(argv)
    with exit_on_usage_error("make_demo_chat.py", OSError):
        if options.conversations < 1:
            raise UsageError("--conversations", options.conversations, ">= 1")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        root = Path(sysconfig.get_path("stdlib"))
        found = [*conversations_of_library(root), *conversations_of_topics()]
        chosen = choose(found, options.conversations)
        partial = options.output.with_name(options.output.name + ".partial")
        lines = (json.dumps({"messages": turns}) + "\n" for turns in chosen)
        partial.write_text("".join(lines), encoding="utf-8")
        os.replace(partial, options.output)
        answers = sum(len(turns) // 2 for turns in chosen)
        print(f"{options.output}: {len(chosen)} conversations, {answers} answers")


if __name__ == "__main__":
    main()
