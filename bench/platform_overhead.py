"""The cost of running Megatron-Core on a CPU: with our patches, and with a `TorchFunctionMode`.

    python -m bench.platform_overhead

Two measurements: a training step with the patches (literals replaced in Megatron-Core's compiled
code), and under a `TorchFunctionMode` that rewrites `device="cuda"` in every torch call, in CPU
seconds on one thread; and the import of Megatron-Core as it is, and by `activate`, which does not
load torch's compiler.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bench._one_rank import one_rank
from bench.record import Record
from bench.train_step import VOCAB, configuration, training_step
from megatron_moe.config import RunConfig

ROUNDS = 15
IMPORTS = 3
IMPORT = "import time, torch; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


class RewriteEverything(TorchFunctionMode):
    """The alternative to patches: every torch call goes through here."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` with "cuda" replaced by "cpu" where it is the device."""
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and "cuda" in str(device):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def _caught(step: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        with RewriteEverything():
            step()

    return run


def _small(config: RunConfig) -> RunConfig:
    """The same model, so small that the cost of calls dominates."""
    return replace(
        config,
        model=replace(config.model, hidden_size=64, ffn_hidden_size=128, kv_channels=16),
        moe=replace(config.moe, moe_shared_expert_intermediate_size=128),
        data=replace(config.data, seq_length=64),
    )


def _cpu_medians(steps: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median CPU seconds of each, run in turn, so that other load affects all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(ROUNDS):
        for name, step in steps.items():
            before = time.process_time()
            step()
            times[name].append(time.process_time() - before)
    return {name: statistics.median(values) for name, values in times.items()}


def _step_record(name: str, config: RunConfig) -> Record:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with one_rank(config, VOCAB) as ctx:
            step = training_step(config, ctx, None)
            medians = _cpu_medians({"ours": step, "mode": _caught(step)})
    finally:
        torch.set_num_threads(threads)
    ratio = medians["mode"] / medians["ours"]
    return Record(name=f"platform/{name}/under a TorchFunctionMode", value=ratio, unit="x ours")


def _import_seconds(code: str) -> float:
    """Seconds of a statement in a fresh interpreter that has imported torch."""
    command = [sys.executable, "-W", "ignore", "-c", IMPORT.format(code)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _import_records() -> list[Record]:
    ways = {
        "engine as it is": "import megatron.core",
        "activate": "from megatron_moe.platform import activate; activate()",
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(IMPORTS):
        for name, code in ways.items():
            times[name].append(_import_seconds(code))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["engine as it is"] / medians["activate"]
    return [
        *(
            Record(name=f"platform/import/{name}", value=seconds, unit="s")
            for name, seconds in medians.items()
        ),
        Record(
            name="platform/import/as it is over activate",
            value=ratio,
            unit="x",
            target=">= 1.2",
            met=ratio >= 1.2,
        ),
    ]


def records() -> list[Record]:
    """Import times, and ratios of whole steps."""
    tiny = configuration("t5x")
    return [
        *_import_records(),
        _step_record("tiny preset", tiny),
        _step_record("small model", _small(tiny)),
    ]


if __name__ == "__main__":
    from bench.run import table

    print(table(records()))
