"""Hold the sources to the design: import directions, sizes, module docstrings, forbidden calls.

Reads syntax trees, so an import inside a function counts like any other and nothing is executed.
Sizes past the target are warnings, past twice the target errors. Exit code 1 if there are errors.

    # this repository, or another folder of sources
    python tools/check_architecture.py
    python tools/check_architecture.py ../other
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FILE_TARGET = 200
"""Lines of a file: a warning past it, an error past twice as many."""
FUNCTION_TARGET = 25
"""Lines of a function without its docstring: likewise."""

OWN = ("megatron_moe", "fused_kernels", "tools", "bench", "tests", "pretrain_openmoe")
SOURCES = (*OWN[:4], "examples", "pretrain_openmoe.py", "setup.py")

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
    "analysis": _ENGINE | {"convert"},
    "convert": _ENGINE,
    "inference": _ENGINE | {"convert"},
}
"""What each part of `megatron_moe` may import of the others. `errors` is open to all. The last
four are leaves: only tools and `pretrain_openmoe` import them, and `analysis` and `inference` read
checkpoints of other formats with `convert`."""
KERNEL_LIBRARIES = {"torch", "triton", "fused_kernels"}
"""What `fused_kernels` may import besides the standard library."""
LIGHT = {"torch", "megatron", "numpy", "megatron_moe.platform"}
"""What `config` must not import: `--help` and a wrong flag are answered at once."""

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
    """A parsed source file. `name` is dotted, e.g. `megatron_moe.moe.router`."""

    path: str
    name: str
    lines: int
    tree: ast.Module
    is_package: bool

    @property
    def is_test(self) -> bool:
        """Whether this is test code, which may import anything and plant any fault."""
        return self.name.split(".")[0] == "tests"


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
        yield Module(str(relative), name, text.count("\n"), ast.parse(text), is_package)


def imports(module: Module) -> Iterator[tuple[str, int]]:
    """Dotted names that ``module`` imports anywhere, with their lines; relative ones resolved.

    `from a import b` gives `a.b`, since b may be a module. `import_module("a")` counts too.
    """
    package = module.name.split(".") if module.is_package else module.name.split(".")[:-1]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).split(".")[-1]
            argument = node.args[0]
            if called in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield str(argument.value), node.lineno


def part_of(name: str) -> str:
    """The part of the project a dotted name belongs to: `moe` for `megatron_moe.moe.router`."""
    pieces = name.split(".")
    return pieces[1] if pieces[0] == "megatron_moe" and len(pieces) > 1 else pieces[0]


def check_imports(module: Module) -> Iterator[Finding]:
    """Import directions, and who may touch the engine's global groups."""
    for name, line in imports(module):
        if "parallel_state" in name.split(".") and part_of(module.name) != "parallel":
            yield Finding(module.path, line, "parallel-state", "only parallel/ may use it")
        reason = _import_fault(module.name, name)
        if reason:
            yield Finding(module.path, line, "import", f"{module.name} imports {name}: {reason}")


def _import_fault(importer: str, imported: str) -> str | None:
    """Why ``importer`` must not import ``imported``, or None if it may."""
    top, part, target = imported.split(".")[0], part_of(importer), part_of(imported)
    if importer.startswith("fused_kernels"):
        known = top in sys.stdlib_module_names or top in KERNEL_LIBRARIES
        return None if known else "fused_kernels imports only torch and triton"
    if part == "config" and any(f"{imported}.".startswith(f"{name}.") for name in LIGHT):
        return "the configuration must be quick to import"
    if top == "tools" and importer.startswith("tools"):
        return "tools are installed under another name; shared code belongs in a package"
    if not importer.startswith("megatron_moe") or top not in OWN:
        return None
    if target in (part, "errors", "megatron_moe", "__version__"):
        return None
    if part != "errors" and part not in ALLOWED:
        return f"{part} has no place in the design; give it one in tools/check_architecture.py"
    allowed = ALLOWED.get(part, set())
    return None if target in allowed else f"{part} may import {sorted(allowed) or 'nothing'}"


def check_sizes(module: Module) -> Iterator[Finding]:
    """Files near 200 lines, functions near 25 without their docstring."""
    if module.lines > FILE_TARGET:
        text = f"{module.lines} lines, target {FILE_TARGET}"
        yield Finding(module.path, 1, "file-size", text, module.lines > 2 * FILE_TARGET)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = _code_lines(node)
            if lines > FUNCTION_TARGET:
                text = f"{node.name} has {lines} lines, target {FUNCTION_TARGET}"
                error = lines > 2 * FUNCTION_TARGET
                yield Finding(module.path, node.lineno, "function-size", text, error)


def _code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring: documentation costs nothing."""
    total = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is None:
        return total
    docstring = node.body[0]
    return total - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)


def check_docstring(module: Module) -> Iterator[Finding]:
    """Each module that holds anything says at its head what it is for."""
    if module.tree.body and not ast.get_docstring(module.tree):
        yield Finding(module.path, 1, "docstring", "the module does not say what it is for")


def check_forbidden(module: Module) -> Iterator[Finding]:
    """Nothing that can run code from a file or a string."""
    names = _aliases(module.tree)
    for name, line in imports(module):
        if name.split(".")[0] in FORBIDDEN_MODULES:
            yield Finding(module.path, line, "forbidden", f"{name}: may run code that it reads")
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        head, _, rest = ast.unparse(node.func).partition(".")
        called = ".".join(filter(None, (names.get(head, head), rest)))
        if called in FORBIDDEN_CALLS and not _weights_alone(called, node):
            message = f"{called}: {FORBIDDEN_CALLS[called]}"
            yield Finding(module.path, node.lineno, "forbidden", message)
        for keyword in node.keywords:
            harmless = isinstance(keyword.value, ast.Constant) and not keyword.value.value
            if keyword.arg in FORBIDDEN_KEYWORDS and not harmless:
                message = f"{keyword.arg}=: {FORBIDDEN_KEYWORDS[keyword.arg]}"
                yield Finding(module.path, node.lineno, "forbidden", message)


def _weights_alone(called: str, node: ast.Call) -> bool:
    """Whether `torch.load` is told to build tensors and nothing else: other programs' files."""
    told = (word.value for word in node.keywords if word.arg == "weights_only")
    return called == "torch.load" and any(
        isinstance(value, ast.Constant) and value.value is True for value in told
    )


def _aliases(tree: ast.Module) -> dict[str, str]:
    """What local names stand for: `import torch as t` gives t -> torch."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def check(root: Path) -> list[Finding]:
    """All findings for the repository at ``root``.

    Raises:
        SyntaxError: a source does not parse.
    """
    findings: list[Finding] = []
    for module in read_modules(root):
        findings += check_sizes(module)
        findings += check_docstring(module)
        if not module.is_test:
            findings += check_imports(module)
            findings += check_forbidden(module)
    return findings


def main(argv: list[str] | None = None) -> int:
    """Print the findings; 1 if any is an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parent.parent
    parser.add_argument("root", nargs="?", type=Path, default=default)
    findings = check(parser.parse_args(argv).root)
    print(*findings, sep="\n", end="\n" if findings else "")
    errors = sum(finding.error for finding in findings)
    print(f"architecture: {errors} errors, {len(findings) - errors} warnings")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
