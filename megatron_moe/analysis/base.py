"""The interface of an analysis, and the list of all.

An analysis answers one question. `compute` works on one checkpoint and returns tables and arrays,
which are stored; `figures` and `reading` look at the stored results of one or several checkpoints,
so that plots can be drawn again without the model. To add one, write a file in `analyses/` that
registers it.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from megatron_moe.analysis import analyses
from megatron_moe.analysis.collector import Collector, Setting
from megatron_moe.analysis.dense import DenseModel
from megatron_moe.analysis.model import MoEModel, MoERunner
from megatron_moe.analysis.plot import Figure
from megatron_moe.analysis.result import Result
from megatron_moe.analysis.weights.survey import WeightSurvey, survey
from megatron_moe.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Material:
    """What an analysis of one checkpoint works on.

    Args:
        model: the checkpoint.
        setting: sizes, sample, layers, seed.
        collected: the collectors of `Analysis.uses`, by name, after the pass.
        runner: the loaded model; `None` if no requested analysis makes forward passes.
        draws: random draws of a permutation test or bootstrap.
        beside: a dense model whose layers are compared with the experts.
    """

    model: MoEModel
    setting: Setting
    collected: Mapping[str, Collector]
    runner: MoERunner | None
    draws: int
    beside: DenseModel | None = None

    @cached_property
    def survey(self) -> WeightSurvey:
        """The weights of the layers, read once for all analyses of weights."""
        return survey(self.model, self.setting.layers, self.setting.seed, self.beside)


class Analysis(ABC):
    """One question about a model.

    Attributes:
        key: name on the command line, and of its folder.
        title: heading in the report.
        question: what is asked, one sentence.
        definition: how it is measured, in words and formulas, with its chance level.
        source: paper and section or figure.
        group: part of the report: `weights`, `experts`, `routing` or `training`.
        uses: names of the collectors.
        needs_data: whether it reads tokens at all.
        reads_dense: whether `Material.beside` decides its result, besides those of weights.
        min_checkpoints: how many it compares.
        least_choices: choices per expert, on average, below which it says nothing.
    """

    key: ClassVar[str]
    title: ClassVar[str]
    question: ClassVar[str]
    definition: ClassVar[str]
    source: ClassVar[str]
    group: ClassVar[str]
    uses: ClassVar[tuple[str, ...]] = ()
    needs_data: ClassVar[bool] = True
    reads_dense: ClassVar[bool] = False
    min_checkpoints: ClassVar[int] = 1
    least_choices: ClassVar[int] = 0

    def check(self, setting: Setting) -> None:
        """Called before the pass over the tokens.

        Raises:
            UsageError: the sample is too small for this analysis.
        """
        experts, topk = setting.sizes.num_experts, setting.sizes.topk
        least = -(-self.least_choices * experts // topk)
        if setting.sample.tokens < least:
            expected = f">= {least}, {self.least_choices} choices for each of {experts} experts"
            fix = f"more --data or --tokens, or --analyses without {self.key}"
            raise UsageError("tokens of --data", setting.sample.tokens, expected, fix)

    @abstractmethod
    def compute(self, material: Material) -> Result:
        """Analyse one checkpoint."""

    def combine(self, results: Mapping[str, Result]) -> Result | None:
        """What only several checkpoints show together, from their stored results.

        `None` if there is nothing beyond the single results, or if the checkpoints cannot be
        compared.
        """
        return None

    @abstractmethod
    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Plots of the results by label of the checkpoint, overlaid or side by side."""

    @abstractmethod
    def reading(self, results: Mapping[str, Result]) -> str:
        """What the numbers say, beside the papers' finding: one or two sentences."""


_ANALYSES: dict[str, Analysis] = {}


def register(made: type[Analysis]) -> type[Analysis]:
    """A class decorator that enters an analysis into the list."""
    if made.key in _ANALYSES:
        raise ValueError(f"two analyses have the key {made.key!r}")
    _ANALYSES[made.key] = made()
    return made


GROUPS = ("weights", "experts", "routing", "training")
"""Parts of a report, in order."""


def all_analyses() -> dict[str, Analysis]:
    """Every analysis by key, in the order of a report: by group, then by file name."""
    for module in sorted(found.name for found in pkgutil.iter_modules(analyses.__path__)):
        importlib.import_module(f"{analyses.__name__}.{module}")
    order = sorted(_ANALYSES.values(), key=lambda each: GROUPS.index(each.group))
    return {each.key: each for each in order}
