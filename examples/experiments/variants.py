"""The remedies as flags of `pretrain_openmoe.py`, each against OpenMoE's recipe.

A variant changes only what it names. In a flag, `{quarter}` is a quarter of the run's steps, and
`{adamw_lr}` the size's rate of AdamW.
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
        flags: with names in braces for what depends on the run.
    """

    group: str
    about: str
    flags: tuple[str, ...] = ()

    def at(self, steps: int, adamw_lr: float) -> tuple[str, ...]:
        """The flags for a run of so many steps, of a size with this rate of AdamW."""
        quarter = max(1, steps // 4)
        return tuple(flag.format(quarter=quarter, adamw_lr=adamw_lr) for flag in self.flags)


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
    "top-1": _variant("experts", "one choice a token", "--moe-router-topk 1"),
    "fine-grained": _variant(
        "experts",
        "experts and choices split in four",
        "--moe-expert-split-factor 4",
    ),
    "adamw": _variant(
        "optimizer", "AdamW in place of Adafactor", "--optimizer adam --lr {adamw_lr}"
    ),
    "muon": _variant(
        "optimizer",
        "Muon for matrices, AdamW for the rest",
        "--optimizer muon --muon-extra-scale-factor 0.03 --lr 0.06",
    ),
    "plus": _variant(
        "all",
        "one choice, split in four; context; least probable choices drop",
        "--moe-router-topk 1 --moe-expert-split-factor 4 --moe-router-type contextual"
        " --moe-token-drop-policy probs",
    ),
}
