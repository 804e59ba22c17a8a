"""A router, a drop policy and a dispatcher are each one new file: registered, and found by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.moe.toys.dispatcher
import tests.moe.toys.drop_policy
import tests.moe.toys.router  # noqa: F401
from megatron_moe.config import MoEConfig, RunConfig
from megatron_moe.config.moe import added
from megatron_moe.errors import UsageError
from megatron_moe.model.reference.routing import route
from megatron_moe.moe import MoELayer
from megatron_moe.moe.registry import Registry
from tests.moe.cases import DTYPE, layer_of, model_config, moe_config, tokens, watched

ROOT = Path(__file__).resolve().parents[2]
TOYS = ROOT / "tests" / "moe" / "toys"


class _ToyRouter(MoEConfig):
    moe_router_type = "toy"


class _ToyDispatcher(MoEConfig):
    moe_token_dispatcher_type = "toy"


def _layer(kind: type[MoEConfig], **settings: Any) -> MoELayer:
    moe = kind(**{**vars(moe_config()), **settings})
    layer = MoELayer(model_config(), moe, layer_number=0, num_moe_layers=1, params_dtype=DTYPE)
    layer.reset_parameters(0)
    return layer


def test_a_registered_router_chooses() -> None:
    """Losses, capacity, statistics and gradients work on its scores."""
    layer = _layer(_ToyRouter)
    seen = watched(layer)
    layer(tokens(1)).square().sum().backward()
    expected = [[t % 4, (t + 1) % 4] for t in range(24)]
    assert seen[0].scores.choices_TK.tolist() == expected
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.abs().sum() > 0
    assert layer.statistics.sums[:4].tolist() == [12.0] * 4


def test_a_registered_drop_policy_decides_who_keeps_a_slot() -> None:
    """Of choices of one expert in a row, the last ones stay: second choices before first ones."""
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
    for kind in (MoEConfig, _ToyDispatcher):
        layer = _layer(kind)
        x = tokens(2).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    ("moe", "error"),
    [
        (_ToyRouter(), "--moe-router-type must be softmax"),
        (MoEConfig(moe_token_drop_policy="toy"), "--moe-token-drop-policy must be position or pro"),
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


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with three files more and no line changed."""
    root = tmp_path_factory.mktemp("tree")
    for package in ("megatron_moe", "fused_kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, root / package, ignore=ignore)
    for kind in ("router", "drop_policy", "dispatcher"):
        folder = root / "megatron_moe" / "moe" / kind.replace("policy", "policie")
        shutil.copy(TOYS / f"{kind}.py", f"{folder}s/toy.py")
    return root


def _run(root: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *flags]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


def test_one_new_file_each_is_found_by_its_name(extended: Path) -> None:
    done = _run(extended, *(part for flag in FLAGS for part in (flag, "toy")))
    assert done.returncode == 0, done.stderr
    saved, modules, names = json.loads(done.stdout)
    folders = ("routers", "dispatchers", "drop_policies")
    assert modules == [f"megatron_moe.moe.{folder}.toy" for folder in folders]
    assert names == ["RoundRobin", "Indexing", "last_first"]
    assert [saved[flag[2:].replace("-", "_")] for flag in FLAGS] == ["toy"] * 3


def test_without_flags_the_built_in_ones_stay(extended: Path) -> None:
    done = _run(extended)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[2] == ["Router", "TokenDispatcher", "by_position"]


def test_the_help_lists_the_new_values(extended: Path) -> None:
    done = _run(extended, "--help")
    for values in ("softmax,toy", "position,probs,toy", "alltoall,toy"):
        assert values in "".join(done.stdout.split())


def test_without_a_second_value_there_is_neither_flag_nor_entry() -> None:
    """Files of runs are as they were before routers and dispatchers could be chosen."""
    saved = RunConfig().to_dict()["moe"]
    assert not {"moe_router_type", "moe_token_dispatcher_type"} & saved.keys()
    assert (MoEConfig.moe_router_type, MoEConfig.moe_token_dispatcher_type) == (
        "softmax",
        "alltoall",
    )


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
