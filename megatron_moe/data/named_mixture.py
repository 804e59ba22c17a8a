"""Named mixtures: weights and domains of sources, from a TOML file (`--mixture`).

    [domains]                       # domains whose loss is measured separately, with a description
    c4 = "C4, filtered web text"

    [[source]]
    domain = "c4"
    prefix = "c4_text_document"     # relative to --data-root, or absolute
    weight = 15                     # of samples, relative to the other weights

The paper's v1, v2 and v3 are part of the package. Imports no torch, because `--describe` reads
mixtures too.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.errors import UsageError
from megatron_moe.text import read_text, toml_value

_FLAG = "--mixture"
_SHIPPED = Path(__file__).parent / "mixtures"
_KEYS = {"domain", "prefix", "weight"}


@dataclass(frozen=True, kw_only=True)
class NamedMixture:
    """Sources with weights > 0, in the order of the file."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...]
    domains: tuple[str, ...]
    """Domain of each prefix; several prefixes may belong to one domain."""


def shipped_mixtures() -> list[str]:
    """Return the names of the mixtures in the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.toml"))


def read_named_mixture(name: str, root: str | None) -> NamedMixture:
    """Read a mixture of the package by its name, else the TOML file at that path.

    Args:
        name: `--mixture`.
        root: `--data-root`, the folder of relative prefixes; `None` takes the folder of the file,
            and for a mixture of the package the working directory.

    Raises:
        UsageError: there is no such mixture, it has another form, a domain is not declared, a
            source is given twice, or a weight is invalid.
    """
    ours = name in shipped_mixtures()
    path = _SHIPPED / f"{name}.toml" if ours else Path(name)
    sources = _sources(_content(name, path))
    seen: set[str] = set()
    for source in sources:
        if source["prefix"] in seen:
            raise UsageError(f"prefix in {path}", source["prefix"], "given once")
        seen.add(source["prefix"])
    kept = [source for source in sources if source["weight"] > 0]
    if not kept:
        raise UsageError(f"one of the weights in {path}", [0] * len(sources), "> 0")
    folder = root if root is not None else "" if ours else str(path.parent)
    return NamedMixture(
        prefixes=tuple(os.path.join(folder, source["prefix"]) for source in kept),
        weights=tuple(float(source["weight"]) for source in kept),
        domains=tuple(source["domain"] for source in kept),
    )


def _content(name: str, path: Path) -> dict[str, Any]:
    expected = f"one of {', '.join(shipped_mixtures())}, or a readable file"
    try:
        return toml_value(read_text(path, _FLAG, expected))
    except ValueError as error:
        raise UsageError(_FLAG, name, "a TOML file", str(error)) from None


def _sources(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the `[[source]]` tables, checked."""
    domains, sources = content.get("domains"), content.get("source")
    if (
        set(content) != {"domains", "source"}
        or not isinstance(domains, dict)
        or not isinstance(sources, list)
        or not sources
    ):
        expected = "a table [domains], one or more [[source]] tables, and nothing else"
        raise UsageError(f"content of {_FLAG}", sorted(content), expected)
    for number, source in enumerate(sources, 1):
        _check(source, sorted(domains), f"source {number} of {_FLAG}")
    return sources


def _check(source: Any, domains: list[str], where: str) -> None:
    if not isinstance(source, dict) or set(source) != _KEYS:
        found = sorted(source) if isinstance(source, dict) else source
        raise UsageError(f"keys of {where}", found, ", ".join(sorted(_KEYS)))
    if source["domain"] not in domains:
        expected = f"one of [domains]: {', '.join(domains)}"
        raise UsageError(f"domain of {where}", source["domain"], expected)
    if not isinstance(source["prefix"], str) or not source["prefix"]:
        raise UsageError(f"prefix of {where}", source["prefix"], "the prefix of indexed data")
    weight = source["weight"]
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 <= weight < math.inf:
        raise UsageError(f"weight of {where}", weight, "a number >= 0")
