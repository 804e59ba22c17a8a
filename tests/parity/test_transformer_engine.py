"""Layers of Transformer Engine: parameters, losses, gradients, steps and checkpoints are the same.

In processes with Transformer Engine's own Python, whose compiled GEMMs torch computes
(`tests/support/transformer_engine`): a signature, a shape, a mark, an order of blocks or a missing
reduction that is wrong shows here. What the CUDA library computes, and how fast, does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.config.precision import ALIGNMENT
from megatron_moe.model.logical import logical_parameters
from tests.checkpoint.layouts import DIST, Case, move
from tests.checkpoint.test_layouts import Origin
from tests.parity.cases import LAYOUTS, SLOW_LAYOUTS, VARIANTS, VOCAB, Layout
from tests.parity.compare import assemble, assert_same, relative_error
from tests.parity.harness import one_step
from tests.parity.te_ranks import (
    HISTORY,
    LOCAL,
    TE,
    Scales,
    describe_parameters,
    loss_and_gradients,
    moved_scales,
    one_layer,
    saved_memory,
)
from tests.parity.test_layouts import RECOMPUTE, check
from tests.parity.test_training_steps import reference_steps, several_steps
from tests.support.pool import Pool
from tests.support.transformer_engine import START

SMALL = [layout for layout in LAYOUTS if layout.world_size <= 2]
LARGE = [layout for layout in (*LAYOUTS, *SLOW_LAYOUTS) if layout.world_size > 2]


def layout_named(name: str) -> Layout:
    return next(layout for layout in LAYOUTS if layout.name == name)


@pytest.fixture(scope="module")
def te_pool() -> Iterator[Pool]:
    """Ranks in which Transformer Engine is installed."""
    ranks = Pool(START)
    yield ranks
    ranks.close()


def test_parameters_of_one_rank(te_pool: Pool) -> None:
    """Names and shapes [out, in], for H 32, 4 heads of 12, F 24, 4 experts of 20, 3 blocks."""
    ((found, classes),) = te_pool.run(describe_parameters, 1, flags=TE)
    shapes = {name.removeprefix("0.decoder.layers."): shape for name, (shape, _) in found.items()}
    dense = {
        "0.self_attention.linear_qkv.weight": (3 * 48, 32),
        "0.self_attention.linear_proj.weight": (32, 48),
        "0.ffn.linear_fc1.weight": (3 * 24, 32),
        "0.ffn.linear_fc2.weight": (32, 24),
        "1.shared.linear_fc1.weight": (3 * 28, 32),
        "1.shared.linear_fc2.weight": (32, 28),
        "1.moe.router.weight": (4, 32),
    }
    experts = {
        f"{layer}.moe.experts.linear_fc{matrix}.weight{expert}": shape
        for layer in (1, 3)
        for matrix, shape in ((1, (3 * 20, 32)), (2, (32, 20)))
        for expert in range(4)
    }
    assert {name: shapes[name] for name in dense} == dense
    assert {name: shape for name, shape in shapes.items() if ".experts." in name} == experts
    layer = "decoder.layers.1."
    assert classes[layer + "self_attention.linear_qkv"] == "TEColumnParallelLinear"
    assert classes[layer + "self_attention.linear_proj"] == "TERowParallelLinear"
    assert classes[layer + "shared.linear_fc1"] == "TEColumnParallelLinear"
    assert classes[layer + "shared.linear_fc2"] == "TERowParallelLinear"
    assert classes[layer + "moe.experts.linear_fc1"] == "TEColumnParallelGroupedLinear"
    assert classes[layer + "moe.experts.linear_fc2"] == "TERowParallelGroupedLinear"
    assert classes[layer + "input_layernorm"] == classes["decoder.final_layernorm"] == "RMSNorm"
    assert classes["output_layer"] == "LogitsLayer"


@pytest.mark.parametrize("layout", SMALL, ids=lambda layout: layout.name)
def test_parameters_are_marked_as_local_ones(te_pool: Pool, layout: Layout) -> None:
    """For reductions, norms and sharding; of experts each dimension is the transposed one."""
    size, flags = layout.world_size, layout.flags
    shards = flags.get("tensor_model_parallel_size", 1)
    ours = te_pool.run(describe_parameters, size, flags={**flags, **LOCAL})
    theirs = te_pool.run(describe_parameters, size, flags={**flags, **TE})
    for (local, _), (found, _) in zip(ours, theirs, strict=True):
        assert {n for n in found if ".experts." not in n} == {
            n for n in local if ".experts." not in n
        }
        for name, (shape, marks) in found.items():
            if ".experts." not in name:
                expected = local[name][1]
                assert shape == local[name][0], name
                if shards > 1:
                    assert _meaning(marks) == _meaning(expected), name
                continue
            linear = "weight_in" if "linear_fc1" in name else "weight_out"
            stack, expected = local[name.split(".linear_fc")[0] + "." + linear]
            assert shape == (stack[2], stack[1]), name
            assert marks["allreduce"] == expected["allreduce"], name
            assert marks["tensor_model_parallel"] and not marks["sequence_parallel"], name
            assert marks["partition_dim"] == (0 if linear == "weight_in" else 1), name


def _meaning(marks: dict[str, Any]) -> dict[str, Any]:
    """What Megatron-Core takes marks for: a missing one is its default.

    `partition_dim` serves its own checkpoints alone, and its local layers leave it out on a CPU.
    """
    return {
        "allreduce": marks["allreduce"] is not False,
        "tensor_model_parallel": bool(marks["tensor_model_parallel"]),
        "sequence_parallel": bool(marks["sequence_parallel"]),
    }


@pytest.mark.parametrize("layout", SMALL, ids=lambda layout: layout.name)
def test_equals_reference(te_pool: Pool, layout: Layout) -> None:
    variant = "paper-port" if layout.name in ("PP2", "EP2") else "released"
    flags = {**layout.flags, **TE}
    check(te_pool.run(one_step, layout.world_size, variant=variant, flags=flags), variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["released", "paper-port", "grouped-projection-norm"])
@pytest.mark.parametrize("layout", [*SMALL, *LARGE], ids=lambda layout: layout.name)
def test_every_layout_equals_reference(te_pool: Pool, layout: Layout, variant: str) -> None:
    flags = {**layout.flags, **TE}
    check(te_pool.run(one_step, layout.world_size, variant=variant, flags=flags), variant)


@pytest.mark.parametrize("kind", RECOMPUTE)
def test_recomputation_changes_nothing(te_pool: Pool, kind: str) -> None:
    flags = {**RECOMPUTE[kind], **TE}
    check(te_pool.run(one_step, 1, variant="released", flags=flags), "released")


@pytest.mark.parametrize("name", ["1", "EP2"])
def test_gemms_that_add_to_the_gradient_buffer(te_pool: Pool, name: str) -> None:
    """`--gradient-accumulation-fusion`, over the micro-batches of a step, without Apex."""
    layout = layout_named(name)
    flags = {**layout.flags, **TE, "gradient_accumulation_fusion": True}
    check(te_pool.run(one_step, layout.world_size, variant="released", flags=flags), "released")


def test_a_wrong_shard_is_noticed(te_pool: Pool) -> None:
    layout = layout_named("EP2")
    flags = {**layout.flags, **TE}
    outcomes = te_pool.run(
        one_step, 2, variant="released", flags=flags, swap="layers.1.moe.experts.up"
    )
    with pytest.raises(AssertionError):
        check(outcomes, "released")


def test_bf16_equals_local_layers_to_rounding(te_pool: Pool) -> None:
    local, found = (
        te_pool.run(one_step, 1, variant="released", flags=flags, bf16=True)[0]
        for flags in (LOCAL, TE)
    )
    assert relative_error(found.sums, local.sums) < 1e-3
    assert found.kept == local.kept
    expected = assemble(local.gradients)
    # bf16 has 8 bits: half a unit in the last place of the largest element, a few times over.
    assert_same(assemble(found.gradients), expected, 2**-6)


@pytest.mark.parametrize("name", ["1", "DP2", "EP2"])
def test_steps_of_its_fused_adam_equal_adamw(te_pool: Pool, name: str) -> None:
    """Where Transformer Engine is installed, Megatron-Core takes its optimizer."""
    layout = layout_named(name)
    flags = {**layout.flags, **TE, **(DIST if name == "DP2" else {})}
    ranks = te_pool.run(several_steps, layout.world_size, variant="released", flags=flags)
    norms, weights = reference_steps("released", "adam")
    for found, _ in ranks:
        assert found == pytest.approx(norms, rel=1e-4)
    assert_same(assemble(block for _, blocks in ranks for block in blocks), weights, 1e-4)


@pytest.mark.parametrize("name", ["1", "EP2"])
def test_checkpoints_go_from_local_layers_to_these_and_back(
    te_pool: Pool, tmp_path: Path, name: str
) -> None:
    """Weights and moments, to the bit, and the step after; by logical names alone."""
    layout = layout_named(name)
    origin = Origin(te_pool, tmp_path / "local", Case(1, LOCAL))
    case = Case(layout.world_size, {**layout.flags, **TE, **(DIST if name == "EP2" else {})})
    there = tmp_path / "there"
    saved = te_pool.run(move, case.world_size, case=case, source=tmp_path / "local", target=there)
    origin.check(saved)
    origin.check(te_pool.run(move, 1, case=Case(1, LOCAL), source=there))
    names = {tensor for _, tensor in origin.saved}
    assert names == set(logical_parameters(*VARIANTS["released"], VOCAB))
    for file in there.rglob("*"):
        if file.is_file():
            assert b"_extra_state" not in file.read_bytes(), file
            assert file.suffix in (".safetensors", ".json", ".txt", ""), file


def _scales(pool: Pool, ranks: int, flags: dict[str, Any], **options: Any) -> tuple[Scales, Any]:
    """Of all ranks, which agree; and what rank 0 has by place."""
    results = pool.run(moved_scales, ranks, flags=flags, **options)
    whole: Scales = {}
    for found, _ in results:
        for name, value in found.items():
            assert whole.setdefault(name, value) == value, name
    return whole, results[0][1]


def test_delayed_scales_move_between_layouts_and_implementations(
    te_pool: Pool, tmp_path: Path
) -> None:
    """One rank, two that share the experts, emulation, and back; then bf16, which has none."""
    first, places = _scales(te_pool, 1, {}, emulated=False, target=tmp_path / "1")
    assert len({scale for scale, _ in first.values()}) == len(first)
    for name, value in places.items():
        whole, _, second = name.partition(", ")
        assert first[f"{whole}.1" if second else whole][0] == value, name
    moved = {"source": tmp_path / "1", "target": tmp_path / "2"}
    two, _ = _scales(te_pool, 2, layout_named("EP2").flags, emulated=False, **moved)
    assert two == first
    moved = {"source": tmp_path / "2", "target": tmp_path / "3"}
    emulated, _ = _scales(te_pool, 1, {}, emulated=True, **moved)
    assert emulated == first
    again, same_places = _scales(te_pool, 1, {}, emulated=False, source=tmp_path / "3")
    assert (again, same_places) == (first, places)
    plain = {"emulated": False, "recipe": None}
    none, _ = _scales(te_pool, 1, {}, **plain, source=tmp_path / "3", target=tmp_path / "4")
    assert none == {}
    fresh, _ = _scales(te_pool, 1, {}, emulated=False, source=tmp_path / "4")
    assert set(fresh.values()) == {(1.0, (0.0,) * HISTORY)}


def test_fp8_is_near_bf16_and_recomputes_its_own_numbers(te_pool: Pool) -> None:
    """Transformer Engine's reference quantizers, in all linear layers and experts.

    The distance is that of 3 bits of mantissa over four layers; rounding twice the same is equal
    to the bit.
    """
    (plain,) = te_pool.run(loss_and_gradients, 1, flags=TE, fp8=False)
    (fp8,) = te_pool.run(loss_and_gradients, 1, flags=TE, fp8=True)
    assert (plain.padded, fp8.padded) == (0, 2), "rows are padded in FP8, and only there"
    assert fp8.loss != plain.loss and abs(fp8.loss / plain.loss - 1) < 0.05
    expected, found = assemble(plain.gradients), assemble(fp8.gradients)
    for name in ("layers.0.attention.query.weight", "layers.1.moe.experts.down"):
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert 1e-3 < error < 0.5, (name, float(error))
    # Four layers; or two dense feed-forwards, two shared experts and two layers of experts.
    for kind, checkpoints in (("full", 4), ("selective", 6)):
        flags = {**TE, **RECOMPUTE[kind]}
        (again,) = te_pool.run(loss_and_gradients, 1, flags=flags, fp8=True)
        assert (again.loss, again.checkpoints) == (fp8.loss, checkpoints)
        assert_same(assemble(again.gradients), found, 0.0)


@pytest.mark.parametrize("fp8", [False, True])
def test_saved_memory_is_the_planned(te_pool: Pool, fp8: bool) -> None:
    ((held, planned),) = te_pool.run(saved_memory, 1, flags=TE, fp8=fp8)
    assert abs(planned / held - 1) < 0.02, (held, planned)


@pytest.mark.parametrize("recipe", [None, *ALIGNMENT])
def test_rows_are_padded_and_capacity_is_not(te_pool: Pool, recipe: str | None) -> None:
    """Experts of 2 groups with 4 or 6 slots: 8 or 12 rows."""
    for factor, rows in ((1.0, 8), (1.5, 12)):
        plain, kept, sizes = te_pool.run(one_layer, 1, capacity_factor=factor, recipe=None)[0]
        assert sizes == [rows] * 4
        if recipe is None:
            continue
        out, kept_fp8, sizes = te_pool.run(one_layer, 1, capacity_factor=factor, recipe=recipe)[0]
        assert sizes == [ALIGNMENT[recipe]] * 4  # type: ignore[index]
        assert torch.equal(kept, kept_fp8)
        error = float((out - plain).norm() / plain.norm())
        assert 1e-3 < error < 0.1, error
