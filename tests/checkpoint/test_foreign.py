"""Weights of every format in, below and above a directory, and the errors about them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from megatron_moe.checkpoint.directory import latest_step, step_directory
from megatron_moe.checkpoint.foreign import describe_contents, find_weights, weights_in
from megatron_moe.errors import CheckpointError, NoCheckpoint
from tests.checkpoint import toy

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
LAYOUTS: dict[str, tuple[str, list[str]]] = {
    "one file": ("hf", ["config.json", "model.safetensors"]),
    "several files": ("hf", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]),
    "pickles": ("hf", ["pytorch_model-00001-of-00002.bin"]),
    "flax": ("hf", ["flax_model.msgpack"]),
    "lora": ("adapter", ["adapter_config.json", "adapter_model.safetensors"]),
    "old lora": ("adapter", ["adapter_model.bin"]),
    "t5x": ("t5x", ["checkpoint", "target.token_embedder.embedding/.zarray"]),
    "megatron": ("megatron", ["mp_rank_00/model_optim_rng.pt"]),
    "megatron pp": ("megatron", ["mp_rank_00_000/model_optim_rng.pt"]),
    "megatron run": (
        "megatron",
        ["latest_checkpointed_iteration.txt", "iter_0000100/mp_rank_00/"],
    ),
    "megatron release": ("megatron", ["release/mp_rank_00/model_optim_rng.pt"]),
    "distributed": ("torch_dist", [".metadata", "__0_0.distcp"]),
    "distributed run": ("torch_dist", ["iter_0000100/.metadata", "iter_0000100/common.pt"]),
    "zarr": ("torch_dist", ["iter_0000100/metadata.json", "iter_0000100/common.pt"]),
    "deepspeed": ("deepspeed", ["latest", "global_step100/mp_rank_00_model_states.pt"]),
    "llama": ("other", ["consolidated.00.pth", "params.json"]),
    "gguf": ("other", ["model-q4.gguf"]),
}


def damage(file: Path) -> None:
    """Change the last byte of a file."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _make(directory: Path, names: list[str]) -> Path:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.touch()
    return directory


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_format_is_found_in_below_and_above(tmp_path: Path, layout: str) -> None:
    expected, names = LAYOUTS[layout]
    inner = _make(tmp_path / "outer" / "inner", names)
    found = weights_in(inner)
    assert found is not None and (found.format, found.path) == (expected, inner)
    below = find_weights(tmp_path / "outer")
    assert below is not None and (below.format, below.path) == (expected, inner)
    above = find_weights(inner / "new")
    if expected == "other":
        assert above is None
    else:
        assert above is not None and (above.format, above.path) == (expected, inner)
    with pytest.raises(CheckpointError) as error:
        latest_step(inner)
    assert found.described in str(error.value) and "; " in str(error.value)
    assert "empty" not in str(error.value) and "--allow-missing-load" not in str(error.value)


def test_one_step_of_a_run_names_the_directory_and_the_step_to_give(tmp_path: Path) -> None:
    toy.save(tmp_path / "run", 10)
    for step in (None, 10):
        with pytest.raises(CheckpointError, match=r"give .*/run with --ckpt-step 10$") as error:
            step_directory(tmp_path / "run" / "iter_0000010", step)
        assert "one step of a run's checkpoints" in str(error.value)


def test_a_run_one_level_down_or_up_is_named(tmp_path: Path) -> None:
    toy.save(tmp_path / "run", 10)
    with pytest.raises(CheckpointError, match=f"give {tmp_path}/run$"):
        latest_step(tmp_path)
    with pytest.raises(CheckpointError, match=f"give {tmp_path}/run; for a run that starts anew"):
        latest_step(tmp_path / "run" / "tuned")


def test_a_damaged_step_is_still_this_project_s(tmp_path: Path) -> None:
    toy.save(tmp_path, 10)
    (tmp_path / "iter_0000010" / "manifest.json").unlink()
    found = weights_in(tmp_path)
    assert found is not None and found.format == "native"
    assert step_directory(tmp_path)[0] == 10


@pytest.mark.parametrize(
    "names",
    [
        [],
        [".saving-iter_0000002-abcd/rank-00000.safetensors"],
        ["tensorboard/events.out", "tokenizer.model", "config.json"],
        ["corpus.bin", "corpus.idx", "notes.bin"],
    ],
)
def test_folders_without_weights_have_none(tmp_path: Path, names: list[str]) -> None:
    directory = tmp_path / "outer" / "inner"
    directory.mkdir(parents=True)
    _make(directory, names)
    (directory / "notes.bin").write_bytes(b"\x07\x00\x00\x00") if "notes.bin" in names else None
    assert find_weights(directory) is None
    with pytest.raises(NoCheckpoint) as error:
        latest_step(directory)
    assert ("an empty directory" in str(error.value)) == (names == [])


def test_bin_files_are_weights_if_they_are_pickles_or_pointers(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "rank0.bin", "w") as archive:
        archive.writestr("data.pkl", "")
    found = weights_in(tmp_path)
    assert found is not None and found.format == "other"
    (tmp_path / "rank0.bin").write_text(LFS)
    assert weights_in(tmp_path) is not None


def test_a_config_of_another_model_alone_is_a_hugging_face_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    found = weights_in(tmp_path)
    assert found is not None and found.format == "hf" and "--from hf" in found.fix


def test_contents_are_described(tmp_path: Path) -> None:
    assert describe_contents(tmp_path / "none") == "missing"
    assert describe_contents(tmp_path) == "an empty directory"
    _make(tmp_path, list("abcde"))
    assert describe_contents(tmp_path) == "a directory with a, b, c and 2 more"
    assert describe_contents(tmp_path / "a") == "a file"
