"""A saved configuration comes back as it was, or is rejected by the setting that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config import RunConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.config.presets import PRESETS
from megatron_moe.errors import UsageError


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str, tmp_path: Path) -> None:
    PRESETS[name].save(tmp_path / "config.json")
    assert RunConfig.load(tmp_path / "config.json") == PRESETS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_published_released_presets_have_released_padding_and_balance_loss(name: str) -> None:
    """The tiny one keeps the numbers of earlier versions."""
    config = PRESETS[name]
    released = name.endswith("-released") and "tiny" not in name
    assert config.model.zero_padding_activations == released
    expected = "group_aux_loss" if released else "seq_aux_loss"
    if name.startswith("openmoe-"):
        assert config.moe.moe_router_load_balancing_type == expected
        assert config.moe.moe_ignore_padding_tokens == (not released)


def test_a_file_from_before_a_setting_means_what_it_meant(tmp_path: Path) -> None:
    """Padding was routed; a new run's file says that it is not, one that routes it is as before."""
    path = tmp_path / "config.json"
    path.write_text('{"moe": {"num_experts": 4}}')
    old = RunConfig.load(path)
    assert (old.moe.num_experts, old.moe.moe_ignore_padding_tokens) == (4, False)
    assert "moe_ignore_padding_tokens" not in old.to_dict()["moe"]
    assert RunConfig().to_dict()["moe"]["moe_ignore_padding_tokens"] is True
    RunConfig().save(path)
    assert RunConfig.load(path) == RunConfig()


@pytest.mark.parametrize(
    ("content", "where", "expected"),
    [
        ({"modle": {}}, "section of", "model"),
        ({"model": 3}, "section model of", "JSON object"),
        ({"model": {"num_layer": 3}}, "setting model of", "num_layers"),
        ({"model": {"num_layers": "x"}}, "num_layers in model", "a whole number"),
        ({"model": {"num_layers": 3.0}}, "num_layers in model", "a whole number"),
        ({"train": {"bf16": 1}}, "bf16 in train", "true or false"),
        ({"train": {"micro_batch_size": True}}, "micro_batch_size in train", "a whole number"),
        ({"data": {"data_path": "a"}}, "data_path in data", "a list, each text"),
        ({"data": {"data_path": [1]}}, "data_path in data", "a list, each text"),
        ({"moe": {"moe_capacity_rule": "t6x"}}, "moe_capacity_rule in moe", "'t5x' or 'port'"),
        ({"optimizer": {"lr": None}}, "lr in optimizer", "a number"),
        ({"train": {"rampup_batch_size": [1, 2]}}, "rampup_batch_size in train", "3 entries"),
        ({"checkpoint": {"save": 3}}, "save in checkpoint", "text or null"),
    ],
)
def test_wrong_settings_are_rejected(
    content: dict[str, Any], where: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError) as error:
        RunConfig.load(path)
    assert error.value.what.startswith(where)
    assert expected in error.value.expected


def test_numbers_may_be_written_without_a_point(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"optimizer": {"lr": 1}, "model": {"softmax_scale": null}}')
    assert RunConfig.load(path).optimizer.lr == 1


def test_other_files_are_rejected(tmp_path: Path) -> None:
    for text in (b"", b"[]", b"{", b"\xff", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(UsageError, match="--config"):
            RunConfig.load(tmp_path / "config.json")
    with pytest.raises(UsageError, match="--config"):
        RunConfig.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--objective ul2", ["padding is not routed"]),
        ("--objective ul2 --no-moe-ignore-padding-tokens", []),
        ("--objective causal", []),
        ("--objective ul2 --num-layers 2 --moe-layer-freq [0]*2", []),
        ("--moe-router-load-balancing-type global_aux_loss", ["global_aux_loss does not depend"]),
    ],
)
def test_routing_that_megatron_lm_means_otherwise_is_said(line: str, said: list[str]) -> None:
    lines = parse_args(line.split()).config.routing_lines()
    assert [text[: len(start)] for text, start in zip(lines, said, strict=True)] == said
