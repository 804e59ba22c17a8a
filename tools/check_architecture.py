"""Check the design rules: imports, private names, sizes, module docstrings, forbidden calls.

Reads syntax trees and executes nothing; an import inside a function counts like any other. Sizes
past the target are warnings, sizes past the limit are errors. Exit code 1 if there are errors.

    # this repository, or another checkout
    python tools/check_architecture.py
    python tools/check_architecture.py ../other

    # lines per file and function
    python tools/check_architecture.py --sizes
"""

from __future__ import annotations

import argparse
import ast
import graphlib
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

FILE_TARGET, FILE_LIMIT = 350, 500
"""Lines of a file: a warning past the target, an error past the limit."""
FUNCTION_TARGET, FUNCTION_LIMIT = 40, 80
"""Lines of a function without its docstring: likewise."""

OWN = ("megatron_moe", "fused_kernels", "tools", "bench", "tests", "pretrain_openmoe")
SOURCES = (*OWN[:4], "docs", "examples", "pretrain_openmoe.py", "setup.py")

_BASE = {"config", "platform"}
_MODEL = _BASE | {"tokenizer", "data", "model", "moe"}
_ENGINE = _MODEL | {"parallel", "checkpoint", "training"}
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "platform": {"config"},
    "tokenizer": _BASE,
    "data": _BASE | {"tokenizer"},
    "moe": _BASE | {"fused_kernels"},
    "model": _BASE | {"moe", "fused_kernels"},
    "parallel": _MODEL,
    "checkpoint": _BASE | {"model", "moe", "parallel"},
    "training": _MODEL | {"parallel", "checkpoint"},
    "planning": _ENGINE,
    "analysis": _ENGINE | {"convert", "inference"},
    "convert": _ENGINE,
    "inference": _ENGINE | {"convert"},
}
"""What each package of `megatron_moe` may import from the others. All may import `EVERYWHERE`. The
last four are leaves: only tools and `pretrain_openmoe` import them, except that `analysis` and
`inference` read checkpoints of other formats with `convert`, and `analysis` loads models as
`inference` does."""
EVERYWHERE = {
    *("errors", "files", "text", "console", "command_line", "processes"),
    *("megatron_moe", "__version__"),
}
"""What all of them may import, and which imports none of them."""
STANDALONE = "megatron_moe.convert.modeling"
"""The modules in it travel with exported weights and run without this project: they import each
other and `STANDALONE_LIBRARIES`, besides the standard library."""
ONE_FILE = {f"{STANDALONE}.modeling_openmoe"}
"""Files of any length: one that travels with weights has to be self-contained."""
STANDALONE_LIBRARIES = {"torch", "transformers", "sentencepiece"}
KERNEL_LIBRARIES = {"torch", "triton", "fused_kernels"}
"""What `fused_kernels` may import besides the standard library."""
LIGHT = {"torch", "megatron", "numpy", "megatron_moe.platform"}
"""What `config` must not import, so that `--help` and usage errors appear without delay."""

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval": "runs code",
    "exec": "runs code",
    "builtins.eval": "runs code",
    "builtins.exec": "runs code",
    "torch.load": "reads pickles; use safetensors",
    "torch.save": "writes pickles; use safetensors",
    "yaml.load": "builds arbitrary objects",
    "yaml.unsafe_load": "builds arbitrary objects",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "subprocess.getoutput": "runs a shell",
    "subprocess.getstatusoutput": "runs a shell",
}
FORBIDDEN_KEYWORDS = {"shell": "runs a shell", "allow_pickle": "reads pickles"}


@dataclass(frozen=True)
class Finding:
    """One departure from the design."""

    path: str
    line: int
    rule: str
    message: str
    error: bool = True

    def __str__(self) -> str:
        kind = "error" if self.error else "warning"
        return f"{self.path}:{self.line}: {kind}: {self.message} [{self.rule}]"


@dataclass(frozen=True)
class Module:
    """A parsed source file. `name` is dotted, for example `megatron_moe.moe.router`."""

    path: str
    name: str
    lines: int
    tree: ast.Module
    is_package: bool

    @property
    def is_test(self) -> bool:
        """Whether this is test code, which may import anything and plant any fault."""
        return self.name.split(".")[0] == "tests"

    @property
    def package(self) -> list[str]:
        """Name parts of the package that relative imports start from."""
        return self.name.split(".") if self.is_package else self.name.split(".")[:-1]

    def absolute(self, node: ast.ImportFrom) -> str:
        """The module that `from ... import` names, with the dots of a relative import resolved."""
        start = self.package[: len(self.package) - node.level + 1] if node.level else []
        return ".".join([*start, *([node.module] if node.module else [])])


def read_modules(root: Path) -> Iterator[Module]:
    """Every Python source of the repository at ``root``, tests included, in path order."""
    roots = [root / name for name in (*SOURCES, "tests")]
    files = [path for top in roots for path in ([top] if top.is_file() else top.rglob("*.py"))]
    for file in sorted(files):
        text = file.read_text()
        relative = file.relative_to(root)
        parts = relative.with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        yield Module(str(relative), name, text.count("\n"), ast.parse(text, file), is_package)


def imports(module: Module) -> Iterator[tuple[str, int]]:
    """Dotted names that ``module`` imports anywhere, with their lines; relative ones resolved.

    `from a import b` gives `a.b`, since b may be a module. `import_module("a")` counts too.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.absolute(node)
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).split(".")[-1]
            argument = node.args[0]
            if called in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield str(argument.value), node.lineno


def part_of(name: str) -> str:
    """The package that a dotted name belongs to: `moe` for `megatron_moe.moe.router`."""
    pieces = name.split(".")
    return pieces[1] if pieces[0] == "megatron_moe" and len(pieces) > 1 else pieces[0]


def check_imports(module: Module) -> Iterator[Finding]:
    """Import directions, and use of Megatron-Core's global process groups."""
    for name, line in imports(module):
        if "parallel_state" in name.split(".") and part_of(module.name) != "parallel":
            yield Finding(module.path, line, "parallel-state", "only parallel/ may use it")
        reason = _import_fault(module.name, name)
        if reason:
            yield Finding(module.path, line, "import", f"{module.name} imports {name}: {reason}")


def _import_fault(importer: str, imported: str) -> str | None:
    """Why ``importer`` must not import ``imported``, or None if it may."""
    top, part, target = imported.split(".")[0], part_of(importer), part_of(imported)
    if importer.startswith(f"{STANDALONE}."):
        near = imported.startswith(f"{STANDALONE}.")
        known = near or top in sys.stdlib_module_names or top in STANDALONE_LIBRARIES
        return None if known else "it travels with weights, so it may import torch and transformers"
    if importer.startswith("fused_kernels"):
        known = top in sys.stdlib_module_names or top in KERNEL_LIBRARIES
        return None if known else "fused_kernels imports only torch and triton"
    if part == "config" and any(f"{imported}.".startswith(f"{name}.") for name in LIGHT):
        return "config must import quickly, so it may not import torch or NumPy"
    if top == "tools" and importer.startswith("tools"):
        return "tools are installed under another name; shared code belongs in a package"
    if not importer.startswith("megatron_moe") or top not in OWN:
        return None
    if target in (part, *EVERYWHERE):
        return None
    if part not in ALLOWED and part not in EVERYWHERE:
        return f"{part} is not in ALLOWED; add it in tools/check_architecture.py"
    allowed = ALLOWED.get(part, set())
    return None if target in allowed else f"{part} may import {sorted(allowed) or 'nothing'}"


def check_private(module: Module) -> Iterator[Finding]:
    """No private (`_x`) name of another module, imported or read as an attribute.

    A private module may be imported within its own package. Attributes count where they start
    from a name imported from this project: `launch._store`, `Layout._cut`.
    """
    for name, line in imports(module):
        if name.split(".")[0] in OWN and _is_foreign(name, module):
            yield _private(module, line, name)
    names = _aliases(module)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            head, _, rest = ast.unparse(node).partition(".")
            if names.get(head, "").split(".")[0] in OWN:
                yield _private(module, node.lineno, f"{names[head]}.{rest}")


def _is_foreign(name: str, module: Module) -> bool:
    """Whether ``name`` is private to something that does not enclose ``module``."""
    parts = name.split(".")
    owners = (parts[:index] for index, part in enumerate(parts) if _is_private(part))
    return any(owner != module.package[: len(owner)] for owner in owners)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _private(module: Module, line: int, name: str) -> Finding:
    message = f"{name} is private to its module; make it public or move it"
    return Finding(module.path, line, "private", message)


def check_sizes(module: Module) -> Iterator[Finding]:
    """Lines of the file, and of each function without its docstring."""
    if module.lines > FILE_TARGET and module.name not in ONE_FILE:
        text = f"{module.lines} lines; target {FILE_TARGET}, limit {FILE_LIMIT}"
        yield Finding(module.path, 1, "file-size", text, module.lines > FILE_LIMIT)
    for node in functions(module):
        lines = code_lines(node)
        if lines > FUNCTION_TARGET:
            text = f"{node.name}: {lines} lines; target {FUNCTION_TARGET}, limit {FUNCTION_LIMIT}"
            error = lines > FUNCTION_LIMIT
            yield Finding(module.path, node.lineno, "function-size", text, error)


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a module, methods and nested functions included."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring: documentation is not a size."""
    total = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is None:
        return total
    docstring = node.body[0]
    return total - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)


def check_docstring(module: Module) -> Iterator[Finding]:
    """Each module that is not empty starts with a docstring."""
    if module.tree.body and not ast.get_docstring(module.tree):
        yield Finding(module.path, 1, "docstring", "the module has no docstring")


def check_forbidden(module: Module) -> Iterator[Finding]:
    """No call or import that can run code from a file or a string."""
    names = _aliases(module)
    for name, line in imports(module):
        if name.split(".")[0] in FORBIDDEN_MODULES:
            yield Finding(module.path, line, "forbidden", f"{name}: can run code from its input")
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        head, _, rest = ast.unparse(node.func).partition(".")
        called = ".".join(filter(None, (names.get(head, head), rest)))
        if called in FORBIDDEN_CALLS and not _weights_only(called, node):
            message = f"{called}: {FORBIDDEN_CALLS[called]}"
            yield Finding(module.path, node.lineno, "forbidden", message)
        for keyword in node.keywords:
            harmless = isinstance(keyword.value, ast.Constant) and not keyword.value.value
            if keyword.arg in FORBIDDEN_KEYWORDS and not harmless:
                message = f"{keyword.arg}=: {FORBIDDEN_KEYWORDS[keyword.arg]}"
                yield Finding(module.path, node.lineno, "forbidden", message)


def _weights_only(called: str, node: ast.Call) -> bool:
    """Whether this is `torch.load(..., weights_only=True)`, which only builds tensors."""
    values = (word.value for word in node.keywords if word.arg == "weights_only")
    return called == "torch.load" and any(
        isinstance(value, ast.Constant) and value.value is True for value in values
    )


def _aliases(module: Module) -> dict[str, str]:
    """What imported names stand for: `import torch as t` gives t -> torch."""
    names: dict[str, str] = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            heads = ((a, a.name.split(".")[0]) for a in node.names)
            names |= {a.asname or head: a.name if a.asname else head for a, head in heads}
        elif isinstance(node, ast.ImportFrom):
            base = module.absolute(node)
            names |= {a.asname or a.name: f"{base}.{a.name}" for a in node.names}
    return names


def check_cycles(modules: Iterable[Module]) -> Iterator[Finding]:
    """No import cycle between modules; imports under `if TYPE_CHECKING` do not count."""
    by_name = {module.name: module for module in modules}
    graph: dict[str, dict[str, int]] = {name: {} for name in by_name}
    for module in by_name.values():
        skipped = _type_checking_lines(module.tree)
        for name, line in imports(module):
            # `from a import b` depends on a.b if that is a module, else on a.
            target = name if name in by_name else name.rpartition(".")[0]
            if target in by_name and target != module.name and line not in skipped:
                graph[module.name].setdefault(target, line)
    while cycle := _cycle(graph):
        importer, imported = cycle[0], cycle[1]
        line = graph[importer].pop(imported)
        message = f"import cycle: {' -> '.join(cycle)}"
        yield Finding(by_name[importer].path, line, "cycle", message)


def _type_checking_lines(tree: ast.Module) -> set[int]:
    """Lines of the bodies of `if TYPE_CHECKING`."""
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If))
    checked = (node for node in blocks if ast.unparse(node.test).endswith("TYPE_CHECKING"))
    bodies = (statement for node in checked for statement in node.body)
    return {line for s in bodies for line in range(s.lineno, (s.end_lineno or s.lineno) + 1)}


def _cycle(graph: dict[str, dict[str, int]]) -> list[str] | None:
    """One cycle, as `[a, b, ..., a]` in which each imports the next; None if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        # The sorter lists dependencies before their dependents.
        found: list[str] = list(reversed(error.args[1]))
        return found
    return None


def sizes(modules: Iterable[Module]) -> str:
    """Lines per file and function of the product, as a Markdown table.

    Functions count without their docstrings, and files that hold nothing but one do not count.
    """
    measured = [m for m in modules if m.name.split(".")[0] in ("megatron_moe", "fused_kernels")]
    rows = {
        "file": [module.lines for module in measured if not _only_docstring(module)],
        "function": [code_lines(node) for module in measured for node in functions(module)],
    }
    table = ["| lines per | number | median | p90 | maximum |", "|---|---|---|---|---|"]
    for name, lines in rows.items():
        ordered = sorted(lines) or [0]
        p90 = ordered[(9 * len(ordered) - 1) // 10]
        median = statistics.median_low(ordered)
        table.append(f"| {name} | {len(lines)} | {median} | {p90} | {ordered[-1]} |")
    return "\n".join(table)


def _only_docstring(module: Module) -> bool:
    return len(module.tree.body) == bool(ast.get_docstring(module.tree))


def check(root: Path) -> list[Finding]:
    """All findings for the repository at ``root``.

    Raises:
        SyntaxError: a source does not parse.
    """
    findings: list[Finding] = []
    modules = list(read_modules(root))
    for module in modules:
        findings += check_sizes(module)
        findings += check_docstring(module)
        if not module.is_test:
            findings += check_imports(module)
            findings += check_private(module)
            findings += check_forbidden(module)
    findings += check_cycles(module for module in modules if not module.is_test)
    return findings


def main(argv: list[str] | None = None) -> int:
    """Print the findings; 1 if any is an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parent.parent
    parser.add_argument("root", nargs="?", type=Path, default=default, help="root of a checkout")
    parser.add_argument("--sizes", action="store_true", help="print sizes instead of findings")
    options = parser.parse_args(argv)
    if options.sizes:
        print(sizes(read_modules(options.root)))
        return 0
    findings = check(options.root)
    print(*findings, sep="\n", end="\n" if findings else "")
    errors = sum(finding.error for finding in findings)
    print(f"architecture: {errors} errors, {len(findings) - errors} warnings")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
