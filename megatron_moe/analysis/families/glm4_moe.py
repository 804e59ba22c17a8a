"""GLM-4.5 and later GLM-4.x MoE models (arXiv 2508.06471): the rule of DeepSeek-V3."""

from __future__ import annotations

from dataclasses import replace

from megatron_moe.analysis.families.deepseek_v3 import FAMILY as DEEPSEEK_V3
from megatron_moe.analysis.family import register

FAMILY = register("glm4_moe", replace(DEEPSEEK_V3, label="GLM-4 MoE", classes="Glm4Moe"))
