"""The architecture check sees each planted fault, and the repository itself has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.check_architecture import FILE_TARGET, FUNCTION_TARGET, Finding, check, main

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


def sized(findings: list[Finding]) -> list[tuple[str, bool]]:
    """Rule and severity of each finding."""
    return [(finding.rule, finding.error) for finding in findings]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (FILE_TARGET, []),
        (FILE_TARGET + 1, [("file-size", False)]),
        (2 * FILE_TARGET, [("file-size", False)]),
        (2 * FILE_TARGET + 1, [("file-size", True)]),
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
        (2 * FUNCTION_TARGET, [("function-size", False)]),
        (2 * FUNCTION_TARGET + 1, [("function-size", True)]),
    ],
)
def test_function_size(tmp_path: Path, lines: int, expected: list[tuple[str, bool]]) -> None:
    docstring = '    """Says.\n\n    More.\n    """\n'
    body = f"class C:\n  async def f(self) -> None:\n{docstring}" + "    x = 1\n" * (lines - 1)
    plant(tmp_path, "tools/a.py", body)
    assert sized(check(tmp_path)) == expected


def test_exit_code_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path, "tools/a.py", "x = 1\n" * FILE_TARGET)
    assert main([str(tmp_path)]) == 0
    plant(tmp_path, "tools/b.py", "import pickle\n")
    assert main([str(tmp_path)]) == 1
    report = capsys.readouterr().out
    assert "tools/b.py:2: error: pickle" in report
    assert report.endswith("architecture: 1 errors, 1 warnings\n")
