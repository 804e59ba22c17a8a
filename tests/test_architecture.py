"""The architecture check finds each planted fault, and the repository itself has none."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tools.check_architecture import (
    FILE_LIMIT,
    FILE_TARGET,
    FUNCTION_LIMIT,
    FUNCTION_TARGET,
    Finding,
    check,
    main,
)

ROOT = Path(__file__).resolve().parent.parent


def plant(root: Path, path: str, body: str, head: str = '"""What this is for."""\n') -> None:
    """Write one source into the miniature repository at ``root``."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(head + body)


def rules(root: Path) -> list[tuple[str, int, str]]:
    """Path, line and rule of each error."""
    return [(f.path, f.line, f.rule) for f in check(root) if f.error]


def test_repository_has_no_errors() -> None:
    errors = [str(finding) for finding in check(ROOT) if finding.error]
    assert not errors, "\n".join(errors)


def test_design_directions_are_free(tmp_path: Path) -> None:
    plant(tmp_path, "megatron_moe/config/a.py", "from megatron_moe.errors import UsageError\n")
    plant(tmp_path, "megatron_moe/moe/a.py", "import torch, fused_kernels.registry\n")
    plant(tmp_path, "megatron_moe/model/a.py", "from megatron_moe.moe.layer import MoELayer\n")
    plant(tmp_path, "megatron_moe/parallel/a.py", "from megatron.core import parallel_state\n")
    plant(tmp_path, "megatron_moe/training/a.py", "from megatron_moe.parallel import layout\n")
    plant(tmp_path, "megatron_moe/analysis/a.py", "from megatron_moe.training import loop\n")
    plant(tmp_path, "megatron_moe/convert/modeling/a.py", "import math, torch, transformers\n")
    plant(tmp_path, "megatron_moe/convert/modeling/b.py", "from .a import A\n")
    plant(tmp_path, "fused_kernels/reference/a.py", "import math, torch, triton.language\n")
    plant(tmp_path, "tools/a.py", "from megatron_moe.analysis import report\n")
    assert check(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("megatron_moe/errors.py", "import megatron_moe.config"),
        ("megatron_moe/config/a.py", "import torch"),
        ("megatron_moe/config/a.py", "from megatron.core import mpu"),
        ("megatron_moe/config/a.py", "from megatron_moe.platform import activate"),
        ("megatron_moe/platform/a.py", "from megatron_moe.data import batch"),
        ("megatron_moe/data/a.py", "import megatron_moe.parallel.layout"),
        ("megatron_moe/moe/a.py", "from megatron_moe.model.norm import RMSNorm"),
        ("megatron_moe/moe/a.py", "from ..model.norm import RMSNorm"),
        ("megatron_moe/moe/__init__.py", "from ..parallel import context"),
        ("megatron_moe/model/a.py", "from megatron_moe import parallel"),
        ("megatron_moe/model/a.py", "from megatron_moe.training import step"),
        ("megatron_moe/parallel/a.py", "from megatron_moe.training import step"),
        ("megatron_moe/checkpoint/a.py", "from megatron_moe.training import step"),
        ("megatron_moe/training/a.py", "from megatron_moe.convert import hf"),
        ("megatron_moe/analysis/a.py", "from megatron_moe.planning import memory"),
        ("megatron_moe/training/a.py", "from megatron_moe.inference import generation"),
        ("megatron_moe/training/a.py", "from tools import generate"),
        ("megatron_moe/training/a.py", "import tests.support.pool"),
        ("megatron_moe/unplanned/a.py", "from megatron_moe.moe import layer"),
        ("megatron_moe/convert/modeling/a.py", "from megatron_moe.errors import UsageError"),
        ("megatron_moe/convert/modeling/a.py", "from ..model import LazyTensor"),
        ("megatron_moe/convert/modeling/a.py", "import numpy"),
        ("fused_kernels/reference/a.py", "import numpy"),
        ("fused_kernels/reference/a.py", "from megatron_moe.moe import layer"),
        ("tools/a.py", "from tools.b import helper"),
    ],
)
def test_import_against_the_direction(tmp_path: Path, path: str, statement: str) -> None:
    plant(tmp_path, path, f"def later() -> None:\n    {statement}\n")
    assert rules(tmp_path) == [(path, 3, "import")]


def test_import_by_string(tmp_path: Path) -> None:
    body = 'import importlib\nimportlib.import_module("megatron_moe.training.step")\n'
    plant(tmp_path, "megatron_moe/model/a.py", body)
    assert rules(tmp_path) == [("megatron_moe/model/a.py", 3, "import")]


@pytest.mark.parametrize(
    "statement",
    [
        "from megatron.core import parallel_state",
        "from megatron.core import parallel_state as mpu",
        "from megatron.core.parallel_state import get_tensor_model_parallel_rank",
        "import megatron.core.parallel_state",
    ],
)
@pytest.mark.parametrize("path", ["megatron_moe/moe/a.py", "tools/a.py", "pretrain_openmoe.py"])
def test_global_groups_stay_in_parallel(tmp_path: Path, path: str, statement: str) -> None:
    plant(tmp_path, path, statement + "\n")
    assert rules(tmp_path) == [(path, 2, "parallel-state")]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "value = eval(text)",
        "exec(text)",
        "import torch as t; t.load(path)",
        "from torch import load as read; read(path)",
        "import torch; torch.save(state, path)",
        "import yaml; yaml.load(text)",
        "import subprocess; subprocess.run(text, shell=True)",
        "import os; os.system(text)",
        "import numpy as np; np.load(path, allow_pickle=True)",
    ],
)
def test_forbidden(tmp_path: Path, line: str) -> None:
    plant(tmp_path, "tools/a.py", line + "\n")
    assert rules(tmp_path) == [("tools/a.py", 2, "forbidden")]


def test_harmless_namesakes_and_test_code_are_free(tmp_path: Path) -> None:
    plant(tmp_path, "tools/a.py", "model.eval()\nimport json; json.load(file)\n")
    plant(tmp_path, "tools/b.py", "import subprocess; subprocess.run(words, shell=False)\n")
    plant(tmp_path, "tests/test_a.py", "import pickle\nfrom megatron.core import parallel_state\n")
    assert check(tmp_path) == []


def test_docstring(tmp_path: Path) -> None:
    plant(tmp_path, "bench/a.py", "x = 1\n", head="")
    plant(tmp_path, "bench/empty.py", "", head="")
    assert rules(tmp_path) == [("bench/a.py", 1, "docstring")]


def test_the_size_rule() -> None:
    assert (FILE_TARGET, FILE_LIMIT, FUNCTION_TARGET, FUNCTION_LIMIT) == (350, 500, 40, 80)


def sized(findings: list[Finding]) -> list[tuple[str, bool]]:
    """Rule and severity of each finding."""
    return [(finding.rule, finding.error) for finding in findings]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (FILE_TARGET, []),
        (FILE_TARGET + 1, [("file-size", False)]),
        (FILE_LIMIT, [("file-size", False)]),
        (FILE_LIMIT + 1, [("file-size", True)]),
    ],
)
def test_file_size(tmp_path: Path, lines: int, expected: list[tuple[str, bool]]) -> None:
    plant(tmp_path, "tests/test_a.py", "x = 1\n" * (lines - 1))
    assert sized(check(tmp_path)) == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (FUNCTION_TARGET, []),
        (FUNCTION_TARGET + 1, [("function-size", False)]),
        (FUNCTION_LIMIT, [("function-size", False)]),
        (FUNCTION_LIMIT + 1, [("function-size", True)]),
    ],
)
def test_function_size(tmp_path: Path, lines: int, expected: list[tuple[str, bool]]) -> None:
    docstring = '    """Says.\n\n    More.\n    """\n'
    body = f"class C:\n  async def f(self) -> None:\n{docstring}" + "    x = 1\n" * (lines - 1)
    plant(tmp_path, "tools/a.py", body)
    assert sized(check(tmp_path)) == expected


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("from megatron_moe.parallel.launch import _store", 2),
        ("from megatron_moe.parallel.launch import Ranks, _store as store", 2),
        ("from ..parallel.launch import _store", 2),
        ("from megatron_moe.parallel._launch import store", 2),
        ("import megatron_moe.parallel._launch", 2),
        ("from megatron_moe.parallel import launch\nlaunch._store()", 3),
        ("from megatron_moe.parallel import launch as start\nkey = start.Ranks._key", 3),
        ("import megatron_moe.parallel.launch\nmegatron_moe.parallel.launch._store()", 3),
        ("from ..parallel.launch import Ranks\ndef f():\n    return Ranks._key", 4),
    ],
)
def test_private_name_of_another_module(tmp_path: Path, body: str, line: int) -> None:
    plant(tmp_path, "megatron_moe/training/a.py", body + "\n")
    assert rules(tmp_path) == [("megatron_moe/training/a.py", line, "private")]
    (finding,) = check(tmp_path)
    assert "megatron_moe.parallel." in finding.message


def test_private_names_that_are_free(tmp_path: Path) -> None:
    """One's own, of other projects, private modules in their package, and anything in tests."""
    own = "class A:\n    def f(self, other: 'A'):\n        return self._x, other._x, A._y\n"
    plant(tmp_path, "megatron_moe/moe/a.py", f"import torch\ntorch._foreach_norm([])\n{own}")
    plant(tmp_path, "megatron_moe/moe/b.py", "from megatron_moe import moe\nmoe.__name__\n")
    plant(tmp_path, "bench/a.py", "from bench._cases import case\n")
    plant(tmp_path, "bench/b.py", "from . import _cases\n_cases.case()\n")
    plant(tmp_path, "tests/test_a.py", "from megatron_moe.moe.a import _x\n")
    assert check(tmp_path) == []


def test_import_cycle(tmp_path: Path) -> None:
    plant(tmp_path, "megatron_moe/moe/a.py", "from megatron_moe.moe import b\n")
    plant(tmp_path, "megatron_moe/moe/b.py", "def f():\n    from .c import x\n")
    plant(tmp_path, "megatron_moe/moe/c.py", "import megatron_moe.moe.a\n")
    plant(tmp_path, "megatron_moe/moe/d.py", "from megatron_moe.moe.a import x\n")
    (finding,) = check(tmp_path)
    assert (finding.rule, finding.error) == ("cycle", True)
    names = finding.message.removeprefix("import cycle: ").split(" -> ")
    after = {"a": "b", "b": "c", "c": "a"}
    assert len(names) == 4
    assert all(after[one[-1]] == next_[-1] for one, next_ in pairwise(names))
    assert finding.path == f"megatron_moe/moe/{names[0][-1]}.py"
    assert finding.line == (3 if names[0].endswith("b") else 2)


def test_two_cycles_are_two_findings(tmp_path: Path) -> None:
    for one, two in (("a", "b"), ("c", "d")):
        plant(tmp_path, f"megatron_moe/moe/{one}.py", f"from .{two} import x\n")
        plant(tmp_path, f"megatron_moe/moe/{two}.py", f"from .{one} import x\n")
    assert [rule for _, _, rule in rules(tmp_path)] == ["cycle", "cycle"]


def test_imports_for_annotations_are_no_cycle(tmp_path: Path) -> None:
    head = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
    plant(tmp_path, "megatron_moe/moe/a.py", f"{head}    from megatron_moe.moe.b import B\n")
    plant(tmp_path, "megatron_moe/moe/b.py", "from megatron_moe.moe.a import A\n")
    assert check(tmp_path) == []
    plant(tmp_path, "megatron_moe/moe/a.py", f"{head}    import torch\nfrom .b import B\n")
    assert [rule for _, _, rule in rules(tmp_path)] == ["cycle"]


def test_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path, "megatron_moe/__init__.py", "")
    for number in range(1, 11):
        function = 'def f():\n    """Doc."""\n' + "    x = 1\n" * number
        plant(tmp_path, f"megatron_moe/moe/m{number}.py", function)
    plant(tmp_path, "tools/a.py", "x = 1\n" * 100)
    plant(tmp_path, "tests/test_a.py", "x = 1\n" * 100)
    assert main(["--sizes", str(tmp_path)]) == 0
    # Ten files of 4 to 13 lines, each with one function of 2 to 11 lines without its docstring.
    assert capsys.readouterr().out == (
        "| lines per | number | median | p90 | maximum |\n"
        "|---|---|---|---|---|\n"
        "| file | 10 | 8 | 12 | 13 |\n"
        "| function | 10 | 6 | 10 | 11 |\n"
    )


def test_exit_code_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path, "tools/a.py", "x = 1\n" * FILE_TARGET)
    assert main([str(tmp_path)]) == 0
    plant(tmp_path, "tools/b.py", "import pickle\n")
    assert main([str(tmp_path)]) == 1
    report = capsys.readouterr().out
    assert "tools/b.py:2: error: pickle" in report
    assert report.endswith("architecture: 1 errors, 1 warnings\n")
