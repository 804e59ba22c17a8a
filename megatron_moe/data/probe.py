"""The fixed rows on which a run watches its routing, spread over the domains of its data.

They are rows of the validation data, or of the training data where there is none, chosen by number:
the same on every rank, in every layout and after a resume.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

from megatron_moe.data.blend import Blend
from megatron_moe.data.chat_mixture import MixedRows
from megatron_moe.data.loader import Packed, collate

_SCANNED = 16
"""Samples of a blend that are looked at for each row, to find those of rare domains."""


@dataclass(frozen=True)
class ProbeSource:
    """Data sets that the rows are taken from.

    Args:
        datasets: by domain; or one, of the blend, with the key "".
        names: domain of each source of the blend, by its number in the samples.
    """

    datasets: Mapping[str, Dataset[Any]]
    names: tuple[str, ...]

    def rows(self, count: int) -> tuple[list[str], Packed]:
        """The domain of each row, and the rows [P, count, S] as `collate` packs them.

        With data sets by domain, row i is of domain i % D: the first rows of each. Otherwise the
        first rows of the blend, with at most ceil(count / D) of a domain as long as there are rows
        of others among the first ones. Data with fewer rows repeats them.
        """
        if "" not in self.datasets:
            domains = list(self.datasets)
            picked = [(domains[i % len(domains)], i // len(domains)) for i in range(count)]
            samples = [_sample(self.datasets[name], index) for name, index in picked]
            return [name for name, _ in picked], collate(samples)
        found = self._spread(self.datasets[""], count)
        return [self.names[number] for number, _ in found], collate([row for _, row in found])

    def _spread(self, dataset: Any, count: int) -> list[tuple[int, Any]]:
        """Source number and sample of ``count`` rows of a blend."""
        share = -(-count // len(set(self.names)))
        taken: Counter[str] = Counter()
        first: list[tuple[int, Any]] = []
        others: list[tuple[int, Any]] = []
        for index in range(min(len(dataset), _SCANNED * count)):
            sample = dataset[index]
            number = int(sample.get("dataset_id", 0))
            name = self.names[number]
            (first if taken[name] < share else others).append((number, sample))
            taken[name] += 1
            if len(first) == count:
                break
        rows = [*first, *others][:count]
        return [rows[index % len(rows)] for index in range(count)]


def _sample(dataset: Any, index: int) -> Any:
    return dataset[index % len(dataset)]


def probe_domains(
    blends: Mapping[str, Blend | None], domains: Mapping[str, Sequence[str]], evaluates: bool
) -> tuple[str, ...]:
    """The domains that rows can be of; known on every rank.

    Args:
        blends: of each split.
        domains: of each split, those that have data sets of their own.
        evaluates: whether the validation data has rows.
    """
    if domains["valid"]:
        return tuple(domains["valid"])
    return tuple(dict.fromkeys(_names(_split(blends, evaluates))))


def probe_source(
    blends: Mapping[str, Blend | None],
    loaders: Mapping[str, DataLoader[Packed]],
    domains: Mapping[str, Sequence[str]],
    evaluates: bool,
) -> ProbeSource:
    """Where the rows come from, on a rank that reads.

    Args:
        blends: of each split.
        loaders: of each split and, as `valid/DOMAIN`, of each domain evaluated.
        domains: of each split, those that have data sets of their own.
        evaluates: whether the validation data has rows.
    """
    if domains["valid"]:
        own = {name: loaders[f"valid/{name}"].dataset for name in domains["valid"]}
        return ProbeSource(own, ())
    split = "valid" if evaluates and blends["valid"] is not None else "train"
    dataset = loaders[split].dataset
    if isinstance(dataset, MixedRows):  # conversations are mixed into training alone
        dataset = dataset.text
    return ProbeSource({"": dataset}, _names(_split(blends, evaluates)))


def _split(blends: Mapping[str, Blend | None], evaluates: bool) -> Blend:
    blend = (blends["valid"] if evaluates else None) or blends["train"]
    assert blend is not None
    return blend


def _names(blend: Blend) -> tuple[str, ...]:
    return blend.domains or ("",) * len(blend.prefixes)
