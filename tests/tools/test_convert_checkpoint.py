"""The command line: what it prints, what it verifies, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe.checkpoint import load_logical, verify
from megatron_moe.convert.formats import Target, read, write
from tests.checkpoint.test_load import _save
from tests.convert.cases import model_of
from tests.convert.layout_pairs import OneWidth
from tests.support.pool import Pool
from tools.convert_checkpoint import main


def convert(source: str, load: Path, target: str, save: Path, *more: str) -> int:
    flags = ["--from", source, "--load", str(load), "--to", target, "--save", str(save)]
    return main([*flags, *more])


@pytest.fixture
def native(tmp_path: Path) -> Path:
    write(model_of(), Target(format="native", path=tmp_path / "native"), lambda _: None)
    return tmp_path / "native"


def test_there_and_back_verified(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--verify-logits", "--max-shard-size", "0.00001", "--expert-layout", "unstacked")
    assert convert("native", native, "hf", tmp_path / "hf", *more) == 0
    said = capsys.readouterr().out
    assert "verified: 49 tensors have the same shape, type and SHA-256" in said
    assert "verified: logits of 8 tokens are the same" in said
    assert convert("hf", tmp_path / "hf", "native", tmp_path / "back", "--verify") == 0
    verify(tmp_path / "back")
    first, second = dict(load_logical(native)), dict(load_logical(tmp_path / "back"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_what_a_parallel_run_saved_is_converted(pool: Pool, tmp_path: Path) -> None:
    """Blocks of four ranks, experts and halves of gates spread over them, and optimizer state."""
    flags = {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    }
    pool.run(_save, 4, case=OneWidth(4, flags), directory=tmp_path / "run")
    assert convert("native", tmp_path / "run", "hf", tmp_path / "hf", "--verify") == 0
    found = read("hf", tmp_path / "hf").tensors
    for name, tensor in load_logical(tmp_path / "run"):
        assert torch.equal(found[name].whole(), tensor), name
    # And without optimizer state, as a checkpoint of our own again.
    assert convert("native", tmp_path / "run", "native", tmp_path / "bare") == 0
    assert list(load_logical(tmp_path / "bare", kind="exp_avg")) == []


def test_a_dry_run_lists_and_writes_nothing(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("native", native, "hf", tmp_path / "hf", "--dtype", "bf16", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model.layers.1.mlp.experts.wi_gate  [4, 16, 48]  bfloat16  6144 bytes" in lines
    assert lines[-1].endswith("nothing was written")
    assert not (tmp_path / "hf").exists()


def test_verification_fails_on_a_changed_value(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools import convert_checkpoint

    assert convert("native", native, "hf", tmp_path / "hf") == 0
    file = tmp_path / "hf/model.safetensors"
    values = load_file(file)
    values["lm_head.weight"][2, 1] += 1
    save_file(values, file)
    model, target = read("native", native), Target(format="hf", path=tmp_path / "hf")
    with pytest.raises(Exception, match=r"output\.weight in .* other values"):
        convert_checkpoint.verify(model, target, logits=False)
    assert convert_checkpoint.logits_difference(model, read("hf", tmp_path / "hf")) > 0


def test_mistakes_are_one_line_and_exit_2(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    cases = [
        (("native", tmp_path / "absent", "hf", tmp_path / "x"), "checkpoint directory"),
        (("native", native, "hf", tmp_path / "there"), "--save is"),
        (("hf", native, "native", tmp_path / "x"), "config.json"),
        (("native", native, "hf", tmp_path / "x", "--max-shard-size", "0"), "--max-shard-size"),
        (("native", native, "hf", tmp_path / "x", "--ckpt-step", "77"), "--ckpt-step is 77"),
        (("native", native, "hf", tmp_path / "x", "--tokenizer-model", "no"), "--tokenizer-model"),
    ]
    for arguments, said in cases:
        assert convert(*arguments) == 2  # type: ignore[arg-type]
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("convert_checkpoint.py: error: ")
        assert said in lines[0]
    assert not (tmp_path / "x").exists()
