"""What the cache is worth: tokens per second of decoding with it and without, one text at a time.

    python -m bench.generate

The model has the sizes of the tiny preset in its released variant, the prompt 128 tokens, and 128
are added. Without a cache every new token costs a pass over the whole text. Runs take turns, and
the median of three counts.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

from bench.record import Record
from megatron_moe.config.presets import PRESETS
from megatron_moe.inference.generation import Rules, generate
from megatron_moe.inference.sampling import GREEDY
from megatron_moe.model.reference import ReferenceOpenMoE

VOCAB, PROMPT, NEW = 8192, 128, 128
RATIO = 3.0
"""About half of what one core measured, 5.6, so that a busy machine does not decide it."""


def _model() -> ReferenceOpenMoE:
    config = PRESETS["openmoe-tiny-released"]
    moe = replace(config.moe, moe_eval_capacity_factor=None)
    return ReferenceOpenMoE(config.model, moe, VOCAB).eval()


def _seconds(model: ReferenceOpenMoE, cached: bool, texts: int = 1) -> float:
    # An id that no logits are drawn for ends no text early.
    rules = Rules(tokens=NEW, vocab_size=VOCAB, eod=-1, sampling=GREEDY, cached=cached)
    prompts = [[(7 * place + text) % VOCAB for place in range(PROMPT)] for text in range(texts)]
    before = time.perf_counter()
    drawn = list(generate(model, prompts, rules, [0] * texts))
    seconds = time.perf_counter() - before
    assert len(drawn) == NEW * texts
    return seconds


def records() -> list[Record]:
    """Tokens per second, and the ratio."""
    model = _model()
    _seconds(model, cached=True)
    pairs = [(_seconds(model, cached=True), _seconds(model, cached=False)) for _ in range(3)]
    cached, uncached = (statistics.median(times) for times in zip(*pairs, strict=True))
    batch = statistics.median(_seconds(model, cached=True, texts=8) for _ in range(3))
    ratio = uncached / cached
    return [
        Record(name="generate/with a cache", value=NEW / cached, unit="tokens/s"),
        Record(name="generate/without", value=NEW / uncached, unit="tokens/s"),
        Record(
            name="generate/cached over uncached",
            value=ratio,
            unit="x",
            target=f">= {RATIO}",
            met=ratio >= RATIO,
        ),
        Record(name="generate/8 texts with a cache", value=8 * NEW / batch, unit="tokens/s"),
    ]


if __name__ == "__main__":
    from bench.run import table

    print(table(records()))
