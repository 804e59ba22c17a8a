"""The modules of `data` and `tokenizer` import one another in one direction."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tools.check_architecture import imports, read_modules

ROOT = Path(__file__).resolve().parents[2]
DATA, INDEXED = "megatron_moe.data", "megatron_moe.data.indexed"


def graph(package: str) -> dict[str, set[str]]:
    """The modules of a package that each of them imports."""
    modules = {m.name: m for m in read_modules(ROOT) if m.name.startswith(f"{package}.")}
    return {
        name: {
            target
            for imported, _ in imports(module)
            for target in (imported, imported.rpartition(".")[0])
            if target in modules and target != name
        }
        for name, module in modules.items()
    }


@pytest.mark.parametrize("package", [DATA, "megatron_moe.tokenizer"])
def test_no_module_imports_itself_through_others(package: str) -> None:
    found = graph(package)
    assert len(found) > 5
    try:
        list(TopologicalSorter(found).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_indexed_data_does_not_depend_on_what_makes_or_reads_it() -> None:
    """Only on progress reports, besides its own modules."""
    for name, targets in graph(DATA).items():
        if name.startswith(INDEXED):
            others = {target for target in targets if not target.startswith(INDEXED)}
            assert others <= {f"{DATA}.progress"}, name
