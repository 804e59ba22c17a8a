"""Damaged files of other programs: refused in words, or read; never another error, nor much memory.

Each case is a small checkpoint of which one file is changed: bits flipped, cut, joined with itself;
in JSON also values replaced by others of any kind.
"""

from __future__ import annotations

import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe.analysis.foreign import open_foreign
from megatron_moe.convert.formats import ConversionTarget, read, write
from megatron_moe.errors import UsageError
from tests.analysis import families
from tests.convert.cases import CONFIG, model_of
from tests.convert.test_llama import CONFIG as LLAMA
from tests.convert.test_llama import save as save_llama
from tests.convert.test_llama import weights
from tests.fuzz.mutation import damaged, replaced

MEMORY = 1 << 30
"""Bytes that all of one case's attempts may add to the process's peak."""


def survive(path: Path, opened: Callable[[], object], times: int = 150) -> None:
    """Damage one file again and again; opening gives something or says what is wrong."""
    source, good = random.Random(path.name), path.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    attempts = [*damaged(good, source, times)]
    if path.suffix == ".json":
        attempts += replaced(good, source, times)
    for data in attempts:
        path.write_bytes(data)
        try:
            opened()
        except UsageError:
            refused += 1
    assert refused > len(attempts) // 3
    path.write_bytes(good)
    opened()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def contents(format_name: str, path: Path, config: Any = None) -> None:
    """Open, and read every tensor."""
    for tensor in read(format_name, path, config=config).tensors.values():
        tensor.digest()


@pytest.fixture(params=["stacked", "unstacked"])
def openmoe(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    target = ConversionTarget(
        format="hf", path=tmp_path / "hf", layout=request.param, max_shard=20_000
    )
    write(model_of(), target, lambda _: None)
    return tmp_path / "hf"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_of_hugging_face(openmoe: Path, name: str) -> None:
    survive(openmoe / name, lambda: contents("hf", openmoe))


def test_llama(tmp_path: Path) -> None:
    config = {**LLAMA, "rope_parameters": {"rope_theta": 300.0}, "head_dim": 8}
    directory = save_llama(tmp_path / "llama", config, weights(LLAMA))
    survive(directory / "config.json", lambda: contents("hf", directory))


def test_safetensors(openmoe: Path) -> None:
    survive(min(openmoe.glob("*.safetensors")), lambda: contents("hf", openmoe))


def test_pytorch_s_own(tmp_path: Path) -> None:
    write(model_of(), ConversionTarget(format="hf", path=tmp_path / "hf"), lambda _: None)
    file = tmp_path / "hf/model.safetensors"
    torch.save(load_file(file), tmp_path / "hf/pytorch_model.bin")
    file.unlink()
    survive(tmp_path / "hf/pytorch_model.bin", lambda: read("hf", tmp_path / "hf"))


@pytest.mark.parametrize("name", ["checkpoint", "target.decoder.decoder_norm.scale/.zarray"])
def test_t5x(tmp_path: Path, name: str) -> None:
    write(model_of(), ConversionTarget(format="t5x", path=tmp_path / "t5x"), lambda _: None)
    survive(tmp_path / "t5x" / name, lambda: contents("t5x", tmp_path / "t5x", CONFIG))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek", "deepseek_v3"])
def test_other_programs_mixtures(tmp_path: Path, kind: str) -> None:
    families.save(families.make(kind), tmp_path)
    survive(tmp_path / "config.json", lambda: open_foreign(tmp_path), 60)
