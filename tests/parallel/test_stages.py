"""Layers of pipeline stages: as Megatron-Core divides them, and one line for what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_moe.config import ParallelConfig
from megatron_moe.errors import UsageError
from megatron_moe.parallel.stages import parse_layout, split_layers

FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
EMBEDDING = "account_for_embedding_in_pipeline_split"
LOSS = "account_for_loss_in_pipeline_split"
VPR = "num_virtual_stages_per_pipeline_rank"
VPP = "num_layers_per_virtual_pipeline_stage"
LAYOUT = "pipeline_model_parallel_layout"


def split(num_layers: int, pp: int, **flags: Any) -> tuple[int | None, tuple[int, ...]]:
    found = split_layers(ParallelConfig(**flags), num_layers, pp)
    return found.vp, found.chunk_layers


@pytest.mark.parametrize(
    ("layers", "pp", "flags", "expected"),
    [
        (8, 4, {}, (None, (2, 2, 2, 2))),
        (8, 2, {VPR: 2}, (2, (2, 2, 2, 2))),
        (32, 4, {LAST: 5}, (None, (9, 9, 9, 5))),
        (10, 4, {FIRST: 1, LAST: 3}, (None, (1, 3, 3, 3))),
        (5, 2, {FIRST: 2, LAST: 3}, (None, (2, 3))),
        (10, 3, {FIRST: 2, LAST: 4, VPR: 2}, (2, (1, 2, 2, 1, 2, 2))),
        (6, 4, {EMBEDDING: True, LOSS: True}, (None, (1, 2, 2, 1))),
        (7, 2, {LOSS: True, VPR: 2}, (2, (2, 2, 2, 1))),
        (7, 2, {LOSS: True, VPP: 2}, (2, (2, 2, 2, 1))),
        (4, 2, {EMBEDDING: True, LOSS: True, VPR: 3}, (3, (0, 1, 1, 1, 1, 0))),
        (6, 2, {LAYOUT: "Et*4|t,tL"}, (None, (4, 2))),
        (32, 4, {LAYOUT: "E(ttttt|)*4(tttt|)*3L"}, (2, (5, 5, 5, 5, 4, 4, 4, 0))),
        (4, 1, {LAYOUT: "Et*4L"}, (None, (4,))),
    ],
)
def test_layers_of_the_chunks(
    layers: int, pp: int, flags: dict[str, Any], expected: tuple[int | None, tuple[int, ...]]
) -> None:
    assert split(layers, pp, **flags) == expected


MEGATRON = {
    FIRST: "num_layers_in_first_pipeline_stage",
    LAST: "num_layers_in_last_pipeline_stage",
    EMBEDDING: EMBEDDING,
    LOSS: LOSS,
}


@pytest.mark.parametrize(
    ("layers", "pp", "vp", "flags"),
    [
        (12, 4, None, {}),
        (12, 2, 3, {}),
        (13, 4, None, {FIRST: 1}),
        (13, 4, None, {LAST: 4}),
        (13, 3, 2, {FIRST: 4, LAST: 5}),
        (14, 3, 2, {FIRST: 4, LAST: 6}),
        (11, 4, None, {LOSS: True}),
        (10, 3, 2, {EMBEDDING: True, LOSS: True}),
        (11, 2, 2, {EMBEDDING: True}),
    ],
)
def test_megatron_core_divides_them_alike(
    layers: int, pp: int, vp: int | None, flags: dict[str, Any]
) -> None:
    """Its own functions, for every chunk; what it refuses is refused."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    def theirs() -> list[tuple[int, int]]:
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=pp,
            pipeline_dtype=torch.float32,
            virtual_pipeline_model_parallel_size=vp,
            **{MEGATRON[name]: value for name, value in flags.items()},
        )
        chunks = [(stage, number) for number in range(vp or 1) for stage in range(pp)]
        return [
            (
                get_num_layers_to_build(config, number if vp else None, stage),
                get_transformer_layer_offset(config, number if vp else None, stage),
            )
            for stage, number in chunks
        ]

    try:
        counts = split(layers, pp, **flags, **({VPR: vp} if vp else {}))[1]
    except UsageError:
        with pytest.raises(ValueError, match="layers"):
            theirs()
        return
    assert theirs() == [(count, sum(counts[:chunk])) for chunk, count in enumerate(counts)]


@pytest.mark.parametrize(
    "text",
    ["Et*3|(tt|)*29t,L", "E(t*2|t)*3|L", "|(t|)*2E", "Et|t*2|(ttt|)*2tL", "E|(|tt)*2L", "t*0E*2"],
)
def test_a_layout_is_read_as_megatron_core_reads_it(text: str) -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )

    letters = {"embedding": "E", "decoder": "t", "loss": "L"}
    theirs = PipelineParallelLayerLayout.parse_str_to_list(text)
    assert parse_layout(text) == ["".join(letters[kind.name] for kind in row) for row in theirs]


ERRORS: list[tuple[int, int, dict[str, Any], str]] = [
    (13, 4, {}, "--pipeline-model-parallel-size must be a divisor of --num-layers (13): 1, 13 "),
    (13, 4, {}, "or give --decoder-first-pipeline-num-layers"),
    (
        12,
        4,
        {LOSS: True},
        "a divisor of --num-layers with --account-for-loss-in-pipeline-split (13",
    ),
    (12, 4, {FIRST: 4, LOSS: True}, "(got 4)"),
    (12, 4, {FIRST: 4}, "8 of 12 layers are left for the 3 other stages"),
    (12, 4, {FIRST: 13}, "0 of 12 layers are left for the 3 other stages"),
    (12, 4, {FIRST: 6, LAST: 6}, "0 of 12 layers are left for the 2 other stages"),
    (12, 2, {FIRST: 4, LAST: 4}, "4 of 12 layers are left for no other stage"),
    (12, 1, {LAST: 4}, "must be used with --pipeline-model-parallel-size >= 2 (got 4)"),
    (12, 2, {LAST: 4, VPP: 2}, "used without --num-layers-per-virtual-pipeline-stage (got 4)"),
    (12, 2, {LAST: 4, VPR: 3}, "a divisor of the layers of one pipeline rank (8): 1, 2, 4, 8"),
    (4, 2, {EMBEDDING: True, VPR: 5}, "--pipeline-model-parallel-size must be a divisor"),
    (12, 2, {LAYOUT: "Et*12L", VPR: 2}, "used without --num-virtual-stages-per-pipeline-rank"),
    (12, 2, {LAYOUT: "Et*12L", LOSS: True}, "used without --account-for-loss-in-pipeline-split"),
    (12, 2, {LAYOUT: "Et*6|t*5L"}, "one E, then 12 t (--num-layers), then L"),
    (2, 2, {LAYOUT: "Et|tLt"}, "one E, then 2 t (--num-layers), then L"),
    (12, 2, {LAYOUT: "Et*6|t*5|tL"}, "a multiple of --pipeline-model-parallel-size (2) chunks"),
    (12, 1, {LAYOUT: "Et*6|t*6L"}, "one chunk with --pipeline-model-parallel-size 1"),
    (12, 2, {LAYOUT: "Et*6||t*6|L"}, "at least one in every chunk but the first and the last"),
    (12, 2, {LAYOUT: "Et*6|t*6mL"}, "multi-token prediction is not built"),
    (12, 2, {LAYOUT: "Et*|L"}, "made of E, t, L, |, x*n and (...)*n"),
    (12, 2, {LAYOUT: "E(t|)L"}, "made of E, t, L, |, x*n and (...)*n"),
    (12, 2, {LAYOUT: "E((t)*2|)*2L"}, "made of E, t, L, |, x*n and (...)*n"),
    (12, 2, {LAYOUT: "E(t*9999)*9999|L"}, "at most 65536 letters"),
    (12, 2, {LAYOUT: ""}, "one E, then 12 t"),
]


@pytest.mark.parametrize(("layers", "pp", "flags", "text"), ERRORS)
def test_what_cannot_be_divided_is_one_line(
    layers: int, pp: int, flags: dict[str, Any], text: str
) -> None:
    with pytest.raises(UsageError) as raised:
        split(layers, pp, **flags)
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)
