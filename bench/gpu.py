"""What only a GPU can show: the Triton kernels, the MoE layer and a step at the size of OpenMoE-8B.

    make bench-gpu

- every kernel's bytes per second as a share of a plain copy's, with the least bytes that the
  operation could move (`fused_kernels/triton/cases.py`); dispatch and combine are held to 85%;
- dispatch and combine, forward, against Megatron-Core's unfused permute and unpermute;
- the MoE layer against Megatron-Core's with the same capacity;
- a step of a model with the widths of OpenMoE-8B and two layers: its MFU.

Not part of `make bench`. Without a GPU it is an error in one line.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench._moe_layer_cases import CAPACITY_FACTOR, Shape, Step, our_layer, stock_layer
from bench._one_rank import one_rank
from bench.record import Record
from megatron_moe.config import RunConfig
from megatron_moe.errors import USAGE_EXIT_CODE, UsageError

COPY_SHARE = 0.85
PERMUTE_SPEEDUP = 3.0
LAYER_SPEEDUP = 1.3
MFU = 0.45
COPIED_BYTES = 1 << 30
"""Of the copy that kernels are compared with: more than any cache."""
PRESET = "openmoe-8b-32e"
LAYER = Shape(32, 2, 8192, 2048, 8192)
"""An MoE layer of OpenMoE-8B with 8192 tokens."""


@dataclass(frozen=True)
class Clock:
    """Measures calls on a device: the median of several, each until the device has ended it.

    Args:
        device: where they run.
        rounds: that count, after three that do not.
    """

    device: torch.device
    rounds: int = 50

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call."""
        for _ in range(3):
            call()
        return statistics.median(self._one(call) for _ in range(self.rounds))

    def _one(self, call: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        # Events lie on the stream: the time that the host takes to launch does not count twice.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3


def copy_bandwidth(clock: Clock, size: int = COPIED_BYTES) -> float:
    """Bytes that a copy reads and writes in a second."""
    source = torch.empty(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / clock.seconds(lambda: target.copy_(source))


def kernels(clock: Clock, size: Any, copied: int = COPIED_BYTES) -> list[Record]:
    """The share of a copy's bandwidth that each operation reaches with its least bytes."""
    from fused_kernels.triton.cases import CASES

    bandwidth = copy_bandwidth(clock, copied)
    found = [Record(name="gpu/copy", value=bandwidth / 1e9, unit="GB/s")]
    for case in CASES:
        reached = case.least(size) / clock.seconds(case.run(size, clock.device)) / bandwidth
        name = f"gpu/{case.name}/share of a copy"
        if case.name.startswith(("dispatch", "combine")):
            target, met = f">= {COPY_SHARE}", reached >= COPY_SHARE
            found.append(Record(name=name, value=reached, unit="x", target=target, met=met))
        else:
            found.append(Record(name=name, value=reached, unit="x"))
    return found


def permutation(clock: Clock, size: Any) -> list[Record]:
    """Dispatch and combine against Megatron-Core's permute and unpermute of the same choices."""
    from megatron.core.transformer.moe.moe_utils import permute, unpermute

    from fused_kernels.triton import combine_tokens, dispatch_tokens
    from fused_kernels.triton.sizes import choices_of, values

    x_TH = values(size, clock.device, size.tokens, size.hidden)
    weights_TK, rows_TK, kept_TK, source_R = choices_of(size, clock.device)
    chosen_TE = torch.zeros(size.tokens, size.experts, dtype=torch.bool, device=clock.device)
    first_T1 = torch.arange(size.tokens, device=clock.device).unsqueeze(1) % size.experts
    for k in range(size.topk):
        chosen_TE.scatter_(1, (first_T1 + k) % size.experts, True)
    probs_TE = chosen_TE.float()

    def ours() -> None:
        rows_RH = dispatch_tokens.forward(x_TH, source_R)
        combine_tokens.forward(rows_RH, weights_TK, rows_TK, kept_TK)

    def stock() -> None:
        rows, _, order = permute(x_TH, chosen_TE, num_out_tokens=size.choices)
        unpermute(rows, order, x_TH.shape, probs=probs_TE, routing_map=chosen_TE)

    speedup = clock.seconds(stock) / clock.seconds(ours)
    return [_at_least("gpu/speedup on unfused permute", speedup, PERMUTE_SPEEDUP)]


def layer(clock: Clock, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> list[Record]:
    """One MoE layer, both passes, against Megatron-Core's with as many slots."""
    with one_rank(RunConfig()) as ctx:
        x_SBH = shape.tokens_SBH(seed=1).to(clock.device, dtype)
        layers = (
            our_layer(shape, "port", CAPACITY_FACTOR),
            stock_layer(shape, CAPACITY_FACTOR, ctx.pgs),
        )
        ours, stock = (clock.seconds(Step(one.to(clock.device, dtype), x_SBH)) for one in layers)
    return [
        Record(name="gpu/layer/ours", value=1e3 * ours, unit="ms"),
        Record(name="gpu/layer/stock capacity", value=1e3 * stock, unit="ms"),
        _at_least("gpu/layer/speedup on stock capacity", stock / ours, LAYER_SPEEDUP),
    ]


def step(clock: Clock, config: RunConfig) -> list[Record]:
    """A training step: tokens a second, and MFU if the peak of the device is known."""
    from bench.train_step import VOCAB, training_step
    from megatron_moe.model.counting import flops_per_token
    from megatron_moe.platform.device import peak_tflops

    with one_rank(config, VOCAB) as ctx:
        seconds = clock.seconds(training_step(config, ctx, None))
        tokens = ctx.layout.global_batch_size * config.data.seq_length
    found = [Record(name="gpu/step/tokens", value=tokens / seconds, unit="tokens/s")]
    peak = peak_tflops(clock.device, config.train.bf16)
    if peak is None:
        return found
    arithmetic = flops_per_token(config.model, config.moe, VOCAB, config.data.seq_length).training
    reached = tokens / seconds * arithmetic / (peak * 1e12)
    return [*found, _at_least("gpu/step/MFU", reached, MFU)]


def step_config() -> RunConfig:
    """Two layers of OpenMoE-8B, a dense one and one with experts, in bfloat16."""
    from megatron_moe.config.presets import PRESETS

    run = PRESETS[PRESET]
    return replace(
        run,
        model=replace(run.model, num_layers=2),
        moe=replace(run.moe, moe_layer_freq="[0,1]"),
        train=replace(run.train, micro_batch_size=4, global_batch_size=4, bf16=True),
    )


def _at_least(name: str, value: float, least: float) -> Record:
    return Record(name=name, value=value, unit="x", target=f">= {least}", met=value >= least)


def main() -> int:
    """Measure and print; 2 without a GPU."""
    if not torch.cuda.is_available():
        error = UsageError("this device", "no CUDA device", "a GPU", "`make bench` needs none")
        print(f"bench.gpu: error: {error}", file=sys.stderr)
        return USAGE_EXIT_CODE
    from bench.run import table
    from fused_kernels.triton.sizes import OPENMOE_8B

    clock = Clock(torch.device("cuda"))
    print(torch.cuda.get_device_name(clock.device))
    records = [
        *kernels(clock, OPENMOE_8B),
        *permutation(clock, OPENMOE_8B),
        *layer(clock, LAYER),
        *step(clock, step_config()),
    ]
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
