"""A whole step reads nothing on the host but the norm of the gradient, so it can be captured.

On the emulated device, which takes the code path of a GPU: forward and backward of the whole model,
gradient reduction, clipping and the update, with real values and real collectives.
"""

from __future__ import annotations

import pytest
from torch import Tensor

from megatron_moe.moe import experts
from tests.support.emulated_gpu import HostRead, HostReads, emulated_gpu
from tests.support.pool import Pool
from tests.training.emulated import step_with_reads, step_without_emulation

REFERENCE = ["--kernel-impl", "reference"]
CASES = {
    "1": (1, []),
    "bf16": (1, ["--bf16"]),
    "adafactor": (1, ["--optimizer", "adafactor"]),
    "muon": (1, ["--optimizer", "muon", "--muon-fp32-matmul-prec", "highest"]),
    "dropless": (1, ["--moe-expert-capacity-factor", "None"]),
    "probs": (1, ["--moe-token-drop-policy", "probs"]),
    "recomputed": (1, ["--recompute-granularity", "selective", "--recompute-modules", "moe"]),
    "grouped": (
        2,
        [
            *("--expert-model-parallel-size", "2", "--moe-expert-impl", "grouped"),
            *("--moe-expert-capacity-factor", "None", "--moe-dropless-buffer-factor", "1.1"),
        ],
    ),
    "overlapped": (
        2,
        [
            *("--expert-model-parallel-size", "2", "--moe-expert-impl", "batched"),
            *("--moe-a2a-overlap-chunks", "2", "--moe-shared-expert-placement", "parallel"),
        ],
    ),
    "captured": (1, ["--cuda-graph", "full", "--transformer-impl", "local"]),
    "EP2": (2, ["--expert-model-parallel-size", "2"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_reads_the_gradient_norm_alone(pool: Pool, name: str) -> None:
    world, more = CASES[name]
    flags = [*REFERENCE, *more]
    found = pool.run(step_with_reads, world, flags=flags, allowed=("grad_norm",))
    expected = pool.run(step_without_emulation, world, flags=flags)
    within = 2e-2 if name == "bf16" else 1e-5
    for (sums, norm, reads), (same_sums, same_norm) in zip(found, expected, strict=True):
        assert reads == [("aten::_local_scalar_dense", "grad_norm")]
        assert sums == pytest.approx(same_sums, rel=within)
        assert norm == pytest.approx(same_norm, rel=within)


def test_row_counts_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU does: choosing by loads, which reads them."""
    from tests.moe.cases import layer_of, moe_config, tokens

    def readable(x: Tensor) -> bool:
        return True

    with emulated_gpu(gradients=True):
        layer, x = layer_of(moe_config()).to("cuda"), tokens(1).to("cuda")
        with HostReads():
            layer(x).sum().backward()
        monkeypatch.setattr(experts, "is_readable", readable)
        with HostReads(), pytest.raises(HostRead, match="tolist"):
            layer(x)
