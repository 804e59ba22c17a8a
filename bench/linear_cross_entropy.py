"""Logits and loss, forward and backward, fp32 on this device: in chunks against all at once.

    python -m bench.linear_cross_entropy

`whole` holds all logits from the forward pass to the backward pass. `ours` computes a chunk at a
time and again in the backward pass, `gradients in forward` computes gradients with the logits, and
holds that of the weight. Rounds are interleaved, ratios are taken within a round.
"""

from __future__ import annotations

import statistics

from bench._loss_cases import Case
from bench._one_rank import one_rank
from bench._own_process import in_own_process
from bench.moe_layer import interleaved_seconds, median_ratio, peak_mib
from bench.record import Record
from bench.train_step import configuration
from megatron_moe.model.logits_chunks import chunk_tokens

SHAPES = ((1024, 4096, 256), (2048, 131072, 256))
"""Tokens, vocabulary and hidden size: a micro-batch of the tiny preset, and half of umT5's
vocabulary, whose logits are 1 GiB here."""
SECONDS, ROUNDS = 40.0, (5, 100)
SLOWER = 1.05
"""Bound on the time where one chunk holds all logits."""


def _measured(shape: tuple[int, int, int], chunk: int) -> list[Record]:
    """One shape with one size of chunks, in a process of its own."""
    case = Case(*shape)
    with one_rank(configuration("t5x"), 4096):
        steps = case.steps(chunk)
        times = interleaved_seconds(steps, SECONDS, ROUNDS)
        memory = {name: peak_mib(step) for name, step in steps.items()}
    prefix = f"linear_cross_entropy/{case.name}, chunks of {min(chunk, case.tokens)}"
    ratios = {name: median_ratio(times[name], times["whole"]) for name in steps if name != "whole"}
    records = []
    for name, ratio in ratios.items():
        held = name == "ours" and chunk >= case.tokens
        target, met = (f"<= {SLOWER}", ratio <= SLOWER) if held else ("", None)
        label = f"{prefix}/{name} over whole"
        records.append(Record(name=label, value=ratio, unit="x", target=target, met=met))
    for name, seconds in times.items():
        milliseconds = 1e3 * statistics.median(seconds)
        records.append(Record(name=f"{prefix}/{name}", value=milliseconds, unit="ms"))
        records.append(Record(name=f"{prefix}/{name}/peak", value=memory[name], unit="MiB"))
    return records


def records() -> list[Record]:
    """Times and peaks of each shape, with derived chunks and with chunks of 256 tokens."""
    found = []
    for shape in SHAPES:
        for chunk in dict.fromkeys((chunk_tokens(shape[1]), 256)):
            found += in_own_process(_measured, shape, chunk)
    return found


if __name__ == "__main__":
    from bench.run import table

    print(table(records()))
