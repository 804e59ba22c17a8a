"""The micro-batches of one data-parallel rank, in an order that only the seed decides.

Step s of a run uses the samples [s * G, (s + 1) * G) of the blended order, G the global batch size.
Of these, micro-batch m of data-parallel rank r takes the B rows from m * B * DP + r * B on, so the
samples of a step are the same in every layout, and a run that stopped after n samples goes on with
sample n whatever its layout is then.

B sequences of a micro-batch, S tokens of a sequence.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from megatron_moe.config import RunConfig
from megatron_moe.config.rampup import BatchSizes
from megatron_moe.data.batch import Batch, extra_planes
from megatron_moe.data.blend import SPLITS, Blend, blends_of, usable
from megatron_moe.data.composition import Share, shares_of, text_per_row
from megatron_moe.data.datasets import build_split, cache_for
from megatron_moe.data.indexed.check import Source, inspect_source
from megatron_moe.data.indexed.made_for import check_manifest
from megatron_moe.data.indexed.scan import check_range, source_range
from megatron_moe.data.loader import MicroBatchSampler, Packed, Rows, build_loader, to_batch
from megatron_moe.data.objectives.chat_source import open_conversations
from megatron_moe.data.objectives.select import ObjectivePlan, plan_objective
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import Tokenizer
from megatron_moe.tokenizer.build import build_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Data:
    """What `build_data` gives a rank."""

    train: Iterator[Batch] | None
    """Micro-batches from `consumed_train_samples` to the end of the run; `None` if this rank does
    not read."""
    has_valid: bool
    """Whether there is validation data; the same on every rank."""
    has_test: bool
    identity: dict[str, Any]
    """What decides the order of training samples: content of the sources, weights, split, sequence
    length, seed, tokenizer, objective. Not paths, layout or length of the run."""
    shares: tuple[Share, ...]
    """What training samples are made of; the same on every rank."""
    domains: dict[str, dict[str, int]]
    """By split, what is evaluated by itself, and for how many global batches; the same on every
    rank. Nothing for training, and for data of one domain, whose loss is the split's."""
    extra: tuple[str, ...]
    """What batches hold besides tokens, labels and loss mask."""
    loaders: dict[str, DataLoader[Packed]]
    """Of the evaluation splits and, as `SPLIT/DOMAIN`, their domains; empty if this rank does not
    read."""

    @property
    def fingerprint(self) -> str:
        """Hash of `identity`."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def valid(self) -> Iterator[Batch] | None:
        """The validation micro-batches from the start, the same at each call.

        A call ends the iterator of the one before. `None` if there is no such data or this rank
        does not read.
        """
        return self._fresh("valid")

    def test(self) -> Iterator[Batch] | None:
        """Likewise for test data."""
        return self._fresh("test")

    def domain(self, split: str, name: str) -> Iterator[Batch] | None:
        """Likewise for one of `domains`: what `valid` would give if there were no other."""
        return self._fresh(f"{split}/{name}")

    def _fresh(self, name: str) -> Iterator[Batch] | None:
        if name not in self.loaders:
            return None
        return map(partial(to_batch, extra=self.extra), iter(self.loaders[name]))


def build_data(
    config: RunConfig,
    *,
    dp_rank: int,
    dp_size: int,
    num_microbatches: int,
    consumed_train_samples: int,
    reads_data: bool,
) -> Data:
    """Check all sources and open those that this rank reads. To be called on every rank.

    The checks are the same on every rank and communicate nothing, so bad data ends every rank with
    the same line.

    Args:
        config: the run's.
        dp_rank: this rank's place among the data-parallel ranks.
        dp_size: their number.
        num_microbatches: micro-batches of one step.
        consumed_train_samples: where to go on.
        reads_data: whether this rank gives batches to the model: tensor-parallel rank 0 of the
            first and last pipeline stage, and of every stage if there are `extra_planes`.

    Raises:
        UsageError: missing, broken or empty data, ids beyond the vocabulary, flags in conflict.
    """
    tokenizer = build_tokenizer(config.data)
    plan = plan_objective(config, tokenizer)
    blends, sources = _check(config, tokenizer, plan)
    rows = Rows(
        micro_batch_size=config.train.micro_batch_size,
        num_microbatches=num_microbatches,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    opener = _Opener(config, tokenizer, plan, sources, rows)
    parts = {name: _parts(name, blend, config) for name, blend in blends.items()}
    loaders: dict[str, DataLoader[Packed]] = {}
    if reads_data:
        loaders = opener.loaders(blends, parts, consumed_train_samples)
    train, extra = loaders.pop("train", None), extra_planes(config.objective)
    assert blends["train"] is not None
    return Data(
        train=None if train is None else map(partial(to_batch, extra=extra), iter(train)),
        has_valid=blends["valid"] is not None,
        has_test=blends["test"] is not None,
        identity=_identity(blends["train"], config, tokenizer, sources) | plan.identity,
        shares=shares_of(
            blends["train"],
            sources,
            config.data.seq_length,
            _samples_of("train", config, rows),
            text_per_row(config, tokenizer),
        ),
        domains={
            name: dict.fromkeys(own, config.train.used_domain_eval_iters(len(own)))
            for name, own in parts.items()
        },
        extra=extra,
        loaders=loaders,
    )


@dataclass(frozen=True)
class _Opener:
    """What all loaders of a rank have in common."""

    config: RunConfig
    tokenizer: Tokenizer
    plan: ObjectivePlan
    sources: dict[str, Source]
    rows: Rows

    def loaders(
        self,
        blends: dict[str, Blend | None],
        parts: dict[str, dict[str, Blend]],
        consumed: int,
    ) -> dict[str, DataLoader[Packed]]:
        """Of every split, and as `SPLIT/DOMAIN` of what is evaluated by itself."""
        found: dict[str, DataLoader[Packed]] = {}
        for name, blend in blends.items():
            if blend:
                training, samples = name == "train", _samples_of(name, self.config, self.rows)
                start = consumed if training else 0
                found[name] = self._loader(name, blend, start, samples, persistent=not training)
            iterations = self.config.train.used_domain_eval_iters(len(parts[name]))
            samples = iterations * self.rows.global_batch_size
            for domain, part in parts[name].items():
                # Its workers start and end with each evaluation: there may be many domains.
                found[f"{name}/{domain}"] = self._loader(name, part, 0, samples, persistent=False)
        return found

    def _loader(
        self, name: str, blend: Blend, start: int, samples: int, persistent: bool
    ) -> DataLoader[Packed]:
        """Samples ``start`` to ``samples`` of a blend, in the rows of this rank."""
        config = self.config
        dataset = build_split(name, blend, samples, config, self.tokenizer, self.sources, self.plan)
        sampler = MicroBatchSampler(_step_rows(name, config, self.rows), start, samples)
        return build_loader(dataset, sampler, config.data.num_workers, persistent)


def _parts(name: str, blend: Blend | None, config: RunConfig) -> dict[str, Blend]:
    """The domains of a split that are evaluated by themselves."""
    if blend is None or name == "train":
        return {}
    parts = blend.by_domain()
    return parts if config.train.used_domain_eval_iters(len(parts)) else {}


def _check(
    config: RunConfig, tokenizer: Tokenizer, plan: ObjectivePlan
) -> tuple[dict[str, Blend | None], dict[str, Source]]:
    """The blends that can be used and all their sources, looked through."""
    blends = blends_of(config.data)
    if config.train.eval_iters == 0:
        blends.update(valid=None, test=None)
    sources: dict[str, Source] = {}
    for prefix in (prefix for blend in blends.values() if blend for prefix in blend.prefixes):
        if prefix not in sources:
            sources[prefix] = _open(prefix, config, tokenizer, plan.token_limit)
    kept = {name: usable(name, blends[name], config.data.split, sources) for name in SPLITS}
    if blends["test"] and not kept["test"]:
        logger.warning("--split %s leaves no test data", config.data.split)
    return kept, sources


def _open(prefix: str, config: RunConfig, tokenizer: Tokenizer, limit: int) -> Source:
    """A source without a fault: indexed data, or conversations."""
    cache = cache_for(prefix, config)
    if config.objective.objective == "sft":
        return open_conversations(prefix, config.objective.sft_key, tokenizer, cache)
    try:
        source = inspect_source(prefix)
    except UsageError as error:
        if error.what != "data path" or not config.data.mixture:
            raise
        fix = f"{error.fix}; --data-root says where the prefixes of --mixture are"
        raise UsageError(error.what, prefix, error.expected, fix) from None
    check_manifest(prefix, config, tokenizer)
    found = source_range(source, cache)
    check_range(source, found, limit)
    return source


def _samples_of(name: str, config: RunConfig, rows: Rows) -> int:
    """Samples to draw from a split during the whole run."""
    if name != "train":
        return config.train.eval_iters * rows.global_batch_size
    if config.train.train_samples is not None:
        return config.train.train_samples
    if config.train.train_iters is not None:
        sizes = BatchSizes.of(config.train, rows.global_batch_size)
        return sizes.samples_of(config.train.train_iters)
    raise UsageError("--train-iters", None, "a number of steps, or --train-samples")


def _step_rows(name: str, config: RunConfig, rows: Rows) -> Rows:
    """With a batch-size ramp-up a training step takes as many micro-batches as it needs.

    They are rows of the order one after the other, whatever step they belong to.
    """
    ramps = name == "train" and config.train.rampup_batch_size is not None
    return replace(rows, num_microbatches=1) if ramps else rows


def _identity(
    train: Blend, config: RunConfig, tokenizer: Tokenizer, sources: dict[str, Source]
) -> dict[str, Any]:
    return {
        "sources": [sources[prefix].fingerprint for prefix in train.prefixes],
        "weights": None if train.weights is None else list(train.weights),
        "documents": list(train.bounds),
        "seq_length": config.data.seq_length,
        "seed": config.train.seed,
        "tokenizer": tokenizer.identity,
    }
