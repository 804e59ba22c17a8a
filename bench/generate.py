"""Decoding speed with and without the KV cache, in tokens per second, one text at a time.

    python -m bench.generate

The model is the tiny preset in its released variant; 128 tokens are generated after a prompt of
128. Without the cache every new token costs a forward pass over the whole text. Runs alternate, and
the median of three is reported.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

from bench.record import Record
from megatron_moe.config.presets import PRESETS
from megatron_moe.inference.generation import GREEDY, GenerationConfig, generate
from megatron_moe.model.reference import ReferenceOpenMoE

VOCAB, PROMPT, NEW = 8192, 128, 128
RATIO = 3.0
"""About half of the 5.6 measured on one core, to allow for a busy machine."""


def _model() -> ReferenceOpenMoE:
    config = PRESETS["openmoe-tiny-released"]
    moe = replace(config.moe, moe_eval_capacity_factor=None)
    return ReferenceOpenMoE(config.model, moe, VOCAB).eval()


def _seconds(model: ReferenceOpenMoE, use_cache: bool, texts: int = 1) -> float:
    # An end of document that is never sampled, so that no text ends early.
    config = GenerationConfig(
        max_new_tokens=NEW, vocab_size=VOCAB, eod=-1, sampling=GREEDY, use_cache=use_cache
    )
    prompts = [[(7 * place + text) % VOCAB for place in range(PROMPT)] for text in range(texts)]
    before = time.perf_counter()
    tokens = list(generate(model, prompts, config, [0] * texts))
    seconds = time.perf_counter() - before
    assert len(tokens) == NEW * texts
    return seconds


def records() -> list[Record]:
    """Tokens per second, and the ratio."""
    model = _model()
    _seconds(model, use_cache=True)
    pairs = [(_seconds(model, use_cache=True), _seconds(model, use_cache=False)) for _ in range(3)]
    cached, uncached = (statistics.median(times) for times in zip(*pairs, strict=True))
    batch = statistics.median(_seconds(model, use_cache=True, texts=8) for _ in range(3))
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
