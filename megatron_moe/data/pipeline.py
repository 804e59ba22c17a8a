"""The micro-batches of one data-parallel rank, in an order that the seed alone decides.

`build_data` checks all sources on every rank and opens the loaders of this rank. The order of
samples is that of the blend (`blend`, `causal`); which of them a rank reads is in `loader`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from megatron_moe.config import RunConfig
from megatron_moe.config.rampup import BatchSizes
from megatron_moe.data.batch import Batch, extra_planes
from megatron_moe.data.blend import Blend
from megatron_moe.data.chat_mixture import ChatRows, domains_of_rows, open_chat
from megatron_moe.data.composition import Share, beside_chat, rows_before, shares_of, text_per_row
from megatron_moe.data.datasets import build_split, open_sources
from megatron_moe.data.identity import described
from megatron_moe.data.indexed.check import Source
from megatron_moe.data.loader import BatchShard, MicroBatchSampler, Packed, build_loader, to_batch
from megatron_moe.data.objectives.select import ObjectivePlan, plan_objective
from megatron_moe.data.probe import ProbeSource, probe_domains, probe_source
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import Tokenizer
from megatron_moe.tokenizer.build import build_tokenizer


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data of one rank, from `build_data`."""

    train: Iterator[Batch] | None
    """Micro-batches from `consumed_train_samples` to the end of the run; `None` if this rank does
    not read."""
    has_valid: bool
    """Whether there is validation data; the same on every rank."""
    has_test: bool
    identity: dict[str, Any]
    """Everything that decides the order of training samples: content of the sources, weights,
    split, sequence length, seed, tokenizer, objective. Not paths, layout or length of the run."""
    shares: tuple[Share, ...]
    """What training samples are made of; the same on every rank."""
    domains: dict[str, dict[str, int]]
    """By split, the domains that are evaluated separately, each with its global batches; the same
    on every rank. Empty for training, and for data of one domain, whose loss is the split's."""
    extra: tuple[str, ...]
    """What batches contain besides tokens, labels and loss mask."""
    probe_domains: tuple[str, ...]
    """The domains of the rows on which routing is watched; the same on every rank."""
    probe: ProbeSource | None
    """Where these rows come from; `None` if this rank does not read."""
    train_domains: Callable[[Sequence[int]], list[str]]
    """Return the domain of each training sample, by number; only where this rank reads."""
    loaders: dict[str, DataLoader[Packed]]
    """Of the evaluation splits and, as `SPLIT/DOMAIN`, their domains; empty if this rank does not
    read."""

    @property
    def fingerprint(self) -> str:
        """Hash of `identity`."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def described(self) -> dict[str, Any]:
        """What a checkpoint records of the data, see `data.identity`."""
        prefixes = [share.prefix for share in self.shares]
        return described(self.identity, prefixes, self.fingerprint)

    def valid(self) -> Iterator[Batch] | None:
        """Return the validation micro-batches from the start, the same at each call.

        A call ends the iterator of the previous one. `None` if there is no such data or this rank
        does not read.
        """
        return self._restart("valid")

    def test(self) -> Iterator[Batch] | None:
        """Return the test micro-batches; otherwise like `valid`."""
        return self._restart("test")

    def domain(self, split: str, name: str) -> Iterator[Batch] | None:
        """Return the micro-batches of one of `domains`; otherwise like `valid`."""
        return self._restart(f"{split}/{name}")

    def _restart(self, name: str) -> Iterator[Batch] | None:
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
    """Check all sources and open the loaders of this rank. To be called on every rank.

    The checks are the same on every rank and communicate nothing, so bad data ends every rank with
    the same error.

    Args:
        config: of the run.
        dp_rank: data-parallel rank.
        dp_size: number of data-parallel ranks.
        num_microbatches: micro-batches of one step.
        consumed_train_samples: training sample to start or resume at.
        reads_data: whether this rank passes batches to the model: tensor-parallel rank 0 of the
            first and last pipeline stage, and of every stage if there are `extra_planes`.

    Raises:
        UsageError: missing, broken or empty data, ids outside the vocabulary, conflicting flags.
    """
    tokenizer = build_tokenizer(config.data)
    plan = plan_objective(config, tokenizer)
    blends, sources = open_sources(config, tokenizer, plan)
    chat = open_chat(config, tokenizer)
    shard = BatchShard(
        micro_batch_size=config.train.micro_batch_size,
        num_microbatches=num_microbatches,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    parts = {name: _domains_of(name, blend, config) for name, blend in blends.items()}
    loaders: dict[str, DataLoader[Packed]] = {}
    if reads_data:
        builder = _LoaderBuilder(config, tokenizer, plan, sources, shard, chat)
        loaders = builder.loaders(blends, parts, consumed_train_samples)
    evaluates, probe = config.train.eval_iters > 0, None
    own = {name: tuple(found) for name, found in parts.items()}
    if reads_data:
        probe = probe_source(blends, loaders, own, evaluates)
    train, extra = loaders.pop("train", None), extra_planes(config)
    train_blend = blends["train"]
    assert train_blend is not None
    samples, text = _samples_of("train", config, shard), text_per_row(config, tokenizer)
    return Data(
        train=None if train is None else map(partial(to_batch, extra=extra), iter(train)),
        has_valid=blends["valid"] is not None,
        has_test=blends["test"] is not None,
        identity=_identity(train_blend, config, tokenizer, sources)
        | plan.identity
        | ({} if chat is None else chat.identity),
        shares=_shares(train_blend, sources, config, samples, text, chat),
        domains={
            name: dict.fromkeys(own, config.train.used_domain_eval_iters(len(own)))
            for name, own in parts.items()
        },
        extra=extra,
        probe_domains=probe_domains(blends, own, evaluates),
        probe=probe,
        train_domains=partial(
            domains_of_rows, train_blend, chat, None if train is None else train.dataset
        ),
        loaders=loaders,
    )


@dataclass(frozen=True)
class _LoaderBuilder:
    """Builds the loaders of a rank."""

    config: RunConfig
    tokenizer: Tokenizer
    plan: ObjectivePlan
    sources: dict[str, Source]
    shard: BatchShard
    chat: ChatRows | None

    def loaders(
        self,
        blends: dict[str, Blend | None],
        parts: dict[str, dict[str, Blend]],
        consumed: int,
    ) -> dict[str, DataLoader[Packed]]:
        """Return one loader for each split and, as `SPLIT/DOMAIN`, for each domain evaluated."""
        found: dict[str, DataLoader[Packed]] = {}
        for name, blend in blends.items():
            if blend:
                training, samples = name == "train", _samples_of(name, self.config, self.shard)
                start = consumed if training else 0
                found[name] = self._loader(name, blend, start, samples, persistent=not training)
            iterations = self.config.train.used_domain_eval_iters(len(parts[name]))
            samples = iterations * self.shard.global_batch_size
            for domain, part in parts[name].items():
                # Not persistent: with many domains too many idle workers would stay.
                found[f"{name}/{domain}"] = self._loader(name, part, 0, samples, persistent=False)
        return found

    def _loader(
        self, name: str, blend: Blend, start: int, samples: int, persistent: bool
    ) -> DataLoader[Packed]:
        """Return the loader of samples ``start`` to ``samples`` of a blend."""
        config = self.config
        chat = self.chat if name == "train" else None
        own = samples if chat is None else max(samples - rows_before(chat.share, samples), 1)
        dataset = build_split(name, blend, own, config, self.tokenizer, self.sources, self.plan)
        if chat is not None:
            dataset = chat.mixed_into(dataset, samples)
        sampler = MicroBatchSampler(_step_shard(name, config, self.shard), start, samples)
        workers, timeout = config.data.num_workers, config.data.data_loader_timeout
        return build_loader(dataset, sampler, workers, persistent, timeout)


def _shares(
    blend: Blend,
    sources: dict[str, Source],
    config: RunConfig,
    samples: int,
    text: float | None,
    chat: ChatRows | None,
) -> tuple[Share, ...]:
    """Return what training rows are made of."""
    length = config.data.seq_length
    if chat is None:
        return shares_of(blend, sources, length, samples, text)
    rows = rows_before(chat.share, samples)
    found = shares_of(blend, sources, length, samples - rows, text)
    of_chat = shares_of(chat.blend, chat.sources, length, rows, None)
    return beside_chat(found, of_chat, float(chat.share))


def _domains_of(name: str, blend: Blend | None, config: RunConfig) -> dict[str, Blend]:
    """Return the domains of a split that are evaluated separately."""
    if blend is None or name == "train":
        return {}
    parts = blend.by_domain()
    return parts if config.train.used_domain_eval_iters(len(parts)) else {}


def _samples_of(name: str, config: RunConfig, shard: BatchShard) -> int:
    """Return the samples that are drawn from a split in the whole run."""
    if name != "train":
        return config.train.eval_iters * shard.global_batch_size
    if config.train.train_samples is not None:
        return config.train.train_samples
    if config.train.train_iters is not None:
        sizes = BatchSizes.of(config.train, shard.global_batch_size)
        return sizes.samples_of(config.train.train_iters)
    raise UsageError("--train-iters", None, "a number of steps", "or set --train-samples")


def _step_shard(name: str, config: RunConfig, shard: BatchShard) -> BatchShard:
    """Return the shard of a loader; with a batch-size ramp-up, of a step of one micro-batch.

    A step then fetches as many micro-batches as it needs. The order of samples is the same, since
    micro-batches are consecutive within and across steps.
    """
    ramps = name == "train" and config.train.rampup_batch_size is not None
    return replace(shard, num_microbatches=1) if ramps else shard


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
