"""The figures and tables of a paper, drawn for any model from the stored results of analyses.

A file in `figures/` describes one paper: its entries, in order, with the analyses that each is
drawn from, and what the published code computes otherwise. To add a paper, write such a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_moe.analysis import figures
from megatron_moe.analysis.base import Analysis
from megatron_moe.analysis.model import MoEModel
from megatron_moe.analysis.plot import Figure
from megatron_moe.analysis.result import Result, Table
from megatron_moe.analysis.sample import Sample


class Missing(Exception):
    """An entry that cannot be drawn from these results; the text says what it needs."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the entries of a paper are drawn from.

    Args:
        models: the checkpoints.
        sample: the tokens; `None` if only weights were analysed.
        results: by key of the analysis, then by label of the checkpoint.
        analyses: by key.
    """

    models: Sequence[MoEModel]
    sample: Sample | None
    results: Mapping[str, Mapping[str, Result]]
    analyses: Mapping[str, Analysis]

    @property
    def labels(self) -> list[str]:
        """Labels of the checkpoints."""
        return [model.label for model in self.models]

    def of(self, key: str) -> Mapping[str, Result]:
        """The results of an analysis by label.

        Raises:
            Missing: there are none.
        """
        found = self.results.get(key, {})
        if not found:
            raise Missing(f"needs the analysis {key}")
        return found

    def drawn_by(self, key: str, beginning: str) -> list[Figure]:
        """The figures of an analysis whose key begins like this.

        Raises:
            Missing: there are none.
        """
        found = self.of(key)
        if key not in self.analyses:
            raise Missing(f"needs the analysis {key}")
        drawn = [f for f in self.analyses[key].figures(found) if f.key.startswith(beginning)]
        if not drawn:
            raise Missing(f"the analysis {key} has no such plot for this model")
        return drawn


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Figures and tables of an entry, and limits of them in one sentence each."""

    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One figure or table of a paper.

    Args:
        number: as the paper has it, e.g. `Figure 5`.
        title: what it shows.
        needs: keys of the analyses that it is drawn from.
        draw: draws it; raises `Missing`.
        finding: what the paper concludes from it.
        differs: what the published code computes otherwise, and which panels have which.
    """

    number: str
    title: str
    needs: tuple[str, ...]
    draw: Callable[[Given], Drawn]
    finding: str = ""
    differs: str = ""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper.

    Args:
        key: name on the command line.
        title: short name.
        source: authors, title and number.
        entries: in the order of the paper.
    """

    key: str
    title: str
    source: str
    entries: Sequence[Entry]

    @property
    def needs(self) -> tuple[str, ...]:
        """Keys of all analyses that its entries are drawn from."""
        return tuple(dict.fromkeys(key for entry in self.entries for key in entry.needs))


def papers() -> dict[str, Paper]:
    """Every paper by key: `PAPER` of each file in `figures/` that has one."""
    names = sorted(each.name for each in pkgutil.iter_modules(figures.__path__))
    modules = [importlib.import_module(f"{figures.__name__}.{name}") for name in names]
    found: list[Paper] = [module.PAPER for module in modules if hasattr(module, "PAPER")]
    return {paper.key: paper for paper in found}
