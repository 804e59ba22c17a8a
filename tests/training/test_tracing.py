"""Traces of training steps are the same in every layout, and replaying one repeats its routing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.model.reference import ReferenceOpenMoE
from megatron_moe.model.reference.replay import replayed
from megatron_moe.moe.trace import COLUMNS, Trace, read_step, trace_files, traced_steps
from megatron_moe.training.outputs import check_outputs
from tests.support.pool import Pool
from tests.training.ranks import PADDED_VOCAB, tiny_config
from tests.training.tiny import MODEL, pretrain_rank, write_domains

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
LAYOUTS: dict[str, tuple[int, str]] = {
    "DP2": (2, ""),
    "TP2": (2, TP2),
    "PP2-interleaved, recomputed": (
        2,
        f"{PP2} --num-layers-per-virtual-pipeline-stage 1 {FULL}",
    ),
    "EP2, reference kernels": (
        2,
        "--expert-model-parallel-size 2 --kernel-impl reference --moe-expert-impl loop",
    ),
    # The stages in the middle read no data otherwise, and the first has no MoE layer.
    "PP4": (4, "--pipeline-model-parallel-size 4"),
}
STEPS = 4


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_domains(tmp_path_factory.mktemp("domains"))


def arguments(domains: dict[str, str], folder: Path, *flags: str) -> list[str]:
    data = ["--data-path", "0.5", domains["low"], "0.5", domains["high"], "--split", "1,0,0"]
    files = ["--metrics-file", str(folder / "metrics"), "--train-iters", str(STEPS)]
    separate = ["--reset-attention-mask", "--reset-position-ids", "--global-batch-size", "4"]
    return [*MODEL, *data, *files, *separate, "--micro-batch-size", "1", *flags]


def run(pool: Pool, ranks: int, argv: list[str]) -> str:
    results = pool.run(pretrain_rank, ranks, argv=argv)
    assert [(code, error) for code, _, error in results] == [(0, "")] * ranks
    return results[0][1]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["lm_loss"] for line in (folder / "metrics").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(pool: Pool, domains: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, with the trace of steps 1, 3 and 4."""
    folder = tmp_path_factory.mktemp("whole")
    traces = ["--routing-trace-dir", str(folder), "--routing-trace-steps", "1", "3:4"]
    run(pool, 1, arguments(domains, folder, *traces))
    return folder


def different(one: Trace, other: Trace) -> list[str]:
    exact = [name for name in COLUMNS if name != "probabilities"]
    names = [n for n in exact if not np.array_equal(getattr(one, n), getattr(other, n))]
    near = np.allclose(one.probabilities, other.probabilities, atol=1e-4)
    return names if near else [*names, "probabilities"]


def test_a_trace_is_what_the_reference_model_does(whole: Path, domains: dict[str, str]) -> None:
    assert traced_steps(whole) == [1, 3, 4]
    trace, about = read_step(whole, 1)
    assert (about.experts, about.topk, about.layers) == (4, 2, (1, 3))
    assert about.producer.startswith("megatron_moe ")
    assert len(trace) == 2 * 4 * 32
    assert set(trace.domain) == {"low", "high"}
    by_layer = trace.token_id.reshape(2, 4, 32)
    assert np.array_equal(by_layer[0], by_layer[1])
    # Ids of "high" grow in threes, of "low" in ones.
    for tokens, names in zip(by_layer[0], trace.domain.reshape(2, 4, 32)[0], strict=True):
        steps = np.diff(tokens)
        assert np.median(steps[(steps > 0) & (steps < 4)]) == {"low": 1, "high": 3}[names[0]]
    config = tiny_config(["--micro-batch-size", "1"])
    seed = config.train.seed
    model = ReferenceOpenMoE(config.model, config.moe, PADDED_VOCAB, seed=seed)
    documents = torch.from_numpy(trace.document.reshape(2, 4, 32)[0]).long()
    assert int(documents.max()) > 0
    positions = torch.zeros_like(documents)
    for row in range(4):
        for place in range(1, 32):
            same = documents[row, place] == documents[row, place - 1]
            positions[row, place] = positions[row, place - 1] + 1 if same else 0
    with torch.no_grad():
        _, routing = model.hidden_states(
            torch.from_numpy(by_layer[0]).long(),
            training_capacity=True,
            positions_BS=positions,
            documents_BS=documents,
        )
    for index, layer in enumerate(routing):
        rows = slice(index * 128, (index + 1) * 128)
        assert (trace.layer[rows] == layer.layer).all()
        assert np.array_equal(trace.experts[rows], layer.ids_TK.numpy())
        assert np.array_equal(trace.kept[rows], layer.kept_TK.numpy())
        chosen = layer.router_probs_TE.gather(1, layer.ids_TK)
        np.testing.assert_allclose(trace.probabilities[rows], chosen.numpy(), rtol=1e-4)
    assert 0.2 < trace.kept.mean() < 0.9


SLOW = ("PP4",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LAYOUTS]
)
def test_a_replay_in_another_layout_repeats_the_routing_and_its_trace_is_equal(
    pool: Pool, domains: dict[str, str], whole: Path, tmp_path: Path, name: str
) -> None:
    """Steps 1, 3 and 4 take their choices from the trace; what they do is traced once more."""
    ranks, layout = LAYOUTS[name]
    flags = ["--routing-replay-dir", str(whole), *layout.split()]
    flags += ["--routing-trace-dir", str(tmp_path), "--routing-trace-steps", "1:4"]
    run(pool, ranks, arguments(domains, tmp_path, *flags))
    assert traced_steps(tmp_path) == [1, 2, 3, 4]
    for step in (1, 3, 4):
        found, about = read_step(tmp_path, step)
        assert about.files == len(trace_files(tmp_path, step))
        assert different(found, read_step(whole, step)[0]) == []
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=2e-5)


def test_other_choices_are_followed(
    pool: Pool, domains: dict[str, str], whole: Path, tmp_path: Path
) -> None:
    """The choices of a model with other weights: its loss changes, its choices do not."""
    other, again = tmp_path / "other", tmp_path / "again"
    traces = ["--routing-trace-steps", "1", "--routing-trace-dir"]
    seed = ["--router-init-method-std", "0.9"]
    run(pool, 1, arguments(domains, other, *traces, str(other), *seed))
    replay = ["--routing-replay-dir", str(other)]
    run(pool, 2, arguments(domains, again, *traces, str(again), *replay, *TP2.split()))
    first, found = read_step(other, 1)[0], read_step(again, 1)[0]
    assert different(first, read_step(whole, 1)[0]) == ["experts", "kept", "probabilities"]
    assert different(found, first) == ["probabilities"]
    assert losses(again)[0] != pytest.approx(losses(whole)[0], rel=1e-6)
    # The reference model, forced to the same choices, has that loss.
    config = tiny_config(["--micro-batch-size", "1"])
    model = ReferenceOpenMoE(config.model, config.moe, PADDED_VOCAB, seed=config.train.seed)
    sizes = (2, 4, 32, 2)
    tokens = torch.from_numpy(found.token_id.reshape(2, 4, 32)[0]).long()
    forced = torch.from_numpy(found.experts.reshape(sizes)).long()
    kept = torch.from_numpy(found.kept.reshape(sizes))
    choices = {1: forced[0].flatten(0, 1), 3: forced[1].flatten(0, 1)}
    with torch.no_grad(), replayed(model, choices):
        output = model(tokens, training_capacity=True)
    for index, layer in enumerate(output.routing):
        assert torch.equal(layer.ids_TK, forced[index].flatten(0, 1))
        assert torch.equal(layer.kept_TK, kept[index].flatten(0, 1))
    with torch.no_grad():
        free = model(tokens, training_capacity=True)
    assert not torch.equal(free.routing[0].ids_TK, choices[1])


def test_a_trace_of_other_samples_or_of_another_model_ends_the_run(
    pool: Pool, domains: dict[str, str], whole: Path, tmp_path: Path
) -> None:
    replay = ["--routing-replay-dir", str(whole)]
    for flags, said in (
        (["--seed", "77"], "trace of step 1: no or other tokens of samples 0 to 0"),
        (["--num-experts", "8"], r"trace of step 1: experts, choices and layers must be \(8, 2"),
    ):
        with pytest.raises(AssertionError, match=said):
            run(pool, 1, arguments(domains, tmp_path, *replay, *flags))


def test_another_layout_replaces_the_files_of_a_step(
    pool: Pool, domains: dict[str, str], whole: Path, tmp_path: Path
) -> None:
    traces = ["--routing-trace-dir", str(tmp_path), "--routing-trace-steps", "1"]
    for ranks in (2, 1):
        run(pool, ranks, arguments(domains, tmp_path, *traces))
        assert len(trace_files(tmp_path, 1)) == ranks
    assert different(read_step(tmp_path, 1)[0], read_step(whole, 1)[0]) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--routing-trace-dir", "x"], "--routing-trace-steps must be steps with"),
        (["--routing-trace-steps", "1"], "--routing-trace-steps must be used with"),
        (["--routing-trace-dir", "x", "--routing-trace-steps", "a"], "must be steps such as 10"),
        (
            ["--routing-trace-dir", "x", "--routing-trace-steps", "1", "--moe-layer-freq", "[0]*4"],
            "--routing-trace-dir must be unset without MoE layers",
        ),
        (["--routing-replay-dir", "x", "--moe-layer-freq", "[0]*4"], "unset without MoE layers"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        validate(tiny_config([*flags, "--data-path", "x"]))


def test_outputs_are_checked_before_the_run(whole: Path, tmp_path: Path) -> None:
    def check(*flags: str) -> None:
        check_outputs(tiny_config([*flags, "--routing-trace-steps", "1"]))

    with pytest.raises(UsageError, match="must be a directory with files of --routing-trace-dir"):
        check("--routing-replay-dir", str(tmp_path))
    with pytest.raises(UsageError, match="must be another than --routing-replay-dir"):
        check("--routing-replay-dir", str(whole), "--routing-trace-dir", str(whole))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--routing-trace-dir must be a directory"):
        check("--routing-trace-dir", str(tmp_path / "file"))


def test_a_full_disk_is_a_warning(pool: Pool, domains: dict[str, str], tmp_path: Path) -> None:
    """A directory that turns into a file: tracing ends, training does not."""
    folder = tmp_path / "traces"
    argv = arguments(domains, tmp_path, "--routing-trace-dir", str(folder))
    argv += ["--routing-trace-steps", "1:4"]
    out: Any = pool.run(traced_into_a_file, 1, argv=argv, folder=str(folder))[0]
    assert out.count("WARNING: --routing-trace-dir") == 1
    assert len(losses(tmp_path)) == STEPS


def traced_into_a_file(rank: int, world_size: int, *, argv: list[str], folder: str) -> str:
    from megatron_moe.training import tracing

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = tracing.write_trace
    tracing.write_trace = fails  # type: ignore[assignment]
    try:
        return pretrain_rank(rank, world_size, argv=argv)[1]
    finally:
        tracing.write_trace = before
