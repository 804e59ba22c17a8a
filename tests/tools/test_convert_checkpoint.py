"""The command line: what it prints, what it verifies, what it refuses."""

from __future__ import annotations

import hashlib
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe.checkpoint import load_logical, read_identity, verify
from megatron_moe.convert import inspection
from megatron_moe.convert.formats import ConversionTarget, read, write
from megatron_moe.convert.hf import hf_tensors
from megatron_moe.errors import CheckpointError
from tests.checkpoint.test_load import _save
from tests.convert.cases import model_of
from tests.convert.layout_pairs import OneWidth
from tests.data.pieces import train
from tests.support.pool import Pool
from tools.convert_checkpoint import main


def convert(source: str, load: Path, target: str, save: Path, *more: str) -> int:
    flags = ["--from", source, "--load", str(load), "--to", target, "--save", str(save)]
    return main([*flags, *more])


@pytest.fixture
def native(tmp_path: Path) -> Path:
    write(model_of(), ConversionTarget(format="native", path=tmp_path / "native"), lambda _: None)
    return tmp_path / "native"


def test_there_and_back_verified(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--verify-logits", "--max-shard-size", "0.00001", "--expert-layout", "unstacked")
    assert convert("native", native, "hf", tmp_path / "hf", *more) == 0
    said = capsys.readouterr().out
    files = "by safetensors header and raw bytes"
    assert f"verified: files of {native} have the SHA-256 of its manifest.json" in said
    assert f"tensors of {tmp_path}/hf, read {files}, equal those of {native}/iter_" in said
    assert "verified: 49 tensors, read back by the converter, have the same SHA-256" in said
    assert "verified: logits of 8 tokens are the same" in said
    assert convert("hf", tmp_path / "hf", "native", tmp_path / "back", "--verify") == 0
    assert "verified: logits of 8 tokens are the same" in capsys.readouterr().out
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
    model, target = read("native", native), ConversionTarget(format="hf", path=tmp_path / "hf")
    said = r"lm_head\.weight in .*hf must be the same in both readings \(got 'other values'\)"
    with pytest.raises(CheckpointError, match=said):
        convert_checkpoint.verify(model, target, hf_tensors(model, "stacked"), target.path)
    said = r"values of output\.weight in .* must be those of .*native"
    with pytest.raises(CheckpointError, match=said):
        inspection.check_same_tensors(model, read("hf", target.path), lambda _: None)
    assert inspection.logits_difference(model, read("hf", tmp_path / "hf")) > 0


def test_mistakes_are_one_line_and_exit_2(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    cases = [
        (("native", tmp_path / "absent", "hf", tmp_path / "x"), "checkpoint directory"),
        (
            ("native", native, "hf", tmp_path / "there"),
            "--save must be a directory that does not exist (got ",
        ),
        (("hf", native, "native", tmp_path / "x"), "--from must be native for "),
        (("native", native, "hf", tmp_path / "x", "--max-shard-size", "0"), "--max-shard-size"),
        (("native", native, "hf", tmp_path / "x", "--ckpt-step", "77"), "--ckpt-step must be "),
        (("native", native, "hf", tmp_path / "x", "--tokenizer-model", "no"), "--tokenizer-model"),
    ]
    for arguments, said in cases:
        assert convert(*arguments) == 2  # type: ignore[arg-type]
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("convert_checkpoint.py: error: ")
        assert said in lines[0]
    assert not (tmp_path / "x").exists()


def test_logits_need_memory(
    native: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine with too little: the rest is verified, or nothing is written if logits must be."""
    size = sum(t.bytes for t in model_of().tensors.values())
    assert size < inspection.memory_needed(model_of()) < 2 * size
    assert inspection.memory_needed(model_of(dtype=torch.bfloat16)) == inspection.memory_needed(
        model_of()
    )
    assert 0 < inspection.free_memory() <= psutil.virtual_memory().total
    monkeypatch.setattr("tools.convert_checkpoint.free_memory", lambda: size)
    assert convert("native", native, "hf", tmp_path / "a", "--verify") == 0
    said = capsys.readouterr().out
    assert "verified: 49 tensors" in said
    assert "logits are not compared: the model needs" in said
    assert convert("native", native, "hf", tmp_path / "b", "--verify-logits") == 2
    assert f"must be <= {size} bytes, the available memory (got " in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_the_bar_ends_at_all_bytes(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = sum(t.bytes for t in model_of().tensors.values())
    assert convert("native", native, "hf", tmp_path / "hf", "--verify") == 0
    bars = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line]
    for name in ("converting", "verifying"):
        assert any(line.startswith(f"{name}: 100%") for line in bars)
    for target in ("native", "hf", "t5x"):
        seen: list[int] = []
        write(
            model_of(), ConversionTarget(format=target, path=tmp_path / f"{target}-2"), seen.append
        )
        assert sum(seen) == size


@pytest.mark.parametrize("target", ["native", "hf", "t5x"])
def test_a_dry_run_of_every_format_writes_nothing(
    native: Path, tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    more = ("--expert-layout", "unstacked") if target == "hf" else ()
    assert convert("native", native, target, tmp_path / "x", "--dry-run", *more) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    write(
        model_of(),
        ConversionTarget(format=target, path=tmp_path / "y", layout="unstacked"),
        lambda _: None,
    )
    assert last.startswith(f"{len(lines)} tensors, {sum(int(x.split()[-2]) for x in lines)} bytes")
    written = {"native": 49, "hf": 49 + 2 * 3 * 3, "t5x": 49}  # 4 experts for a stack
    assert len(lines) == written[target]
    assert (
        sorted(p for p in tmp_path.rglob("*") if (tmp_path / "y") not in (p, *p.parents)) == before
    )


def test_several_are_averaged_and_cast(tmp_path: Path) -> None:
    models = [model_of(seed=seed) for seed in (1, 2, 3)]
    for number, model in enumerate(models):
        write(model, ConversionTarget(format="native", path=tmp_path / str(number)), lambda _: None)
    flags = ["--from", "native", "--load", *(str(tmp_path / str(i)) for i in range(3))]
    flags += ["--to", "hf", "--save", str(tmp_path / "mean"), "--dtype", "bf16", "--verify"]
    assert main(flags) == 0
    for name, tensor in read("hf", tmp_path / "mean").tensors.items():
        each = torch.stack([model.tensors[name].whole().double() for model in models])
        assert torch.equal(tensor.whole(), each.mean(0).float().bfloat16()), name


def test_native_to_native_in_files_of_another_size(native: Path, tmp_path: Path) -> None:
    more = ("--max-shard-size", "0.00001", "--verify")
    assert convert("native", native, "native", tmp_path / "many", *more) == 0
    assert len(list((tmp_path / "many").rglob("*.safetensors"))) > 3
    assert convert("native", tmp_path / "many", "native", tmp_path / "one", "--verify") == 0
    (one,), (first,) = ([*p.rglob("*.safetensors")] for p in (tmp_path / "one", native))
    assert one.read_bytes() == first.read_bytes()


def test_a_way_through_every_format(native: Path, tmp_path: Path) -> None:
    """From `hf` to `t5x` and back too, without our own format between them."""
    model_of().config.save(tmp_path / "config.json")
    known = ("--config", str(tmp_path / "config.json"))
    assert convert("native", native, "hf", tmp_path / "1", "--expert-layout", "unstacked") == 0
    assert convert("hf", tmp_path / "1", "t5x", tmp_path / "2", "--verify") == 0
    assert convert("t5x", tmp_path / "2", "hf", tmp_path / "3", *known, "--verify") == 0
    assert convert("hf", tmp_path / "3", "native", tmp_path / "4", "--verify") == 0
    first, last = dict(load_logical(native)), dict(load_logical(tmp_path / "4"))
    assert first.keys() == last.keys()
    assert all(torch.equal(tensor, last[name]) for name, tensor in first.items())


def test_the_tokenizer_travels(native: Path, tmp_path: Path) -> None:
    """Under one name, whatever the file was called, through every format that keeps files."""
    pieces = tmp_path / "mine.model"
    train(pieces, ["a b c d e f g h"] * 9, vocab_size=12, byte_fallback=False)
    more = ("--tokenizer-model", str(pieces))
    assert convert("native", native, "hf", tmp_path / "1", *more) == 0
    assert convert("hf", tmp_path / "1", "native", tmp_path / "2") == 0
    assert convert("native", tmp_path / "2", "native", tmp_path / "3") == 0
    assert convert("native", tmp_path / "3", "hf", tmp_path / "4") == 0
    pieces_now = pieces.read_bytes()
    pieces.unlink()
    for place in ("1", "2/iter_0000000", "3/iter_0000000", "4"):
        assert (tmp_path / place / "tokenizer.model").read_bytes() == pieces_now
    verify(tmp_path / "3")
    identity = read_identity(tmp_path / "3")
    assert identity.tokenizer_hash == hashlib.sha256(pieces_now).hexdigest()


def test_a_changed_tokenizer_file_is_damage(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = tmp_path / "mine.model"
    train(pieces, ["a b c d e f g h"] * 9, vocab_size=12, byte_fallback=False)
    more = ("--tokenizer-model", str(pieces))
    assert convert("native", native, "native", tmp_path / "1", *more) == 0
    stored = tmp_path / "1/iter_0000005/tokenizer.model"
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    assert convert("native", tmp_path / "1", "hf", tmp_path / "2") == 2
    said = capsys.readouterr().err
    assert "damage in tokenizer.model" in said
    assert said.strip().endswith("another step, with --ckpt-step, may be intact")


def test_a_tokenizer_that_does_not_fit_is_an_error_if_given(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large, other = tmp_path / "large.model", tmp_path / "other.model"
    train(large, ["some words"], vocab_size=280, hard_vocab_limit=False)
    train(other, ["a b c d e f g h"] * 9, vocab_size=12, byte_fallback=False)
    more = ("--tokenizer-model", str(large))
    assert convert("native", native, "hf", tmp_path / "1", *more) == 2
    assert "a tokenizer of <= 96 ids" in capsys.readouterr().err
    assert not (tmp_path / "1").exists()
    more = ("--tokenizer-model", str(other))
    assert convert("native", native, "native", tmp_path / "1", *more) == 0
    train(other, ["h g f e d c b a"] * 9, vocab_size=12, byte_fallback=False, eos_piece="<e>")
    assert convert("native", tmp_path / "1", "native", tmp_path / "2", *more) == 2
    assert "the tokenizer of the checkpoint" in capsys.readouterr().err
