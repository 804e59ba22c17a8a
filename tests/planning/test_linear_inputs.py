"""What linear layers keep under FP8, worked by hand; against Transformer Engine's own Python in
`tests/parity/test_transformer_engine.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_moe.config import PrecisionConfig, RunConfig
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.planning.linear_inputs import LinearInputs, weight_copies
from megatron_moe.planning.step_memory import step_memory
from tests.planning.test_memory import CONFIG, VOCAB


def _fp8(recipe: str = "tensorwise", **options: bool) -> RunConfig:
    precision = PrecisionConfig(fp8_format="e4m3", fp8_recipe=recipe, **options)  # type: ignore[arg-type]
    return replace(CONFIG, precision=precision)


@pytest.mark.parametrize(
    ("recipe", "held", "rows"),
    [
        (None, 2 * 1000, 100),
        ("tensorwise", 1000, 112),
        ("delayed", 1000, 112),
        ("blockwise", 1000 + 4 * 8, 128),
        ("mxfp8", 1000 + 32, 128),
    ],
)
def test_bytes_of_a_thousand_elements_and_rows_of_a_hundred(
    recipe: str | None, held: int, rows: int
) -> None:
    inputs = LinearInputs(engine=True, recipe=recipe)  # type: ignore[arg-type]
    assert (inputs.bytes_of(1000, 2), inputs.rows(100)) == (held, rows)


def test_weights_exist_twice_in_fp8() -> None:
    """Two attentions, a dense layer, the shared expert and two of four experts, split by two
    (experts are not): no norm, router or embedding. MXFP8 has a scale for 32.
    """
    config = replace(_fp8(), parallel=replace(CONFIG.parallel))
    layout = resolve_layout(config, 4, VOCAB)
    attention, matrices = 4 * 64 * 64, 3 * 64 * 128
    elements = (2 * attention + 2 * matrices) // 2 + 2 * matrices
    assert weight_copies(config, layout, VOCAB) == (2 * elements,)
    assert weight_copies(_fp8("mxfp8"), layout, VOCAB) == (2 * elements + 2 * elements // 32,)
    assert weight_copies(CONFIG, layout, VOCAB) == (0,)
    assert weight_copies(_fp8(fp8_emulate=True), layout, VOCAB) == (0,)
    # Both layers are the first or the last.
    assert weight_copies(_fp8(first_last_layers_bf16=True), layout, VOCAB) == (0,)


def test_fp8_is_part_of_a_step() -> None:
    """What is saved shrinks, copies of weights are held, and layers in bf16 are as in a bf16 run
    of Transformer Engine's layers.
    """
    layout = resolve_layout(CONFIG, 4, VOCAB)
    engine = replace(
        CONFIG, parallel=replace(CONFIG.parallel, transformer_impl="transformer_engine")
    )
    (plain,) = step_memory(engine, layout, VOCAB)
    (local,) = step_memory(CONFIG, layout, VOCAB)
    (fp8,) = step_memory(_fp8(), layout, VOCAB)
    (mixed,) = step_memory(_fp8(first_last_layers_bf16=True), layout, VOCAB)
    assert local.chunks[0].saved.total < plain.chunks[0].saved.total, "the product of the gate"
    assert fp8.chunks[0].saved.total < plain.chunks[0].saved.total
    copies = sum(weight_copies(_fp8(), layout, VOCAB))
    assert fp8.constant.parameters - plain.constant.parameters == copies
    assert mixed.peak == plain.peak
