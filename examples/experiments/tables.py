"""The tables of docs/experiments.md as Markdown, each from the records of one claim."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from examples.experiments import adaptive_capacity
from examples.experiments.compare import Comparison, compare, corrected, means
from examples.experiments.paired import Paired, paired
from examples.experiments.records import Record, load_records
from examples.experiments.remedies import key_of
from examples.experiments.variants import OPENMOE, VARIANTS

PLUS = ("plus",)
"""Variants that combine remedies: their table is another one, and so is their family of tests."""


@cache
def _remedies() -> tuple[tuple[Record, ...], dict[str, Any]]:
    records, about = load_records("remedies")
    return tuple(records), about


@cache
def comparisons() -> tuple[Comparison, ...]:
    """Of all remedies and sizes, as one family of tests."""
    records = [r for r in _remedies()[0] if r["variant"] not in PLUS]
    sizes = dict.fromkeys(r["size"] for r in records)
    return tuple(corrected([each for size in sizes for each in compare(records, size)]))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _interval(found: Paired) -> str:
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}%"


def setting() -> str:
    """Sizes of the models and of the noise."""
    records, about = _remedies()
    rows = []
    for name, size in about["sizes"].items():
        base = [r for r in records if r["size"] == name and r["variant"] == OPENMOE]
        whole = [r for r in base if r["length"] == 1]
        losses = [r["loss"] for r in whole]
        spread = paired(losses).sd
        own = [each for each in comparisons() if each.size == name]
        between = sorted(each.steps.sd for each in own)[len(own) // 2]
        rows.append(
            [
                name,
                str(size["hidden"]),
                str(size["steps"]),
                f"{whole[0]['tokens']:,}",
                f"{sum(losses) / len(losses):.3f}",
                f"{spread:.4f}",
                f"{between:.4f}",
            ]
        )
    head = [
        "size",
        "hidden",
        "steps",
        "tokens",
        "loss of OpenMoE's recipe",
        "sd over seeds",
        "sd of paired differences, median",
    ]
    return table(head, rows)


def losses_table(size: str) -> str:
    """Loss differences with their intervals."""
    rows = [
        [
            f"`{each.variant}`",
            VARIANTS[each.variant].about,
            str(each.steps.n),
            _interval(each.steps),
            _interval(each.compute),
            _p(each.corrected),
            _interval(each.time),
            f"**{each.claim}**" if each.claim else "",
        ]
        for each in comparisons()
        if each.size == size
    ]
    head = [
        "variant",
        "what it changes",
        "seeds",
        "equal steps",
        "equal compute",
        "p, corrected",
        "equal time",
        "claim",
    ]
    return table(head, rows)


def routing_table(size: str) -> str:
    """What the remedies do to the phenomena, to balance and to speed."""
    records = [r for r in _remedies()[0] if r["size"] == size and r["length"] == 1]
    keys = ("drop", "drop_first", "drop_last", "token_share", "settled", "max_violation")
    base: dict[str, float] = {}
    rows = []
    for variant in dict.fromkeys(r["variant"] for r in records if r["variant"] not in PLUS):
        own = [r for r in records if r["variant"] == variant]
        found = means(own, keys)
        cost = dict(means(own, ("done", "slots")))
        cost["time"] = min(r["ms_per_step"] for r in own)
        base = base or {key: value or 1.0 for key, value in cost.items()}
        relative = {key: (value or 0.0) / base[key] for key, value in cost.items()}
        violation = found["max_violation"]
        rows.append(
            [
                f"`{variant}`",
                _percent(found["drop"]),
                _percent(found["drop_first"]),
                _percent(found["drop_last"]),
                _percent(found["token_share"], 0),
                _percent(found["settled"], 0),
                "" if violation is None else f"{violation:.2f}",
                f"{relative['done']:.2f}",
                f"{relative['slots']:.2f}",
                f"{relative['time']:.2f}",
            ]
        )
    head = [
        "variant",
        "dropped",
        "in the first eighth",
        "in the last eighth",
        "explained by id",
        "settled at 1/4",
        "MaxVio",
        "FLOPs done",
        "slots",
        "time of a step",
    ]
    return table(head, rows)


def verdicts() -> str:
    """What may be claimed, in words."""
    lines = []
    for words, claim in (("Lower", "lower"), ("Higher", "higher"), ("No claim", "")):
        found: dict[str, list[str]] = {}
        for each in comparisons():
            if each.claim == claim:
                found.setdefault(each.variant, []).append(each.size)
        names = [f"`{name}` ({', '.join(sizes)})" for name, sizes in found.items()]
        lines.append(f"- {words}: {', '.join(names) or 'none'}.")
    return "\n".join(lines)


def context_table() -> str:
    """Explained share of routing by seed and model."""
    records, _ = load_records("context_independence")
    seeds = sorted({r["seed"] for r in records})
    rows = []
    for model in dict.fromkeys(r["model"] for r in records):
        own = {r["seed"]: r for r in records if r["model"] == model}
        rows.append(
            [
                f"`{model}`",
                *(_percent(own[s]["explained"]) for s in seeds),
                _percent(sum(own[s]["null"] for s in seeds) / len(seeds)),
            ]
        )
    return table(["model", *(f"seed {s}" for s in seeds), "by chance"], rows)


def early_table() -> str:
    """How much of an id's routing moves after a part of the run."""
    records, _ = load_records("early_routing")
    rows = []
    for part in dict.fromkeys(r["part"] for r in records):
        own = [r for r in records if r["part"] == part]
        rows.append(
            [
                _percent(part, 0),
                *(_percent(r["moves"]) for r in own),
                _percent(sum(r["noise"] for r in own) / len(own)),
                _percent(sum(r["between_ids"] for r in own) / len(own)),
            ]
        )
    seeds = dict.fromkeys(r["seed"] for r in records)
    head = [
        "after this part of the run",
        *(f"seed {s}" for s in seeds),
        "noise alone",
        "between ids",
    ]
    return table(head, rows)


def drops_table() -> str:
    """Tokens that lose a choice, by place in the row."""
    records, _ = load_records("drops_towards_end")
    rows = [
        [
            f"`{r['model']}`",
            str(r["seed"]),
            _percent(r["mean"]),
            _percent(r["first"]),
            _percent(r["last"]),
            f"{r['z']:.1f}",
        ]
        for r in sorted(records, key=lambda r: (r["model"] != OPENMOE, r["model"], r["seed"]))
    ]
    return table(["model", "seed", "all (null)", "first quarter", "last quarter", "z"], rows)


def capacity_table() -> str:
    """Drops and slots with a target and with fixed factors, means over seeds."""
    records, _ = load_records("adaptive_capacity")
    rows = []
    for size, variant in dict.fromkeys((r["size"], r["variant"]) for r in records):
        own = [r for r in records if (r["size"], r["variant"]) == (size, variant)]
        found = means(own, ("drop", "slots", "over", "most"))
        words = [_percent(found["drop"]), f"{found['slots']:.2f}"]
        rows.append(
            [size, f"`{variant}`", *words, _percent(found["over"], 0), _percent(found["most"])]
        )
    head = [
        "size",
        "capacity",
        "dropped",
        "slots per choice",
        "intervals over the target",
        "dropped in the layer that drops most",
    ]
    return table(head, rows)


def saved_table() -> str:
    """The fixed factor that drops as much as the target, seed by seed."""
    records, _ = load_records("adaptive_capacity")
    rows = []
    for each in (r for r in records if r["variant"] == "target"):
        alike = (each["size"], each["seed"])
        fixed = [r for r in records if (r["size"], r["seed"]) == alike and r is not each]
        slots = adaptive_capacity.equal_drops(fixed, each["drop"])
        words = [_percent(each["drop"]), f"{each['slots']:.2f}", f"{slots:.2f}"]
        rows.append([each["size"], str(each["seed"]), *words, _percent(1 - each["slots"] / slots)])
    head = [
        "size",
        "seed",
        "dropped",
        "slots per choice with the target",
        "of the fixed factor with as many drops",
        "saved",
    ]
    return table(head, rows)


def padding_table() -> str:
    """UL2 with padding routed and ignored, and the paired difference of losses."""
    records, _ = load_records("padding")
    rows = []
    for size in dict.fromkeys(r["size"] for r in records):
        mine = [r for r in records if r["size"] == size]
        by = {(r["variant"], r["seed"]): r for r in mine}
        seeds = sorted({r["seed"] for r in mine})
        differences = [by["ignored", s]["loss"] - by["routed", s]["loss"] for s in seeds]
        for variant in ("routed", "ignored"):
            own = [by[variant, s] for s in seeds]
            found = means(own, ("drop", "drop_real", "loss", "slots"))
            rows.append(
                [
                    size,
                    variant,
                    str(len(own)),
                    _percent(found["drop"]),
                    _percent(found["drop_real"]),
                    f"{found['loss']:.3f}",
                    _interval(paired(differences)) if variant == "ignored" else "",
                ]
            )
    head = ["size", "padding", "seeds", "dropped", "dropped of text", "loss", "difference"]
    return table(head, rows)


def plus_table() -> str:
    """The combination against OpenMoE's recipe, as a family of tests of its own."""
    own = [r for r in _remedies()[0] if r["variant"] in (OPENMOE, *PLUS)]
    found = corrected([each for size in ("S", "M") for each in compare(own, size)])
    whole = [r for r in own if r["length"] == 1]
    rows = []
    for each in found:
        drops = [
            means([r for r in whole if key_of(r)[:2] == (each.size, name)], ("drop",))["drop"]
            for name in (OPENMOE, each.variant)
        ]
        rows.append(
            [
                each.size,
                f"`{each.variant}`",
                str(each.steps.n),
                _interval(each.steps),
                _interval(each.compute),
                _p(each.corrected),
                _interval(each.time),
                f"{_percent(drops[0])} -> {_percent(drops[1])}",
                f"**{each.claim}**" if each.claim else "",
            ]
        )
    head = [
        "size",
        "variant",
        "seeds",
        "equal steps",
        "equal compute",
        "p, corrected",
        "equal time",
        "choices dropped in training",
        "claim",
    ]
    return table(head, rows)
