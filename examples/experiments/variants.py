"""The remedies as flags of `pretrain_openmoe.py`, each against OpenMoE's recipe.

A variant changes only what it names. `{quarter}` in a flag is a quarter of the run's steps.
"""

from __future__ import annotations

from dataclasses import dataclass

OPENMOE = "openmoe"
"""The recipe that all others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A remedy.

    Args:
        group: the part of the recipe that it changes.
        about: in the table.
        flags: in place of `{quarter}` a number of steps.
    """

    group: str
    about: str
    flags: tuple[str, ...] = ()

    def at(self, steps: int) -> tuple[str, ...]:
        """The flags for a run of so many steps."""
        return tuple(flag.format(quarter=max(1, steps // 4)) for flag in self.flags)


def _variant(group: str, about: str, line: str = "") -> Variant:
    return Variant(group=group, about=about, flags=tuple(line.split()))


VARIANTS = {
    OPENMOE: _variant("", "OpenMoE's recipe"),
    "factor-2": _variant(
        "capacity",
        "factor 2.0: slots for every choice of even loads",
        "--moe-expert-capacity-factor 2.0",
    ),
    "port": _variant(
        "capacity", "rule `port`: twice the slots, shared by 8 rows", "--moe-capacity-rule port"
    ),
    "dropless": _variant("capacity", "no drops", "--moe-expert-capacity-factor None"),
    "target": _variant("capacity", "target drop rate 5%", "--moe-target-drop-rate 0.05"),
    "probs": _variant("drops", "least probable choices drop", "--moe-token-drop-policy probs"),
    "random": _variant("drops", "random choices drop", "--moe-token-drop-policy random"),
    "fair": _variant("drops", "each position drops alike", "--moe-token-drop-policy fair"),
    "contextual": _variant("router", "router sees context", "--moe-router-type contextual"),
    "norm": _variant("router", "router of norms", "--moe-router-type norm"),
    "token-hash": _variant(
        "router",
        "choices fixed by the token id",
        "--moe-router-type token_hash --no-moe-router-pre-softmax"
        " --moe-router-load-balancing-type none",
    ),
    "freeze": _variant(
        "router", "router frozen after a quarter of the run", "--freeze-router-after {quarter}"
    ),
    "pools": _variant(
        "router",
        "pools of 4 to 8 experts for a document, balance over all rows",
        "--moe-router-document-pool 4 8 --moe-router-load-balancing-type global_aux_loss",
    ),
    "normalised": _variant("scores", "weights sum to 1", "--no-moe-router-pre-softmax"),
    "sigmoid": _variant(
        "scores", "sigmoid scores, weights sum to 1", "--moe-router-score-function sigmoid"
    ),
    "global-loss": _variant(
        "balance",
        "balance loss over all rows of a step",
        "--moe-router-load-balancing-type global_aux_loss",
    ),
    "bias": _variant(
        "balance",
        "bias by sign (0.001) in place of the loss",
        "--moe-router-enable-expert-bias --moe-router-load-balancing-type none",
    ),
    "quantile": _variant(
        "balance",
        "bias by quantiles in place of the loss",
        "--moe-router-load-balancing-type quantile_balancing",
    ),
    "z-chosen": _variant("balance", "z-loss of chosen experts", "--moe-z-loss-over chosen"),
    "muon": _variant(
        "optimizer",
        "Muon in place of AdamW",
        "--optimizer muon --muon-extra-scale-factor 0.2",
    ),
    "plus": _variant(
        "all",
        "Muon, context, target drop rate 15%, least probable choices drop",
        "--moe-router-type contextual --moe-target-drop-rate 0.15"
        " --moe-token-drop-policy probs --optimizer muon --muon-extra-scale-factor 0.2",
    ),
}
