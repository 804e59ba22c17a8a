"""The held-out loss of a unigram model, the first baseline that a language model must beat.

Token frequencies are those of all training documents (blended by the weights of their sources, plus
one count for every id of the vocabulary, so that unseen ids have a finite loss). The loss is taken
over exactly the held-out targets that a run with this configuration evaluates on. A run with phases
has a baseline for each, since each has its own data, objective and batches.
V is the size of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from megatron_moe.config import RunConfig
from megatron_moe.config.phases import errors_of_phase, place_of, read_phases
from megatron_moe.data.blend import Blend, blends_of
from megatron_moe.data.indexed.check import Source, inspect_source
from megatron_moe.data.indexed.format import paths_of
from megatron_moe.data.pipeline import build_data
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.build import build_tokenizer, unpadded_vocab_size

Counts = npt.NDArray[np.float64]

_CHUNK = 1 << 24
"""Tokens counted at once."""


@dataclass(frozen=True, kw_only=True)
class UnigramLoss:
    """A baseline, and the number of tokens that it is based on."""

    loss: float
    """Cross entropy in nats per held-out target."""
    targets: int
    """Held-out targets."""
    training_tokens: int
    """Tokens counted."""
    phase: str = ""
    """Name of the phase; empty for a run without phases."""


def unigram_loss(config: RunConfig, phase: str | None = None) -> UnigramLoss:
    """The held-out loss of the unigram model.

    Args:
        config: data, batch sizes and `--eval-iters` of the run to compare with.
        phase: name or number (from 1) of a phase of the run; `None` selects the last one.

    Raises:
        UsageError: the data cannot be used, nothing is held out, or there is no such phase.
    """
    if config.train.stages is None:
        if phase is not None:
            raise UsageError("--phase", phase, "unset for a run without phases")
        return _of_one(config)
    specs = read_phases(config.train.stages)
    spec = specs[-1] if phase is None else specs[place_of(phase, [s.name for s in specs])]
    # Held-out samples do not depend on the length of the phase.
    train = replace(config.train, stages=None, train_iters=1, train_samples=None)
    with errors_of_phase(spec.label):
        return replace(_of_one(spec.applied(replace(config, train=train))), phase=spec.name)


def _of_one(config: RunConfig) -> UnigramLoss:
    """The baseline of a configuration without phases."""
    if config.objective.objective == "sft":
        expected = "an objective over indexed data, whose tokens can be counted"
        raise UsageError("--objective", "sft", expected, "--phase selects another phase")
    vocab_size = unpadded_vocab_size(config.data, build_tokenizer(config.data))
    blend = blends_of(config.data)["train"]
    if blend is None:
        raise UsageError("--data-path", None, "the prefixes of training data")
    held_out = held_out_counts(config, vocab_size)
    frequencies, tokens = training_frequencies(blend, vocab_size)
    targets = held_out.sum()
    if targets == 0:
        expected = "> 0, with validation data that has targets"
        raise UsageError("--eval-iters", config.train.eval_iters, expected)
    loss = -(held_out * np.log(frequencies)).sum() / targets
    return UnigramLoss(loss=float(loss), targets=int(targets), training_tokens=tokens)


def held_out_counts(config: RunConfig, vocab_size: int) -> Counts:
    """How often each id [V] is a target of the validation set."""
    micro = config.train.micro_batch_size
    data = build_data(
        config,
        dp_rank=0,
        dp_size=1,
        num_microbatches=(config.train.global_batch_size or micro) // micro,
        consumed_train_samples=0,
        reads_data=True,
    )
    counts = np.zeros(vocab_size)
    for batch in data.valid() or ():
        targets = batch.labels_BS[batch.loss_mask_BS > 0].numpy()
        counts += np.bincount(targets, minlength=vocab_size)
    return counts


def training_frequencies(blend: Blend, vocab_size: int) -> tuple[Counts, int]:
    """Smoothed probability of each id [V] in the training documents, and how many were counted."""
    sources = [inspect_source(prefix) for prefix in blend.prefixes]
    counts = [source_counts(source, blend.bounds, vocab_size) for source in sources]
    totals = [float(c.sum()) for c in counts]
    tokens = sum(totals)
    weights = blend.weights or totals
    mixed = np.zeros(vocab_size)
    for weight, count, total in zip(weights, counts, totals, strict=True):
        mixed += weight / sum(weights) * tokens * count / total
    return (mixed + 1.0) / (tokens + vocab_size), int(tokens)


def source_counts(source: Source, bounds: tuple[float, float], vocab_size: int) -> Counts:
    """How often each id [V] occurs between two shares of a source's documents."""
    first, last = (round(bound * float(source.sequences)) for bound in bounds)
    lengths = source.lengths()
    start = int(lengths[:first].sum(dtype=np.int64))
    stop = start + int(lengths[first:last].sum(dtype=np.int64))
    tokens = np.memmap(paths_of(source.prefix)[0], source.dtype, "r")
    counts = np.zeros(vocab_size)
    for begin in range(start, stop, _CHUNK):
        part = np.asarray(tokens[begin : min(begin + _CHUNK, stop)])
        counts += np.bincount(part, minlength=vocab_size)
    return counts
