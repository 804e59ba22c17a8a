"""A captured step: repeated operations give what each step computes anew; what cannot be captured.

Graphs are `tests/support/recorded.py` here, and CUDA's in the test marked `gpu`.
"""

from __future__ import annotations

import pytest
import torch

from megatron_moe.config.cli import parse_args
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.training.captured import CapturedPasses, check_device
from tests.support.pool import Pool
from tests.training.captured_ranks import several_steps
from tests.training.tiny import MODEL

FULL = ["--cuda-graph", "full", "--transformer-impl", "local"]
FIXED = ["--kernel-impl", "reference", "--moe-expert-impl", "batched"]
EP2 = ["--expert-model-parallel-size", "2"]
CASES = {
    "1": (1, FIXED),
    "EP2": (2, [*FIXED, *EP2]),
}
MORE = {
    "overlapped": (2, [*FIXED, *EP2, "--moe-a2a-overlap-chunks", "2"]),
    "dropless": (1, [*FIXED, "--moe-expert-capacity-factor", "None"]),
    "probs": (1, [*FIXED, "--moe-token-drop-policy", "probs"]),
    "bf16": (1, [*FIXED, "--bf16"]),
}


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_repeated_steps_are_those_computed_anew(pool: Pool, name: str) -> None:
    """Losses, norms, weights and statistics of five steps on different data, bit for bit."""
    world, flags = {**CASES, **MORE}[name]
    expected = pool.run(several_steps, world, flags=[*flags, *FULL], captured=False)
    found = pool.run(several_steps, world, flags=[*flags, *FULL], captured=True)
    for one, other in zip(expected, found, strict=True):
        assert one == other
        assert len(set(one["sums"])) == 5, "the steps must differ"


def test_micro_batches_are_copied_into_those_of_the_capture() -> None:
    """By hand: a recording that only counts; the third step is captured."""
    from megatron_moe.data.batch import Batch

    calls: list[str] = []

    class Noted:
        def record(self, work) -> None:
            calls.append("record")
            work()

        def replay(self) -> None:
            calls.append("replay")

    def batch(value: int) -> Batch:
        return Batch(*(torch.full((1, 2), value) for _ in range(2)), torch.full((1, 2), 1.0))

    seen: list[Batch] = []

    def passes(batches, targets):
        seen.append(batches[0])
        return targets

    captured = CapturedPasses(Noted, warm_up=2)
    results = [captured.run([batch(v)], torch.tensor(float(v)), passes) for v in range(5)]
    assert calls == ["record", "replay", "replay", "replay"]
    assert [b.tokens_BS[0, 0].item() for b in seen] == [0, 1, 4]
    assert results[2] is results[4]
    assert results[4].item() == 4.0


REFUSED = {
    "--hidden-dropout 0.1": (
        "--hidden-dropout must be 0.0 with --cuda-graph full (got 0.1);"
        " the host decides it anew in each step"
    ),
    "--moe-token-drop-policy random": (
        "--moe-token-drop-policy must be another one with --cuda-graph full"
        " (got 'random'); the host decides it anew in each step"
    ),
    "--tensor-model-parallel-size 2 --sequence-parallel": (
        "--sequence-parallel must be unset with --cuda-graph full (got True);"
        " Megatron-Core reads random states around the embedding"
    ),
    "--pipeline-model-parallel-size 2": (
        "--pipeline-model-parallel-size must be 1 with --cuda-graph full (got 2);"
        " it has not been captured yet"
    ),
    "--moe-token-dispatcher-type deepep": (
        "--moe-token-dispatcher-type must be alltoall with --cuda-graph full (got 'deepep');"
        " the host waits for the device"
    ),
    "--moe-router-document-pool 2 4": (
        "--moe-router-document-pool must be unset with --cuda-graph full (got (2, 4));"
        " the host decides it anew in each step"
    ),
    "--overlap-grad-reduce": (
        "--overlap-grad-reduce must be unset with --cuda-graph full (got True);"
        " the host decides it anew in each step"
    ),
    "--timing-log-level 2": (
        "--timing-log-level must be 0 or 1 with --cuda-graph full (got 2);"
        " the host waits for the device"
    ),
    "--transformer-impl auto": (
        "--transformer-impl must be local with --cuda-graph full (got 'auto');"
        " it has not been captured yet"
    ),
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_be_captured_is_refused(flags: str) -> None:
    with pytest.raises(UsageError) as error:
        validate(parse_args([*MODEL, *FULL, *flags.split()]).config)
    assert str(error.value) == REFUSED[flags]


def test_a_cpu_has_no_graphs() -> None:
    config = parse_args([*MODEL, *FULL]).config
    check_device(config, "cuda")
    with pytest.raises(UsageError, match=r"--cuda-graph must be none without a CUDA device"):
        check_device(config, "cpu")


@pytest.mark.gpu
def test_a_gpu_repeats_a_captured_step() -> None:
    """On one GPU; kernels are the same, but sums may be in another order."""
    expected = several_steps(0, 1, flags=FULL, captured=False)
    found = several_steps(0, 1, flags=FULL, captured=True)
    for one, other in zip(expected["norms"], found["norms"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert expected["statistics"].keys() == found["statistics"].keys()
    assert found["ledger"]
