"""Builds the blended data set of a split with Megatron-Core's builder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from torch.utils.data import Dataset

from megatron_moe.config import RunConfig
from megatron_moe.data.batch import extra_planes
from megatron_moe.data.blend import SPLITS, Blend, weights_of
from megatron_moe.data.causal import BlendedCausalDataset, CausalConfig, Sample
from megatron_moe.data.indexed.cache import IndexCache
from megatron_moe.data.indexed.check import Source
from megatron_moe.data.objectives.select import ObjectivePlan, plan_objective
from megatron_moe.tokenizer.base import Tokenizer


class LocalBuilder(BlendedMegatronDatasetBuilder):
    """The engine's builder without its barriers.

    The index cache has its own lock. Barriers over all ranks would make every rank wait for ever
    when one refuses its data, and would need the caches on storage that all nodes share.
    """

    def __init__(self, dataset: type[Any], sizes: list[int], config: CausalConfig) -> None:
        super().__init__(dataset, sizes, lambda: True, config)

    @staticmethod
    def build_generic_dataset(
        cls: Callable[..., Any], is_built_on_rank: Any, synchronize_ranks: bool, *args: Any
    ) -> Any:
        """Build on this rank, whichever it is."""
        return (BlendedCausalDataset if cls is BlendedDataset else cls)(*args)

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: list[Any], sizes_per_dataset: list[list[int]]
    ) -> list[list[Any]]:
        built = [
            self._build_megatron_dataset_splits(prefix, split, sizes, synchronize_ranks=False)
            for prefix, sizes in zip(prefixes, sizes_per_dataset, strict=True)
        ]
        return [list(datasets) for datasets in zip(*built, strict=True)]


def cache_for(prefix: str, config: RunConfig) -> IndexCache:
    """Where the indices of a source are kept: `--data-cache-path`, or `cache` beside the data."""
    beside = os.path.join(os.path.dirname(os.path.abspath(prefix)), "cache")
    return IndexCache(config.data.data_cache_path or beside)


def build_split(
    name: str,
    blend: Blend,
    samples: int,
    config: RunConfig,
    tokenizer: Tokenizer,
    sources: Mapping[str, Source],
    plan: ObjectivePlan | None = None,
) -> Dataset[Sample]:
    """The data set of one split, at least ``samples`` long; sources repeat as epochs need.

    Args:
        name: one of `SPLITS`.
        blend: its sources.
        samples: how many samples will be drawn.
        config: the run's.
        tokenizer: for its special ids.
        sources: the checked sources, by prefix.
        plan: the objective's; `None` makes it from ``config``.
    """
    plan = plan or plan_objective(config, tokenizer)
    weights = weights_of(blend, sources, config.data.seq_length)
    engine_config = CausalConfig(
        random_seed=config.train.seed,
        sequence_length=config.data.seq_length,
        blend=(list(blend.prefixes), None if weights is None else list(weights)),
        split=config.data.split,
        path_to_cache="",  # the engine's own cache is off
        mmap_bin_files=config.data.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=config.objective.eod_mask_loss,
        create_attention_mask=False,
        sources=sources,
        caches={prefix: cache_for(prefix, config) for prefix in blend.prefixes},
        token_limit=plan.token_limit,
        plan=plan.settings,
        planes=extra_planes(config.objective),
    )
    engine_config.split_matrix = _only(name, blend.bounds)
    sizes = _only(name, samples, otherwise=0)
    built: Sequence[Dataset[Sample] | None] = LocalBuilder(
        plan.dataset, sizes, engine_config
    ).build()
    dataset = built[SPLITS.index(name)]
    assert dataset is not None
    return dataset


def _only(name: str, value: Any, otherwise: Any = None) -> list[Any]:
    return [value if split == name else otherwise for split in SPLITS]
