"""Weight files of other programs: older formats, wrapped tensors, what is no weight file at all."""

from __future__ import annotations

import json
import os
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe.convert.formats import ConversionTarget, read, write
from megatron_moe.errors import UsageError
from tests.convert.cases import CONFIG, model_of

LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'7' * 64}\nsize 4309802\n"


def exported(folder: Path, layout: Any = "stacked") -> dict[str, torch.Tensor]:
    """Export the case; returns the tensors, whose file is removed."""
    write(model_of(), ConversionTarget(format="hf", path=folder, layout=layout), lambda _: None)
    values = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return values


def check(folder: Path) -> None:
    found = read("hf", folder)
    for name, tensor in model_of().tensors.items():
        assert torch.equal(found.tensors[name].whole(), tensor.whole()), name


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrappers", [(), ("state_dict",), ("model",), ("module",), ("a", "b")])
def test_files_of_torch_save(tmp_path: Path, zipped: bool, wrappers: tuple[str, ...]) -> None:
    """Before release 1.6 PyTorch wrote no zip archive; training programs nest the tensors."""
    found: Any = OrderedDict(exported(tmp_path / "hf"))
    names = ("model", "module") if wrappers == ("a", "b") else wrappers
    for name in reversed(names):
        found = {name: found, "epoch": 3, "optimizer": {"state": {}}, "loss": torch.ones(2)}
    file = tmp_path / "hf/pytorch_model.bin"
    torch.save(found, file, _use_new_zipfile_serialization=zipped)
    assert file.read_bytes().startswith(b"PK") == zipped
    check(tmp_path / "hf")


def test_the_prefix_of_a_wrapped_module_is_no_part_of_a_name(tmp_path: Path) -> None:
    values = exported(tmp_path / "hf")
    wrapped = {f"module.{name}": tensor for name, tensor in values.items()}
    torch.save({"state_dict": wrapped}, tmp_path / "hf/pytorch_model.bin")
    check(tmp_path / "hf")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 3, "optimizer": {}}, "an object with epoch, optimizer"),
        ({"state_dict": {"a": torch.ones(1)}, "model": {"a": torch.ones(1)}}, "an object with"),
        ([1, 2], "list"),
    ],
)
def test_a_file_without_a_model_is_described(tmp_path: Path, content: Any, found: str) -> None:
    exported(tmp_path / "hf")
    torch.save(content, tmp_path / "hf/pytorch_model.bin")
    with pytest.raises(UsageError, match=rf"a mapping of names to tensors \(got '{found}"):
        read("hf", tmp_path / "hf")


@pytest.mark.parametrize("zipped", [True, False])
def test_an_object_that_holds_itself_is_described(tmp_path: Path, zipped: bool) -> None:
    exported(tmp_path / "hf")
    content: dict[str, Any] = {"epoch": 3}
    content["model"] = content
    file = tmp_path / "hf/pytorch_model.bin"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError, match=r"got 'an object with epoch, model'"):
        read("hf", tmp_path / "hf")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    exported(tmp_path / "hf")
    (tmp_path / "hf" / name).write_text(LFS)
    with pytest.raises(UsageError, match=rf"{name} must be .*Git LFS pointer.*git lfs pull"):
        read("hf", tmp_path / "hf")


def test_a_pointer_among_several_files_is_named(tmp_path: Path) -> None:
    values = exported(tmp_path / "hf")
    names = sorted(values)
    where = {}
    for number, part in enumerate((names[:9], names[9:])):
        file = f"model-{number}.safetensors"
        save_file({each: values[each] for each in part}, tmp_path / "hf" / file)
        where |= dict.fromkeys(part, file)
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    check(tmp_path / "hf")
    (tmp_path / "hf/model-1.safetensors").write_text(LFS)
    with pytest.raises(UsageError, match=r"model-1\.safetensors must be .*Git LFS pointer"):
        read("hf", tmp_path / "hf")


@pytest.mark.parametrize("type_name", ["openmoe", "llama", None])
def test_the_port_with_unstacked_experts(tmp_path: Path, type_name: str | None) -> None:
    """As its converter writes it: its own architecture and type, no field of ours."""
    values = exported(tmp_path / "hf", "unstacked")
    save_file(values, tmp_path / "hf/model.safetensors", {"format": "pt"})
    path = tmp_path / "hf/config.json"
    config = json.loads(path.read_text())
    for key in ("megatron_moe", "auto_map", "expert_layout", "moe_capacity"):
        del config[key]
    config |= {"architectures": ["HFOpenMoeForCausalLM"], "model_type": type_name}
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "model_type" or v}))
    check(tmp_path / "hf")
    found = read("hf", tmp_path / "hf").config.model
    assert found == replace(CONFIG.model, zero_padding_activations=True)


@pytest.mark.parametrize("name", ["a\0b", "\ud83d", "..", "a/b", "x" * 256])
def test_an_index_names_files_of_its_directory(tmp_path: Path, name: str) -> None:
    exported(tmp_path / "hf")
    index = {"weight_map": {"embedding.weight": name}}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"half of a surrogate pair|a file of the same directory"):
        read("hf", tmp_path / "hf")


@pytest.mark.parametrize("name", ["model-1.safetensors", "config.json", "pytorch_model-1.bin"])
def test_a_named_pipe_is_no_file(tmp_path: Path, name: str) -> None:
    """Opening one waits for its writer, so a folder with one would stop the reader for ever."""
    exported(tmp_path / "hf")
    kind = "pytorch_model.bin" if name.endswith("bin") else "model.safetensors"
    index = {"weight_map": {"a": name}}
    (tmp_path / f"hf/{kind}.index.json").write_text(json.dumps(index))
    (tmp_path / "hf" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "hf" / name)
    with pytest.raises(UsageError, match="it is a named pipe, not a regular file"):
        read("hf", tmp_path / "hf")


@pytest.mark.parametrize("size", [1 << 20, 100])
def test_records_of_a_bin_file_are_not_compressed(tmp_path: Path, size: int) -> None:
    """PyTorch compresses nothing, and would inflate gigabytes of a pickle out of megabytes."""
    torch.save(exported(tmp_path / "hf"), tmp_path / "hf/pytorch_model.bin")
    with zipfile.ZipFile(tmp_path / "hf/pytorch_model.bin", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl2", bytes(size))
    with pytest.raises(UsageError, match=rf"data\.pkl2 with {size} bytes, \d+ compressed"):
        read("hf", tmp_path / "hf")
