"""Transformer Engine recognised by its files, and where its layers are taken."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config import MoEConfig, ParallelConfig, RunConfig
from megatron_moe.errors import UsageError
from megatron_moe.platform import transformer_engine
from megatron_moe.platform.activation import check_requirements
from megatron_moe.platform.transformer_engine import (
    check_implementation,
    choose_impl,
    installation,
)
from tests.platform.test_requirements import ROOT, activate_with
from tests.support.pool import Pool
from tests.support.transformer_engine import FOLDER
from tests.training.tiny import MODEL, pretrain_rank

INSTALL = "pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]==2.11.0'"


def config_with(moe_expert_impl: Any = "auto", **parallel: Any) -> RunConfig:
    return RunConfig(
        parallel=ParallelConfig(**parallel), moe=MoEConfig(moe_expert_impl=moe_expert_impl)
    )


def install(folder: Path, version: str = "2.11.0", *libraries: str) -> Path:
    """A package with the files by which an installation is recognised; importing it is an error."""
    package = folder / "transformer_engine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise OSError('libcuda.so.1: cannot open')\n")
    metadata = folder / f"transformer_engine-{version}.dist-info"
    metadata.mkdir()
    text = f"Metadata-Version: 2.1\nName: transformer_engine\nVersion: {version}\n"
    (metadata / "METADATA").write_text(text)
    for library in libraries:
        path = folder / library
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return package


BOTH = (
    "transformer_engine/wheel_lib/libtransformer_engine.so",
    "transformer_engine_torch.cpython-311-x86_64-linux-gnu.so",
)


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation with both libraries, found first on the path."""
    found = install(tmp_path, "2.11.0", *BOTH)
    _see(monkeypatch, tmp_path)
    return found


def _see(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    # The pool's ranks and this process hide the package from Megatron-Core on a CPU.
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    monkeypatch.syspath_prepend(str(folder))


def test_the_wheel_without_its_libraries_is_one_line_with_the_command() -> None:
    """The wheel itself, as `pip install transformer-engine` leaves it."""
    shown = activate_with(FOLDER)
    assert shown.stdout == (
        "package transformer-engine must be installed whole, or not at all (got 'version 2.11.0 in"
        f" {FOLDER / 'transformer_engine'} without libtransformer_engine and"
        f" transformer_engine_torch'); {INSTALL} builds the extension against the installed"
        " PyTorch; without --no-build-isolation pip builds it against another one\n"
    )
    assert shown.stderr == ""


def test_megatron_core_would_end_in_a_traceback() -> None:
    """Why it is checked. If this test fails, Megatron-Core may notice it itself."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(FOLDER), str(ROOT)]))
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import megatron.core"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert "RuntimeError: Found empty `transformer-engine` meta package" in ended.stderr


@pytest.mark.parametrize(
    ("there", "missing"), [(BOTH[:1], "transformer_engine_torch"), (BOTH[1:], "libtransformer_eng")]
)
def test_each_library_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], missing: str
) -> None:
    install(tmp_path, "2.11.0", *there)
    _see(monkeypatch, tmp_path)
    with pytest.raises(UsageError) as caught:
        check_requirements()
    assert f"without {missing}" in str(caught.value)


@pytest.mark.parametrize(
    "places",
    [
        BOTH,
        ("libtransformer_engine.so", "transformer_engine_torch.abi3.so"),  # editable
        ("transformer_engine/libtransformer_engine.so", "transformer_engine/" + BOTH[1]),  # built
    ],
)
def test_whole_installations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: tuple[str, ...]
) -> None:
    package = install(tmp_path, "2.11.0+c188b53", *places)
    _see(monkeypatch, tmp_path)
    check_requirements()
    found = installation()
    assert found is not None and found.fits
    assert (found.place, found.version, found.missing) == (package, "2.11.0+c188b53", ())


def test_a_whole_installation_is_hidden_on_a_cpu(tmp_path: Path) -> None:
    """Importing it needs the driver. Megatron-Core passes such an error on."""
    install(tmp_path, "2.11.0", *BOTH)
    assert activate_with(tmp_path).stdout == "active\n"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    command = [sys.executable, "-W", "ignore", "-c", "import megatron.core"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "OSError: libcuda.so.1" in ended.stderr


@pytest.mark.parametrize(
    ("version", "fits"),
    [("2.8.1", False), ("2.9", True), ("2.11.0", True), ("2.12.0", False), ("3.0", False)],
)
def test_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, fits: bool
) -> None:
    install(tmp_path, version, *BOTH)
    _see(monkeypatch, tmp_path)
    chosen = choose_impl(config_with(), "cuda")
    assert chosen.name == ("transformer_engine" if fits else "local")
    assert version in chosen.reason
    if not fits:
        with pytest.raises(UsageError, match=r"is not >= 2\.9 and < 2\.12"):
            choose_impl(config_with(transformer_impl="transformer_engine"), "cuda")


@pytest.mark.usefixtures("whole")
def test_the_choice_and_its_reason() -> None:
    auto, local, asked = (
        config_with(transformer_impl=impl) for impl in ("auto", "local", "transformer_engine")
    )
    names = [
        (choose_impl(config, "cuda").name, choose_impl(config, "cuda").reason)
        for config in (auto, local, asked, config_with("batched"))
    ]
    assert names == [
        ("transformer_engine", "auto: version 2.11.0 is installed"),
        ("local", "as requested"),
        ("transformer_engine", "as requested, version 2.11.0"),
        ("local", "auto: --moe-expert-impl batched is one of local experts"),
    ]
    assert choose_impl(auto, "cpu").reason == "auto: this machine has no CUDA device"
    with pytest.raises(UsageError) as caught:
        choose_impl(asked, "cpu")
    assert str(caught.value) == (
        "--transformer-impl must be local or auto here (got 'transformer_engine'); this machine"
        " has no CUDA device"
    )


def test_a_gpu_without_it() -> None:
    assert choose_impl(config_with(), "cuda").reason == "auto: Transformer Engine is not installed"
    with pytest.raises(UsageError) as caught:
        choose_impl(config_with(transformer_impl="transformer_engine"), "cuda")
    assert str(caught.value) == (
        "--transformer-impl must be local or auto here (got 'transformer_engine'); Transformer"
        f" Engine is not installed; {INSTALL}"
    )


def test_accumulation_needs_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = config_with(gradient_accumulation_fusion=True)
    check_implementation(config_with(), "cpu")
    with pytest.raises(UsageError, match="must be unset without a CUDA device"):
        check_implementation(fused, "cpu")
    with pytest.raises(UsageError) as caught:
        check_implementation(fused, "cuda")
    assert str(caught.value).startswith(
        "--gradient-accumulation-fusion must be unset without the module"
        " fused_weight_gradient_mlp_cuda of NVIDIA's Apex (got True); docs/transformer_engine.md"
    )
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return object() if name == "fused_weight_gradient_mlp_cuda" else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    check_implementation(fused, "cuda")


@pytest.mark.usefixtures("whole")
def test_accumulation_of_transformer_engine_needs_no_apex() -> None:
    fused = config_with(gradient_accumulation_fusion=True)
    check_implementation(fused, "cuda")
    local = replace(fused, parallel=replace(fused.parallel, transformer_impl="local"))
    with pytest.raises(UsageError, match="fused_weight_gradient_mlp_cuda"):
        check_implementation(local, "cuda")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--transformer-impl", "transformer_engine"], "this machine has no CUDA device"),
        (["--gradient-accumulation-fusion"], "must be unset without a CUDA device (got True)"),
    ],
)
def test_a_run_on_a_cpu_ends_on_every_rank(pool: Pool, flags: list[str], line: str) -> None:
    argv = [*MODEL, "--mock-data", *flags, "--train-iters", "9"]
    for code, out, error in pool.run(pretrain_rank, 2, argv=argv):
        assert (code, out) == (2, "")
        assert "\n" not in error.strip()
        assert line in error and flags[0] in error


def test_the_command_installs_what_is_pinned() -> None:
    assert transformer_engine.INSTALL == INSTALL
    assert "transformer-engine[core_cu13,pytorch]==2.11.0" in (ROOT / "setup.py").read_text()
    assert "transformer-engine==2.11.0" in (ROOT / "constraints.txt").read_text().split()
