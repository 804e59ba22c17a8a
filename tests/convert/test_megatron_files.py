"""Megatron-LM checkpoints as found: other formats, models that are missing here, damaged files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.checkpoint.directory import latest_step
from megatron_moe.convert.formats import read
from megatron_moe.convert.megatron_config import check_same_network, megatron_config
from megatron_moe.convert.pickled import Built, Name, attributes, read_pickle
from megatron_moe.convert.second_reading import verify_source
from megatron_moe.convert.torch_dist import StoredTensor
from megatron_moe.errors import UsageError
from tests.convert.megatron_ranks import ITERATION, MODEL, arguments, save_checkpoint
from tests.support.pool import Pool
from tools.convert_checkpoint import main

STEP = f"iter_{ITERATION:07d}"


@pytest.fixture(scope="module")
def written(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("megatron") / "checkpoints"
    pool.run(save_checkpoint, 1, path=str(path), model=MODEL)
    return path


@pytest.fixture
def found(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def error_of(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The only line, of a command that writes nothing."""
    capsys.readouterr()
    out = path.parent / "out"
    words = f"--from megatron --load {path} --to native --save {out}".split()
    assert main([*words, *flags]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x and "converting" not in x]
    assert not out.exists() or not list(out.iterdir())
    return line.removeprefix("convert_checkpoint.py: error: ")


def test_a_run_an_iteration_and_a_release_are_read(found: Path) -> None:
    assert read("megatron", found).step == ITERATION
    assert read("megatron", found, ITERATION).step == ITERATION
    assert read("megatron", found / STEP).step == ITERATION
    (found / STEP).rename(found / "release")
    (found / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert read("megatron", found).step == ITERATION


def test_other_places_and_formats_are_named(
    found: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(found, capsys, "--ckpt-step", "8")
    assert f"iter_0000008 must be the folder of an iteration (got 'missing beside {STEP}')" in error
    error = error_of(found / STEP, capsys, "--ckpt-step", "8")
    assert "--ckpt-step must be absent for the folder of one iteration" in error
    assert "(got 'missing')" in error_of(found / "nothing", capsys)
    head = found / STEP / "metadata.json"
    head.write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    error = error_of(found, capsys)
    assert f"sharded_backend in {head} must be 'torch_dist' (got 'zarr'); load it in Meg" in error
    shutil.rmtree(found / STEP)
    (found / STEP / "mp_rank_00").mkdir(parents=True)
    (found / STEP / "mp_rank_00" / "model_optim_rng.pt").touch()
    error = error_of(found, capsys)
    assert "must be a checkpoint in the format torch_dist (got 'the format `torch`" in error
    assert "--ckpt-convert-format torch_dist --ckpt-convert-save DIR" in error


def test_damaged_files_are_named(found: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = found / STEP
    data = max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)
    whole = data.read_bytes()
    # One bit of the numbers: CRC-32 of the zip.
    place = whole.index(b"data/0") + 2000
    data.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert "must be a tensor of torch.save (got \"Bad CRC-32 for file 'archive/data/0'\")" in (
        error_of(found, capsys)
    )
    os.truncate(data, len(whole) - 100)
    assert f"{data} must be >= {len(whole)} bytes (got '{len(whole) - 100} bytes')" in (
        error_of(found, capsys)
    )
    data.unlink()
    assert f"{data} must be >= " in error_of(found, capsys)
    data.write_bytes(whole)
    metadata = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(metadata[: len(metadata) // 2])
    assert f"{folder}/.metadata must be a whole pickle (got " in error_of(found, capsys)
    (folder / ".metadata").unlink()
    assert "copy .metadata too" in error_of(found, capsys)


def test_a_checkpoint_without_arguments_needs_a_configuration(
    found: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    expected = read("megatron", found)
    torch.save({"iteration": 3}, found / STEP / "common.pt")
    error = error_of(found, capsys)
    assert "as Megatron-LM's training saves them (got None); give --config" in error
    expected.config.save(tmp_path / "config.json")
    words = f"--from megatron --load {found} --to native --save {tmp_path}/out".split()
    assert main([*words, "--config", str(tmp_path / "config.json"), "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rotary_interleaved", True, "--rotary-interleaved in "),
        ("moe_router_score_function", "sigmoid", "--moe-router-score-function in "),
        ("rotary_base", 5000, "must be that of --config, where rotary_base is 1000"),
        ("norm_epsilon", 1e-6, "must be that of --config, where norm_epsilon is 1e-05"),
        ("moe_router_topk", 1, "must be that of --config, where moe_router_topk is 2"),
        ("moe_router_load_balancing_type", "sinkhorn", ""),
    ],
)
def test_arguments_are_checked_beside_a_configuration(name: str, value: Any, said: str) -> None:
    values = vars(arguments(MODEL, tied=False))
    config = megatron_config(values, "x")
    if not said:
        check_same_network({**values, name: value}, "x", config)
        return
    with pytest.raises(UsageError, match=said):
        check_same_network({**values, name: value}, "x", config)


def test_reading_with_a_configuration_checks_the_arguments(found: Path) -> None:
    config = read("megatron", found).config
    args = arguments(MODEL, tied=False)
    args.rotary_percent = 0.5
    torch.save({"args": args, "iteration": 3}, found / STEP / "common.pt")
    with pytest.raises(UsageError, match="--rotary-percent in "):
        read("megatron", found, config=config)


def test_a_wrong_reading_is_noticed_by_the_second(
    found: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = verify_source("megatron", found, lambda _: None, ITERATION)
    assert "by PyTorch's weights-only loader" in said
    monkeypatch.setattr(
        StoredTensor, "_values", lambda self, chunk: torch.zeros(chunk.sizes, dtype=self.dtype)
    )
    with pytest.raises(UsageError, match="the same in both readings"):
        verify_source("megatron", found, lambda _: None)


@pytest.mark.parametrize("source", ["hf", "t5x"])
def test_another_format_names_this_one(
    found: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--from {source} --load {found} --to native --save {found.parent}/out".split()
    assert main(words) == 2
    assert f"--from must be megatron for {found}" in capsys.readouterr().err


UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "normalization": ("LayerNorm", "--normalization in x must be 'RMSNorm' (got 'LayerNorm')"),
    "swiglu": (False, "--swiglu in x must be True"),
    "position_embedding_type": ("learned_absolute", "must be 'rope'"),
    "add_bias_linear": (True, "--add-bias-linear in x must be False"),
    "multi_latent_attention": (True, "--multi-latent-attention in x must be"),
    "mtp_num_layers": (1, "--mtp-num-layers in x must be None or 0 (got 1)"),
    "rotary_percent": (0.5, "--rotary-percent in x must be 1.0 (got 0.5)"),
    "use_rope_scaling": (True, "--use-rope-scaling in x must be"),
    "apply_layernorm_1p": (True, "--apply-layernorm-1p in x must be False"),
    "num_query_groups": (3, "must be a divisor of --num-attention-heads (4) (got 3)"),
    "moe_router_score_function": ("sigmoid", "must be 'softmax' (got 'sigmoid')"),
    "moe_router_enable_expert_bias": (True, "--moe-router-enable-expert-bias in x must be"),
    "moe_router_topk_scaling_factor": (2.5, "must be None or 1 (got 2.5)"),
    "moe_router_num_groups": (4, "--moe-router-num-groups in x must be None or 1 (got 4)"),
    "moe_shared_expert_gate": (True, "--moe-shared-expert-gate in x must be"),
    "moe_router_load_balancing_type": ("sinkhorn", "must be one of aux_loss, seq_aux_loss, none"),
    "moe_layer_freq": ([1], "must be a number, or a list of 2 zeros and ones"),
    "hidden_size": (
        None,
        "--hidden-size in x must be a whole number from 1 to 2147483648 (got None)",
    ),
    "num_layers": (10**7, "--num-layers in x must be a whole number from 1 to 65536"),
    "kv_channels": (2**70, "--kv-channels in x must be a whole number from 1 to"),
    "rotary_base": (float("inf"), "--rotary-base in x must be a finite number >= 0"),
    "norm_epsilon": (Name("os", "getcwd"), "must be a finite number >= 0 (got 'os.getcwd')"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_model_names_the_flag(name: str) -> None:
    value, said = UNSUPPORTED[name]
    values = vars(arguments(MODEL, tied=False)) | {"group_query_attention": True}
    with pytest.raises(UsageError) as error:
        megatron_config({"num_query_groups": 2, **values, name: value}, "x")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_capacity_and_coefficients_have_megatrons_units() -> None:
    values = vars(arguments(MODEL, tied=False)) | {"moe_expert_capacity_factor": 1.5}
    moe = megatron_config(values, "x").moe
    assert (moe.moe_capacity_rule, moe.moe_token_drop_policy) == ("megatron", "probs")
    assert (moe.moe_expert_capacity_factor, moe.moe_eval_capacity_factor) == (1.5, 1.5)
    negative = megatron_config(values | {"moe_expert_capacity_factor": -1.0}, "x").moe
    assert negative.moe_expert_capacity_factor is None  # as TransformerConfig takes it
    assert (moe.moe_loss_convention, moe.moe_aux_loss_coeff) == ("megatron", 0.01)


def test_training_and_tools_say_what_lies_there(found: Path) -> None:
    """`--load` of such a folder, of a run and of an iteration, names the command to type."""
    for path in (found, found / STEP):
        with pytest.raises(UsageError) as error:
            latest_step(path)
        said = str(error.value)
        assert (
            "(got 'a distributed checkpoint of PyTorch or Megatron-LM (format torch_dist)" in said
        )
        assert f"tools/convert_checkpoint.py --to native --save NEW --load {path}" in said
        assert "--from megatron" in said
    shutil.rmtree(found / STEP)
    (found / STEP / "mp_rank_00").mkdir(parents=True)
    (found / STEP / "mp_rank_00" / "model_optim_rng.pt").touch()
    with pytest.raises(UsageError, match=r"--ckpt-convert-format torch_dist .* --from megatron"):
        latest_step(found)


class Trap:
    """What a hostile checkpoint would contain."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return subprocess.check_call, (["touch", str(self.file)],)


def test_nothing_in_a_checkpoint_is_executed(
    found: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "executed"
    args = arguments(MODEL, tied=False)
    args.some_path, args.hidden_size = Trap(mark), 16
    torch.save({"args": args, "iteration": 4, "other": Trap(mark)}, found / STEP / "common.pt")
    assert read("megatron", found).step == 4
    args.hidden_size = Trap(mark)
    torch.save({"args": args}, found / STEP / "common.pt")
    # Protocol 2 of pickle names the module of Python 2, commands.check_call.
    assert "must be a whole number from 1 to 2147483648 (got 'an object of " in error_of(
        found, capsys
    )
    torch.save({"args": Trap(mark)}, found / STEP / "common.pt")
    assert "check_call in place of Namespace" in error_of(found, capsys)
    assert not mark.exists()


def test_pickles_are_read_as_data() -> None:
    import pickle

    shared = [1, 2]
    value = {
        "a": (1, -5, 2**70, 2.5, None, True, b"x", bytearray(b"y"), "é"),
        "b": [shared, shared, {3, 4}, frozenset({5}), ()],
        "c": Namespace(x=1, nested=Namespace(y=[shared])),
        "d": complex,
        "e": torch.Size([2, 3]),
    }
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        found = read_pickle(pickle.dumps(value, protocol), "x")
        if protocol >= 5:
            assert found["a"] == value["a"]
        assert found["a"][:6] == (1, -5, 2**70, 2.5, None, True)
        assert found["b"][0] is found["b"][1]
        outer = attributes(found["c"], "Namespace")
        assert attributes(outer["nested"], "Namespace") == {"y": [[1, 2]]}
        assert str(found["d"]) in ("builtins.complex", "__builtin__.complex")
        assert isinstance(found["e"], Built)
        assert found["e"].of == Name("torch", "Size")


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04", b"\x80\x04.", b"\x80\x04ab.", b"(.", b"h\x05.", b"]a.", b"\x82\x01."]
)
def test_a_broken_pickle_is_one_line(data: bytes) -> None:
    with pytest.raises(UsageError, match=r"^x must be a whole pickle \(got ") as error:
        read_pickle(data, "x")
    assert "\n" not in str(error.value)


def test_megatrons_own_converter_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--model-type",
        "GPT",
        "--loader",
        "mcore",
        "--saver",
        "hf",
        "--load-dir",
        "a",
        "--save-dir",
        "b",
    ]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("convert_checkpoint.py: error: --model-type must be ")
    assert "--from megatron --load FOLDER --to native --save FOLDER" in line
