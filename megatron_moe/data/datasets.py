"""Opens and checks the sources of a run, and builds the blended dataset of a split.

The dataset is built by Megatron-Core's builder, without its collectives: the index cache has a lock
of its own. Barriers over all ranks would let every rank wait forever when one rejects its data, and
would need the caches on storage that all nodes share.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from torch.utils.data import Dataset

from megatron_moe.config import RunConfig
from megatron_moe.data.batch import extra_planes, reset_planes
from megatron_moe.data.blend import SPLITS, Blend, blends_of, usable, weights_of
from megatron_moe.data.causal import BlendedCausalDataset, CausalConfig, Sample
from megatron_moe.data.indexed.cache import IndexCache
from megatron_moe.data.indexed.check import Source, inspect_source
from megatron_moe.data.indexed.manifest import check_compatibility
from megatron_moe.data.indexed.scan import check_range, source_range
from megatron_moe.data.mock import with_mock_data
from megatron_moe.data.objectives.chat_source import open_conversations
from megatron_moe.data.objectives.select import ObjectivePlan, plan_objective
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import Tokenizer

logger = logging.getLogger(__name__)


def open_sources(
    config: RunConfig, tokenizer: Tokenizer, plan: ObjectivePlan
) -> tuple[dict[str, Blend | None], dict[str, Source]]:
    """Return the blend of each split, `None` without data, and all sources by prefix, checked.

    Raises:
        UsageError: a source is missing, broken, unsuitable for the run, or has no tokens for a
            split.
    """
    blends = blends_of(with_mock_data(config.data, tokenizer))
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
    """Open and check a source: an indexed dataset, or a file of conversations."""
    cache = cache_for(prefix, config)
    if config.objective.objective == "sft":
        return open_conversations(prefix, config.objective.sft_key, tokenizer, cache)
    try:
        source = inspect_source(prefix)
    except UsageError as error:
        if error.what != "data path" or not config.data.mixture:
            raise
        fix = f"{error.fix}; --data-root is the folder of the prefixes of --mixture"
        raise UsageError(error.what, prefix, error.expected, fix) from None
    check_compatibility(
        prefix,
        tokenizer_type=config.data.tokenizer_type,
        tokenizer_hash=tokenizer.identity,
        needs_eod=bool(reset_planes(config.objective)),
    )
    found = source_range(source, cache)
    check_range(source, found, limit)
    return source


def cache_for(prefix: str, config: RunConfig) -> IndexCache:
    """Return the cache of a source: `--data-cache-path`, or `cache` in the folder of the data."""
    default = os.path.join(os.path.dirname(os.path.abspath(prefix)), "cache")
    return IndexCache(config.data.data_cache_path or default)


class LocalBuilder(BlendedMegatronDatasetBuilder):
    """Megatron-Core's builder without its barriers: every rank builds by itself."""

    def __init__(self, dataset: type[Any], sizes: list[int], config: CausalConfig) -> None:
        super().__init__(dataset, sizes, lambda: True, config)

    @staticmethod
    def build_generic_dataset(
        cls: Callable[..., Any], is_built_on_rank: Any, synchronize_ranks: bool, *args: Any
    ) -> Any:
        """Build on this rank, and blend with our index cache."""
        return (BlendedCausalDataset if cls is BlendedDataset else cls)(*args)

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: list[Any], sizes_per_dataset: list[list[int]]
    ) -> list[list[Any]]:
        built = [
            self._build_megatron_dataset_splits(prefix, split, sizes, synchronize_ranks=False)
            for prefix, sizes in zip(prefixes, sizes_per_dataset, strict=True)
        ]
        return [list(datasets) for datasets in zip(*built, strict=True)]


def build_split(
    name: str,
    blend: Blend,
    samples: int,
    config: RunConfig,
    tokenizer: Tokenizer,
    sources: Mapping[str, Source],
    plan: ObjectivePlan | None = None,
) -> Dataset[Sample]:
    """Build the dataset of one split, at least ``samples`` long; sources repeat as epochs require.

    Args:
        name: one of `SPLITS`.
        blend: its sources.
        samples: number of samples that will be drawn.
        config: of the run.
        tokenizer: for its special ids.
        sources: the checked sources, by prefix.
        plan: of the objective; `None` makes it from ``config``.
    """
    plan = plan or plan_objective(config, tokenizer)
    weights = weights_of(blend, sources, config.data.seq_length)
    dataset_config = CausalConfig(
        random_seed=config.train.seed,
        sequence_length=config.data.seq_length,
        blend=(list(blend.prefixes), None if weights is None else list(weights)),
        split=config.data.split,
        path_to_cache="",  # turns Megatron-Core's own cache off
        mmap_bin_files=config.data.mmap_bin_files,
        tokenizer=tokenizer,
        # Ours are made per sample in `CausalDataset`; see `CausalConfig.planes`.
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=config.objective.eod_mask_loss,
        create_attention_mask=False,
        sources=sources,
        caches={prefix: cache_for(prefix, config) for prefix in blend.prefixes},
        token_limit=plan.token_limit,
        plan=plan.settings,
        start=config.objective.decoder_start_token_id,
        planes=extra_planes(config),
    )
    # The builder takes one value per split; the two other splits have none and are not built.
    dataset_config.split_matrix = _per_split(name, blend.bounds)
    sizes = _per_split(name, samples, otherwise=0)
    built: Sequence[Dataset[Sample] | None] = LocalBuilder(
        plan.dataset, sizes, dataset_config
    ).build()
    dataset = built[SPLITS.index(name)]
    assert dataset is not None
    return dataset


def _per_split(name: str, value: Any, otherwise: Any = None) -> list[Any]:
    return [value if split == name else otherwise for split in SPLITS]
