"""A router, a drop policy and a dispatcher are each one new file: registered, and found by name."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.moe.toys.drop_policy  # noqa: F401
from megatron_moe.config import MoEConfig, RunConfig
from megatron_moe.config.moe import added
from megatron_moe.errors import UsageError
from megatron_moe.model.reference.routing import route
from megatron_moe.moe import collect_statistics
from megatron_moe.moe.registry import Registry
from tests.moe.cases import (
    DTYPE,
    HIDDEN,
    layer_of,
    model_config,
    moe_config,
    set_loss_scale,
    tokens,
    watched,
)
from tests.moe.ranks import check_layout
from tests.moe.toys.dispatcher import Indexing
from tests.moe.toys.router import SigmoidRouter
from tests.support.pool import Pool

ROOT = Path(__file__).resolve().parents[2]
TOYS = ROOT / "tests" / "moe" / "toys"
LN_3 = 1.0986122886681098


def test_a_registered_router_chooses() -> None:
    """sigmoid(0, ln 3, -ln 3) is (1/2, 3/4, 1/4): divided by the sum (1/3, 1/2, 1/6)."""
    layer = layer_of(moe_config(moe_router_type="toy", num_experts=3))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = torch.tensor([0.0, LN_3, -LN_3])
    seen = watched(layer)
    layer(torch.ones(2, 1, HIDDEN, dtype=DTYPE))
    scores = seen[0].scores
    assert scores.choices_TK.tolist() == [[1, 0]] * 2
    torch.testing.assert_close(scores.probs_TE, torch.tensor([[1 / 3, 1 / 2, 1 / 6]] * 2).to(DTYPE))
    torch.testing.assert_close(scores.weights_TK, torch.tensor([[1 / 2, 1 / 3]] * 2).to(DTYPE))


def test_losses_statistics_and_gradients_work_on_the_scores_of_a_registered_router() -> None:
    layer = layer_of(moe_config(moe_router_type="toy"))
    set_loss_scale(1.0)
    seen = watched(layer)
    layer(tokens(1)).square().sum().backward()
    scores, statistics = seen[0].scores, collect_statistics([layer], None)[3]
    assert list(statistics.load) == scores.choices_TK.flatten().bincount(minlength=4).tolist()
    assert statistics.z_loss == pytest.approx(scores.log_z_T.square().mean().item())
    assert layer.router.weight.grad is not None
    assert (layer.router.weight.grad.abs().sum(1) > 0).all()


def test_a_registered_router_scores_low_precision_tokens_in_fp32() -> None:
    router = SigmoidRouter(model_config(), moe_config(), params_dtype=torch.bfloat16)
    router.reset_parameters(torch.Generator().manual_seed(0))
    x_TH = tokens(3).view(-1, HIDDEN).bfloat16()
    scores, x_after = router(x_TH)
    dtypes = {name: value.dtype for name, value in vars(scores).items() if value is not None}
    assert dtypes.pop("choices_TK") == torch.int64
    assert set(dtypes.values()) == {torch.float32}
    assert x_after.dtype == torch.bfloat16
    torch.testing.assert_close(scores.logits_TE, x_TH.float() @ router.weight.float().t())


def test_a_registered_drop_policy_decides_which_choices_keep_a_slot() -> None:
    """Of choices of one expert in a row, the last three of twelve keep a slot."""
    layer = layer_of(moe_config(moe_token_drop_policy="toy", moe_router_topk=1))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 5.0
    seen = watched(layer)
    layer(tokens(5).abs())
    kept_SB = seen[0].kept_TK.view(12, 2)
    assert kept_SB.sum(0).tolist() == [3, 3]
    assert kept_SB[-3:].all()


def test_a_registered_dispatcher_moves_the_tokens() -> None:
    """The toy has the results and gradients of the built-in one."""
    results = []
    for settings in ({}, {"moe_token_dispatcher_type": "toy"}):
        layer = layer_of(moe_config(**settings))
        x = tokens(2).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    assert type(layer.dispatcher) is Indexing
    torch.testing.assert_close(results[1], results[0])


def check_toys(rank: int, world_size: int, **layout: Any) -> int:
    """`check_layout`, in a process that has the toys, as this module imports them."""
    return check_layout(rank, world_size, **layout)


@pytest.mark.parametrize("setting", ["router_type", "token_drop_policy", "token_dispatcher_type"])
@pytest.mark.parametrize(("tp", "ep", "etp"), [(2, 1, 2), (2, 2, 1), (1, 2, 1)])
def test_each_has_the_results_of_one_process_on_every_layout(
    pool: Pool, setting: str, tp: int, ep: int, etp: int
) -> None:
    settings = {f"moe_{setting}": "toy"}
    assert sum(pool.run(check_toys, 2, tp=tp, ep=ep, etp=etp, settings=settings)) > 0


@pytest.mark.parametrize(
    ("moe", "error"),
    [
        (MoEConfig(moe_router_type="toy"), "--moe-router-type must be linear or cont"),
        (MoEConfig(moe_token_drop_policy="toy"), "--moe-token-drop-policy must be one of position"),
    ],
)
def test_the_reference_model_rejects_what_it_does_not_implement(moe: MoEConfig, error: str) -> None:
    """It would otherwise evaluate another model than the one that was trained."""
    with pytest.raises(UsageError, match=error):
        route(torch.zeros(4, moe.num_experts), 1, moe, 0, training_capacity=True)


PROGRAM = """
import dataclasses, json, sys
from megatron_moe.config.cli import parse_args
from megatron_moe.config import RunConfig
command = parse_args(sys.argv[1:])
assert "torch" not in sys.modules
saved = command.config.to_dict()
config = RunConfig.from_dict(json.loads(json.dumps(saved)), "test")
import torch
from megatron_moe.moe import MoELayer
layer = MoELayer(config.model, config.moe, layer_number=0, num_moe_layers=1)
layer.reset_parameters(0)
seen = []
layer.on_routing = seen.append
layer(torch.randn(8, 2, config.model.hidden_size)).sum().backward()
objects = type(layer.router), type(layer.dispatcher), layer.dispatcher.slot_rule.policy
print(json.dumps([saved["moe"], [o.__module__ for o in objects], [o.__name__ for o in objects]]))
"""
FLAGS = ["--moe-router-type", "--moe-token-drop-policy", "--moe-token-dispatcher-type"]
FOLDERS = {"router": "routers", "drop_policy": "drop_policies", "dispatcher": "dispatchers"}
"""Where a contributor puts the file of each toy."""


def examples() -> list[str]:
    """The code blocks of the section of CONTRIBUTING.md: a drop policy, and its test."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (section,) = re.findall(r"^## Add a router, drop policy .*?(?=^## )", text, re.M | re.S)
    blocks = re.findall(r"^ *```python\n(.*?)^ *```$", section, re.M | re.S)
    return [textwrap.dedent(block) for block in blocks]


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources and tests, with files added and no line changed."""
    root = tmp_path_factory.mktemp("tree")
    for package in ("megatron_moe", "fused_kernels", "tests/moe", "tests/support"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, root / package, ignore=ignore)
    for file in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py"):
        shutil.copy(ROOT / file, root / file)
    moe = root / "megatron_moe" / "moe"
    for kind, folder in FOLDERS.items():
        shutil.copy(TOYS / f"{kind}.py", moe / folder / "toy.py")
    policy, test = examples()
    (moe / "drop_policies" / "newest.py").write_text(policy)
    (root / "tests" / "moe" / "test_newest.py").write_text(test)
    return root


def _run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    # A wide terminal: the help must not wrap the values of a flag.
    environment = {**os.environ, "COLUMNS": "1000"}
    command = (sys.executable, *command)
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )


def test_one_new_file_each_is_found_by_its_name(extended: Path) -> None:
    done = _run(extended, "-c", PROGRAM, *(part for flag in FLAGS for part in (flag, "toy")))
    assert done.returncode == 0, done.stderr
    saved, modules, names = json.loads(done.stdout)
    folders = ("routers", "dispatchers", "drop_policies")
    assert modules == [f"megatron_moe.moe.{folder}.toy" for folder in folders]
    assert names == ["SigmoidRouter", "Indexing", "last_first"]
    assert [saved[flag[2:].replace("-", "_")] for flag in FLAGS] == ["toy"] * 3


@pytest.mark.slow
def test_without_flags_the_built_in_ones_stay(extended: Path) -> None:
    done = _run(extended, "-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    saved, _, names = json.loads(done.stdout)
    assert names == ["Router", "TokenDispatcher", "by_position"]
    assert saved == RunConfig().to_dict()["moe"]


def test_the_help_lists_the_new_values(extended: Path) -> None:
    done = _run(extended, "-c", PROGRAM, "--help")
    for flag, built_in in zip(FLAGS, ("linear", "position,probs", "alltoall"), strict=True):
        (values,) = re.findall(flag + r" \{([\w,]+)\}", done.stdout)
        assert values.startswith(f"{built_in},")
        assert "toy" in values.split(",")


def test_a_saved_run_whose_router_was_removed_is_one_error_with_the_valid_values(
    tmp_path: Path,
) -> None:
    path = tmp_path / "config.json"
    RunConfig(moe=MoEConfig(moe_router_type="no file")).save(path)
    with pytest.raises(UsageError) as error:
        RunConfig.load(path)
    valid = " or ".join(map(repr, ("linear", *added(ROOT / "megatron_moe" / "moe" / "routers"))))
    expected = f"moe_router_type in moe of {path} must be {valid} (got 'no file')"
    assert str(error.value) == expected


@pytest.mark.parametrize(
    "test",
    [
        "test_the_last_choices_of_a_group_keep_their_slots",
        # Starts a pool of its own, as the ranks must find the file in the copied tree.
        pytest.param("test_drops_do_not_depend_on_the_layout", marks=pytest.mark.slow),
    ],
)
def test_the_example_of_the_contributing_guide_passes_its_own_test(
    extended: Path, test: str
) -> None:
    done = _run(extended, "-m", "pytest", "-v", f"tests/moe/test_newest.py::{test}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_the_example_of_the_contributing_guide_passes_the_linter(
    extended: Path, command: list[str]
) -> None:
    files = ["megatron_moe/moe/drop_policies/newest.py", "tests/moe/test_newest.py"]
    done = _run(extended, "-m", "ruff", *command, "--no-cache", *files)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_of_the_contributing_guide_is_annotated() -> None:
    """As mypy demands of the project (`disallow_untyped_defs`)."""
    functions = [
        node
        for example in examples()
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(functions) == 3
    for function in functions:
        assert function.returns is not None
        assert all(argument.annotation is not None for argument in function.args.args)


def test_the_names_are_those_of_the_files(tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "__init__.py", "notes.txt"):
        (tmp_path / name).touch()
    assert added(tmp_path) == ("a", "b")
    assert added(tmp_path / "missing") == ()


def test_a_name_without_a_file_and_a_name_that_is_taken() -> None:
    registry: Registry[int] = Registry("routers", one=1)
    assert registry["one"] == 1
    with pytest.raises(LookupError, match=r"moe/routers/two\.py must exist and register 'two'"):
        registry["two"]
    registry.register("two")(2)
    assert registry["two"] == 2
    enter = registry.register("two")
    with pytest.raises(ValueError, match="'two' is already registered in moe/routers"):
        enter(3)


def test_a_file_that_fails_to_import_is_not_a_missing_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from megatron_moe.moe import routers

    (tmp_path / "broken.py").write_text("import no_such_library\n")
    (tmp_path / "silent.py").touch()
    monkeypatch.setattr(routers, "__path__", [str(tmp_path)])
    registry: Registry[int] = Registry("routers")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        registry["broken"]
    with pytest.raises(LookupError, match="silent"):
        registry["silent"]
