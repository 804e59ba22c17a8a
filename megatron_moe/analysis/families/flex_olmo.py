"""FlexOlmo (Shi et al., arXiv 2507.07024): OLMoE's rule over experts that were trained apart."""

from __future__ import annotations

from dataclasses import replace

from megatron_moe.analysis.families.olmoe import FAMILY as OLMOE
from megatron_moe.analysis.family import register

FAMILY = register("flex_olmo", replace(OLMOE, label="FlexOlmo", classes="FlexOlmo"))
