"""C3 and C5: how much an expert prefers the tokens of one domain.

Shapes: L layers, D domains, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.collectors.domains import Domains
from megatron_moe.analysis.plot import Axis, Bars, Figure, Reference, Series
from megatron_moe.analysis.result import Result, Table


@register
class DomainSpecialization(Analysis):
    """See the module."""

    key = "domains"
    title = "Domain specialization"
    question = "Do experts specialize in domains?"
    definition = (
        "The share of a domain's tokens that choose expert e among their k experts, "
        "N_e(domain) / N(domain). If the domain did not matter, each share would be the expert's "
        "share over all tokens; if neither mattered, k/E."
    )
    source = (
        "Muennighoff et al., OLMoE (arXiv 2409.02060), section 5.3; "
        "Xue et al., OpenMoE (arXiv 2402.01739), figures 5 to 8"
    )
    group = "routing"
    uses = ("domains",)

    def compute(self, material: Material) -> Result:
        """Shares by layer, domain and expert."""
        counts = cast(Domains, material.collected["domains"])
        setting = material.setting
        share_LDE = counts.chosen_LDE / counts.tokens_D[:, None]
        chance = setting.sizes.topk / setting.sizes.num_experts
        names, layers = setting.sample.names, setting.layers
        places = [
            (layer, name, expert)
            for layer in layers
            for name in names
            for expert in range(setting.sizes.num_experts)
        ]
        table = Table(
            name="shares",
            about="share of the domain's tokens that choose the expert, any of their k choices",
            columns={
                "layer": [layer for layer, _, _ in places],
                "domain": [name for _, name, _ in places],
                "expert": [expert for _, _, expert in places],
                "share": share_LDE.ravel().tolist(),
            },
        )
        return Result(
            analysis=self.key,
            numbers={"chance": chance, "largest share over chance": share_LDE.max() / chance},
            tables=[table],
            arrays={"share_LDE": share_LDE, "layers": np.array(layers), "domains": np.array(names)},
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Bars by expert, one colour per domain; a panel per layer, a figure per checkpoint."""
        return [self._figure(label, result) for label, result in results.items()]

    def _figure(self, label: str, result: Result) -> Figure:
        share_LDE, names = result.arrays["share_LDE"], result.arrays["domains"]
        experts = list(range(share_LDE.shape[2]))
        panels = {
            f"layer {layer}": Bars(
                series=[
                    Series(name=str(n), x=experts, y=100 * row)
                    for n, row in zip(names, share_LDE[place], strict=True)
                ],
                x=Axis(title="expert"),
                y=Axis(title="tokens of the domain (%)"),
                references=[Reference(value=100 * result.numbers["chance"], label="uniform")],
            )
            for place, layer in enumerate(result.arrays["layers"])
        }
        return Figure(key=f"domains-{label}", title=f"Experts by domain, {label}", panels=panels)

    def reading(self, results: Mapping[str, Result]) -> str:
        """The largest preference."""
        return " ".join(
            f"{label}: the strongest preference of an expert for a domain is "
            f"{result.numbers['largest share over chance']:.1f} times chance."
            for label, result in results.items()
        )
