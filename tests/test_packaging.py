"""Installation: pins that cover every requirement, a complete wheel, commands that start."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TREES = ("megatron_moe", "fused_kernels", "tools")
FILES = ("setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "Makefile")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def environment(python: str) -> dict[str, str]:
    """Marker values of one Python release."""
    return {"python_version": python, "python_full_version": f"{python}.0"}


def pins(python: str) -> dict[str, str]:
    """Name and version of each line of constraints.txt that holds for one Python release."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice for Python {python}"
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            found[name] = specifier.version
    return found


def installed_closure(root: str, extras: set[str]) -> set[str]:
    """Names of all distributions that ``root`` with ``extras`` needs, in this environment."""
    names: set[str] = set()
    queue = [(root, extras)]
    while queue:
        name, wanted = queue.pop()
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": e}) for e in wanted | {""}):
                continue
            needed = canonicalize_name(requirement.name)
            # torch pins its own CUDA libraries exactly, and only some of its builds have them.
            if name == "torch" and needed.startswith(("nvidia-", "cuda-", "triton")):
                continue
            if needed not in names:
                names.add(needed)
                queue.append((needed, requirement.extras))
    return names


@pytest.mark.parametrize("python", PYTHONS)
def test_each_python_has_one_pin_per_package(python: str) -> None:
    assert set(pins(python)) == set(pins("3.11"))


def test_every_requirement_is_pinned_to_what_is_installed() -> None:
    pinned = pins(f"{sys.version_info.major}.{sys.version_info.minor}")
    needed = installed_closure("megatron-moe", {"dev"})
    assert "megatron-core" in needed
    assert "ruff" in needed
    assert not needed - set(pinned), "constraints.txt lacks these"
    versions = {name: importlib.metadata.version(name).split("+")[0] for name in needed}
    assert versions == {name: pinned[name] for name in needed}


def test_documentation_tools_are_pinned_but_not_part_of_setup() -> None:
    names = {
        extra: {canonicalize_name(Requirement(text).name) for text in requirements(extra)}
        for extra in ("docs", "dev")
    }
    assert {"mkdocs", "mkdocs-material", "mkdocstrings"} <= names["docs"]
    assert not names["docs"] & names["dev"]
    for python in PYTHONS:
        assert names["docs"] <= set(pins(python))


def requirements(extra: str) -> list[str]:
    """The requirements of an extra, from setup.py itself rather than from what is installed."""
    import_module("setuptools")  # brings distutils where Python no longer has it
    run_setup = import_module("distutils.core").run_setup
    found: list[str] = run_setup(str(ROOT / "setup.py"), stop_after="init").extras_require[extra]
    return found


def test_no_requirement_is_the_impostor_of_apex() -> None:
    """NVIDIA's Apex is not on the package index; what is there under that name is unrelated."""
    names = {Requirement(r).name for r in importlib.metadata.requires("megatron-moe") or []}
    assert "apex" not in names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources."""
    copy = tmp_path_factory.mktemp("source")
    for tree in TREES:
        shutil.copytree(ROOT / tree, copy / tree, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*FILES, "pretrain_openmoe.py"):
        shutil.copy(ROOT / file, copy / file)
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(copy / "dist"), str(copy)], check=True)
    (built,) = (copy / "dist").glob("*.whl")
    return built


def test_wheel_holds_every_module(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl"), "nothing is compiled"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    expected = {"pretrain_openmoe.py"}
    for tree in TREES:
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / tree).rglob("*.py")}
        expected |= {re.sub("^tools/", "megatron_moe_tools/", name) for name in sources}
    assert names == expected


def test_wheel_holds_every_mixture(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".toml")}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_moe").rglob("*.toml")}
    assert names == expected
    assert expected


def test_wheel_holds_the_sources_of_what_is_compiled_later(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if "/native/src/" in name}
    sources = (ROOT / "fused_kernels/native/src").iterdir()
    expected = {str(path.relative_to(ROOT)) for path in sources}
    assert names == expected
    assert expected


def test_installed_commands_start_anywhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(site)]
    subprocess.run([*command, str(wheel)], check=True)
    commands = sorted(path.name for path in (site / "bin").iterdir())
    assert commands == [
        "openmoe-analyze",
        "openmoe-check-environment",
        "openmoe-convert",
        "openmoe-dry-run",
        "openmoe-evaluate",
        "openmoe-generate",
        "openmoe-inspect-checkpoint",
        "openmoe-inspect-data",
        "openmoe-merge-datasets",
        "openmoe-plan",
        "openmoe-preprocess",
        "openmoe-pretrain",
        "openmoe-torchrun",
        "openmoe-train-tokenizer",
    ]
    for name in commands:
        done = subprocess.run(
            [sys.executable, str(site / "bin" / name), "--help"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), f"{name}: {done.stderr}"
        assert "usage: " in done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make setup` reads, in a folder of its own."""
    for file in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def script(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make` in ``folder``, undisturbed by a `make` above this test."""
    clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    command = ["make", *arguments]
    return subprocess.run(
        command, cwd=folder, env=clean, capture_output=True, text=True, check=False
    )


def test_old_python_is_an_error_in_one_line(checkout: Path) -> None:
    # The real interpreter, made to believe that it is an old one.
    pretend = "import sys; sys.version_info = (3, 8, 1)"
    body = f"""
case "$1" in
  --version) echo "Python 3.8.1" ;;
  -c) exec {sys.executable} -c "{pretend}; $2" ;;
esac
"""
    done = make(checkout, "setup", f"PYTHON={script(checkout / 'python3', body)}")
    assert done.returncode == 2
    line = done.stderr.splitlines()[0]
    python = checkout / "python3"
    assert f"PYTHON must be Python 3.10 or newer (got '{python}': Python 3.8.1); try: " in line
    assert not (checkout / ".venv").exists()


def test_setup_installs_once_and_again_when_a_pin_changes(checkout: Path) -> None:
    """A stand-in for the venv's Python writes down what it was asked to install."""
    script(checkout / ".venv/bin/python", 'echo "$@" >> calls\n')
    for _ in range(2):
        assert make(checkout, "setup").returncode == 0
    calls = (checkout / "calls").read_text().splitlines()
    assert len(calls) == 2
    assert all("--constraint constraints.txt" in call for call in calls)
    # Not on Python's path: Megatron-Core imports it wherever it finds it.
    assert "--no-deps" in calls[1] and "--target .venv/transformer-engine" in calls[1]
    with (checkout / "constraints.txt").open("a") as pinned:
        pinned.write("# changed\n")
    assert make(checkout, "setup").returncode == 0
    assert len((checkout / "calls").read_text().splitlines()) == 4
