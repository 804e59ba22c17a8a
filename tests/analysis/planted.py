"""Models with planted routing rules, to run analyses on: every choice is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_moe.analysis.base import Analysis, Material
from megatron_moe.analysis.collector import Collector, Setting, make_collector
from megatron_moe.analysis.model import (
    ExpertPass,
    ExpertWeights,
    LayerWeights,
    MoEModel,
    MoERunner,
    Sizes,
)
from megatron_moe.analysis.observation import LayerRouting, Observation, TokenBatch
from megatron_moe.analysis.result import Result
from megatron_moe.analysis.sample import Sample, read_sample
from megatron_moe.data.indexed.writer import IndexedWriter

Ids = npt.NDArray[np.int64]
Rule = Callable[[TokenBatch, int], Ids]
"""From a batch and the index of a layer to ranked experts [T, K]."""
Kept = Callable[[TokenBatch, int], npt.NDArray[np.bool_]]


def sample_of(
    folder: Path,
    domains: Mapping[str, Sequence[Sequence[int]]],
    *,
    seq_length: int = 8,
    batch_size: int = 3,
    vocab_size: int = 1000,
) -> Sample:
    """A sample of documents by name of the domain."""
    words = []
    for name, documents in domains.items():
        prefix = str(folder / name)
        with IndexedWriter(prefix, vocab_size) as writer:
            for document in documents:
                writer.add_document(list(document))
        words.append(f"{name}={prefix}")
    return read_sample(words, tokens=None, seq_length=seq_length, batch_size=batch_size)


def random_sample(
    folder: Path, *, tokens: int = 4000, vocab: int = 50, domains: int = 1, **options: int
) -> Sample:
    """Documents of 40 ids that are drawn evenly."""
    rng = np.random.default_rng(5)
    ids = rng.integers(vocab, size=(domains, tokens // 40 + 1, 40))
    named = {f"d{i}": each.tolist() for i, each in enumerate(ids)}
    return sample_of(folder, named, **{"batch_size": 50, **options})


def _scrambled(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A well mixed function of each number (splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_rule(experts: int, topk: int, seed: int = 0) -> Rule:
    """Any K experts; a function of the whole row and the position, whatever the batch is."""

    def rule(batch: TokenBatch, layer: int) -> Ids:
        length = batch.tokens_BS.shape[1]
        start = ((seed * 1000 + layer) * 1000 + batch.domain) << 20
        places = _scrambled(np.arange(start, start + length, dtype=np.uint64))
        mixed_BS = batch.tokens_BS.astype(np.uint64) * places
        row_B1 = _scrambled(mixed_BS.sum(1, keepdims=True, dtype=np.uint64))
        token_T1 = _scrambled(row_B1 + places).reshape(-1, 1)
        keys_TE = _scrambled(token_T1 + np.arange(experts, dtype=np.uint64))
        return np.argsort(keys_TE, axis=1)[:, :topk].astype(np.int64)

    return rule


def token_rule(experts: int, topk: int) -> Rule:
    """Experts that follow from the token id alone."""
    return lambda batch, layer: (
        (batch.tokens_BS.reshape(-1, 1) * 7 + layer + np.arange(topk)) % experts
    )


class PlantedRunner(MoERunner):
    """Choices by a rule; scores that decrease with the rank."""

    def __init__(self, sizes: Sizes, rule: Rule, kept: Kept | None) -> None:
        self.sizes, self.rule, self.kept = sizes, rule, kept

    def run(
        self,
        batch: TokenBatch,
        *,
        inputs: Collection[int] = (),
        places: Tensor | None = None,
        predictions: bool = False,
    ) -> Observation:
        layers = tuple(self._layer(batch, layer) for layer in self.sizes.moe_layers)
        predicted = (batch.next_BS.reshape(-1) + 1) % self.sizes.vocab_size
        return Observation(
            batch=batch,
            layers=layers,
            predicted_T=torch.from_numpy(predicted) if predictions else None,
            loss_T=torch.zeros(batch.size) if predictions else None,
        )

    def _layer(self, batch: TokenBatch, layer: int) -> LayerRouting:
        ids_TK = torch.from_numpy(np.ascontiguousarray(self.rule(batch, layer)))
        tokens, topk = ids_TK.shape
        experts = self.sizes.num_experts
        probs_TE = torch.full((tokens, experts), 0.1 / experts)
        ranked = 0.9 * 0.5 ** torch.arange(1, topk + 1) / (1 - 0.5**topk)
        probs_TE.scatter_add_(1, ids_TK, ranked.expand(tokens, topk).contiguous())
        probs_TK = probs_TE.gather(1, ids_TK)
        kept_TK = torch.ones(tokens, topk, dtype=torch.bool)
        if self.kept is not None:
            kept_TK = torch.from_numpy(self.kept(batch, layer))
        return LayerRouting(
            layer=layer,
            router_probs_TE=probs_TE,
            ids_TK=ids_TK,
            probs_TK=probs_TK,
            weights_TK=probs_TK,
            kept_TK=kept_TK,
            counts_E=ids_TK.reshape(-1).bincount(minlength=experts),
            inputs_NH=None,
        )

    def expert(self, layer: int, x_TH: Tensor, expert: int) -> ExpertPass:
        raise AssertionError("not planted")

    def forced(
        self, layer: int, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None = None
    ) -> AbstractContextManager[None]:
        raise AssertionError("not planted")

    def combine_weights(self, scores_TK: Tensor) -> Tensor:
        return scores_TK

    def without(self, experts: Mapping[int, Sequence[int]]) -> AbstractContextManager[None]:
        raise AssertionError("not planted")


class PlantedModel(MoEModel):
    """A model whose choices follow a rule."""

    def __init__(
        self,
        rule: Rule,
        *,
        experts: int,
        topk: int,
        layers: Sequence[int] = (0, 1),
        step: int | None = 100,
        label: str = "planted",
        kept: Kept | None = None,
        run: str = "run",
    ) -> None:
        self.label, self.path, self.step = label, Path(run), step
        self.family, self.routing, self.identity, self.tokenizer_hash = "planted", "", label, ""
        self.sizes = Sizes(
            num_layers=max(layers) + 1,
            moe_layers=tuple(layers),
            num_experts=experts,
            topk=topk,
            hidden_size=4,
            expert_width=4,
            vocab_size=1000,
            max_length=4096,
        )
        self.rule, self.kept = rule, kept

    def weights(self, layer: int) -> LayerWeights:
        raise AssertionError("not planted")

    def dense_weights(self) -> Mapping[int, ExpertWeights]:
        return {}

    def piece(self, token: int) -> str:
        return f"<{token}>"

    def load(self, device: str, dtype: torch.dtype) -> PlantedRunner:
        return PlantedRunner(self.sizes, self.rule, self.kept)


def collected(model: PlantedModel, sample: Sample, names: Sequence[str]) -> dict[str, Collector]:
    """The collectors after a pass over the sample."""
    setting = Setting(sizes=model.sizes, sample=sample, layers=model.sizes.moe_layers, seed=1)
    made = {name: make_collector(name, setting) for name in names}
    runner = model.load("cpu", torch.float32)
    for batch in sample.batches():
        for each in made.values():
            each.add(runner.run(batch, predictions=True), runner)
    return made


def result_of(analysis: Analysis, model: PlantedModel, sample: Sample, draws: int = 50) -> Result:
    """The analysis of a planted model, also of fewer tokens than it asks for."""
    setting = Setting(sizes=model.sizes, sample=sample, layers=model.sizes.moe_layers, seed=1)
    return analysis.compute(
        Material(
            model=model,
            setting=setting,
            collected=collected(model, sample, analysis.uses),
            runner=None,
            draws=draws,
        )
    )
