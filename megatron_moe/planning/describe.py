"""What a configuration amounts to: sizes, parameters, FLOPs, layout and phases (`--describe`).

As text or JSON. Integer arithmetic only: it needs no torch, launcher, data or GPU.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_moe.config import ModelConfig, MoEConfig, RunConfig, capacity_group_tokens
from megatron_moe.config.phases import errors_of_phase
from megatron_moe.config.run import flag_of
from megatron_moe.data.composition import Share, described_shares, share_lines
from megatron_moe.errors import UsageError
from megatron_moe.model.counting import (
    ParameterCounts,
    RankParameters,
    TokenFlops,
    count_parameters,
    fewest_ranks,
    flops_per_stage,
    flops_per_token,
    parameters_per_rank,
    stages_of_layers,
)
from megatron_moe.model.logical import expert_width
from megatron_moe.parallel.launch import launched
from megatron_moe.parallel.layout import Layout, resolve_layout
from megatron_moe.tokenizer.build import build_tokenizer, padded_vocab_size
from megatron_moe.training.phases import (
    Phase,
    RunSchedule,
    differences,
    phase_lines,
    resolve_run_schedule,
)
from megatron_moe.training.plan import resolve_plan

ASSUMED_VOCAB = 8192
"""Vocabulary if neither a tokenizer nor `--vocab-size` gives one; marked as assumed."""
ASSUMED = " (assumed: neither --vocab-size nor a tokenizer is given)"
"""The mark."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What `--describe` prints."""

    config: RunConfig
    vocab_size: int
    """V, padded."""
    vocab_assumed: bool
    """V is `ASSUMED_VOCAB`, as the configuration does not determine it."""
    parameters: ParameterCounts
    flops: TokenFlops
    """Per token of a sequence of `--seq-length`."""
    layout: Layout
    per_stage: tuple[RankParameters, ...]
    """Parameters on each rank of every pipeline stage."""
    stage_flops: tuple[TokenFlops, ...]
    """`flops` of every pipeline stage."""
    shares: tuple[Share, ...]
    """The sources of the training data; empty if none is named."""
    schedule: RunSchedule | None = None
    """The phases of the run; `None` without `--phases`. Everything else describes the first one."""

    @property
    def imbalance(self) -> float:
        """FLOPs of the busiest pipeline stage over the mean of all: 1 where all have the same."""
        forward = [stage.forward for stage in self.stage_flops]
        return max(forward) * len(forward) / sum(forward)

    def text(self) -> str:
        """For people: one block of lines for each section."""
        sections = (
            self._model_lines(),
            self._parameter_lines(),
            self._flops_lines(),
            self._layout_lines(),
            *([self._stage_lines()] if self.layout.pp > 1 else []),
            *self._data_sections(),
            *([_phase_section(self.schedule)] if self.schedule is not None else []),
            self._config_lines(),
        )
        return "\n\n".join("\n".join(lines) for lines in sections)

    def to_json(self) -> str:
        """For programs: one object with the sections of `text` and the resolved layout."""
        counts, flops = self.parameters, self.flops
        values = {
            "config": self.config.to_dict(),
            "vocabulary": {"padded_size": self.vocab_size, "assumed": self.vocab_assumed},
            "parameters": {
                "total": counts.total,
                "total_without_embeddings": counts.total_without_embeddings,
                "activated": counts.activated,
                "activated_without_embeddings": counts.activated_without_embeddings,
                "by_kind": counts.by_kind,
                "activated_by_kind": counts.activated_by_kind,
            },
            "flops_per_token": {
                "forward": flops.forward,
                "training": flops.training,
                "forward_by_part": dataclasses.asdict(flops),
            },
            "layout": dataclasses.asdict(self.layout),
            "training_data": [dataclasses.asdict(share) for share in self.shares],
            "parameters_per_rank": [
                {"stage": stage, **dataclasses.asdict(rank), "total": rank.total}
                for stage, rank in enumerate(self.per_stage)
            ],
            "flops_per_token_of_stages": [
                {"stage": stage, "forward": flops.forward, "training": flops.training}
                for stage, flops in enumerate(self.stage_flops)
            ],
            "stage_imbalance": self.imbalance,
        }
        if self.schedule is not None:
            values["stages"] = [_phase_values(phase) for phase in self.schedule.phases]
        return json.dumps(values, indent=2)

    def _model_lines(self) -> list[str]:
        model, moe = self.config.model, self.config.moe
        where = ", ".join(map(str, self.config.moe_layers)) or "none"
        shared = moe.moe_shared_expert_intermediate_size
        tied = "untied" if model.untie_embeddings_and_output_weights else "tied"
        return [
            "Model",
            f"  layers        {model.num_layers}, MoE layers (from 0): {where}",
            f"  hidden        {model.hidden_size}",
            f"  attention     {_attention(model)}",
            *(f"  note          {line}" for line in model.attention_lines()),
            f"  feed-forward  {model.ffn_hidden_size}, {model.ffn_variant}",
            f"  experts       {_numbers(moe)} x {expert_width(model, moe)}, "
            f"{moe.moe_router_topk} a token, "
            + (f"shared {shared}, {moe.moe_shared_expert_placement}" if shared else "none shared"),
            *(f"  note          {line}" for line in self.config.routing_lines()),
            *([self._routing_line()] if self.config.moe_layers else []),
            f"  vocabulary    {self.vocab_size} padded, {tied}{ASSUMED * self.vocab_assumed}",
        ]

    def _routing_line(self) -> str:
        """The tokens that compete for slots, which depend on the micro-batch."""
        moe, rows, row = self.config.moe, self.layout.micro_batch_size, self.layout.seq_length
        size = capacity_group_tokens(moe, rows=rows, row_tokens=row)
        part = f"1/{row // size} row" if size < row else f"{size // row} row" + "s" * (size > row)
        return (
            f"  capacity      {moe.moe_capacity_rule}, in groups of {size} tokens ({part});"
            f" {', '.join(moe.load_balancing_types)}"
        )

    def _parameter_lines(self) -> list[str]:
        counts = self.parameters
        rows: list[tuple[str, int, int]] = [
            (kind, total, counts.activated_by_kind[kind]) for kind, total in counts.by_kind.items()
        ]
        rows.append(("all", counts.total, counts.activated))
        without = (counts.total_without_embeddings, counts.activated_without_embeddings)
        rows.append(("without embeddings", *without))
        return [*_table("Parameters", ("total", "activated by a token"), rows)]

    def _flops_lines(self) -> list[str]:
        parts = dataclasses.asdict(self.flops)
        rows = [(part.replace("_", " "), count, 3 * count) for part, count in parts.items()]
        rows.append(("all", self.flops.forward, self.flops.training))
        title = f"FLOPs per token at {self.layout.seq_length} tokens"
        return [*_table(title, ("forward", "forward + backward"), rows)]

    def _layout_lines(self) -> list[str]:
        layout = self.layout
        rows = [
            (f"each rank of stage {stage}", rank.dense, rank.expert, rank.total)
            for stage, rank in enumerate(self.per_stage)
        ]
        return [
            f"Layout of {layout.world_size} ranks",
            f"  dense         TP {layout.tp} x PP {layout.pp} x DP {layout.dp}",
            f"  experts       ETP {layout.etp} x EP {layout.ep} x PP {layout.pp} x DP {layout.edp}",
            f"  model chunks  {layout.num_chunks} a rank, {_layers_each(layout)}",
            f"  batch         {layout.global_batch_size} sequences = {layout.micro_batch_size}"
            f" x DP {layout.dp} x {layout.num_microbatches} micro-batches",
            *self._missing_length(),
            "",
            *_table("Parameters per rank", ("dense", "expert", "all"), rows),
        ]

    def _missing_length(self) -> list[str]:
        """What training needs besides, and a description does not."""
        if self.schedule is not None or _has_length(self.config):
            return []
        return [
            "  length        not given: training needs --train-iters, --train-samples or --phases"
        ]

    def _stage_lines(self) -> list[str]:
        """The work of each stage; looking up embeddings takes no FLOPs."""
        layers = stages_of_layers(self.layout.chunk_layers, self.layout.pp)
        rows = []
        for stage, flops in enumerate(self.stage_flops):
            held = [name for name, here in self._ends(stage) if here]
            name = f"stage {stage}" + f" with {' and '.join(held)}" * bool(held)
            forward = flops.forward - flops.logits, flops.logits, flops.forward
            rows.append((name, layers.count(stage), *forward))
        columns = "layers", "FLOPs of layers", "of logits", "all"
        title = "Forward FLOPs per token of each pipeline stage"
        more = f"the busiest stage has {100 * (self.imbalance - 1):.1f}% more than the mean"
        return [*_table(title, columns, rows), f"  imbalance     {self.imbalance:.3f}: {more}"]

    def _ends(self, stage: int) -> list[tuple[str, bool]]:
        return [("embedding", stage == 0), ("logits", stage == self.layout.pp - 1)]

    def _data_sections(self) -> list[list[str]]:
        if not self.shares or self.schedule is not None:
            return []
        return [["Training data", *(f"  {line}" for line in share_lines(self.shares))]]

    def _config_lines(self) -> list[str]:
        return ["Configuration", *_config_lines(self.config.to_dict())]


def describe(
    config: RunConfig, how: Literal["text", "json"] = "text", world_size: int | None = None
) -> str:
    """The text of `--describe`.

    Args:
        config: the configuration, validated.
        how: `text` or `json`.
        world_size: ranks; `None` takes the launcher's, or the fewest that the layout needs.

    Raises:
        UsageError: the layout or the sizes are impossible, the tokenizer cannot be opened, or the
            learning rate does not fit into the run. A length is not needed to describe a model.
    """
    vocab_size, assumed = known_vocab_size(config)
    if config.train.stages is None:
        description = describe_layout(config, None, vocab_size, world_size)
        if _has_length(config):  # what training checks once it knows how many steps it takes
            resolve_plan(config, description.layout.global_batch_size)
    else:
        description = _describe_phases(config, vocab_size, world_size)
    description = dataclasses.replace(description, vocab_assumed=assumed)
    return description.text() if how == "text" else description.to_json()


def _describe_phases(config: RunConfig, vocab_size: int, world_size: int | None) -> Description:
    schedule = resolve_run_schedule(config, _ranks(config, world_size), vocab_size)
    first = schedule.phases[0]
    description = describe_layout(first.config, first.layout, vocab_size)
    return dataclasses.replace(description, config=config, schedule=schedule)


def describe_layout(
    config: RunConfig, layout: Layout | None, vocab_size: int, world_size: int | None = None
) -> Description:
    """Describe a configuration with a known vocabulary.

    Args:
        config: the resolved configuration.
        layout: its layout; `None` resolves it for ``world_size`` ranks.
        vocab_size: V, padded.
        world_size: as for `describe`; unused with a layout.
    """
    if layout is None:
        layout = resolve_layout(config, _ranks(config, world_size), vocab_size)
    sizes = (config.model, config.moe, vocab_size)
    return Description(
        config=config,
        vocab_size=vocab_size,
        vocab_assumed=False,
        parameters=count_parameters(*sizes),
        flops=flops_per_token(*sizes, config.data.seq_length),
        layout=layout,
        shares=described_shares(config, layout.global_batch_size),
        per_stage=parameters_per_rank(
            *sizes,
            tp=layout.tp,
            pp=layout.pp,
            chunk_layers=layout.chunk_layers,
            ep=layout.ep,
            etp=layout.etp,
        ),
        stage_flops=flops_per_stage(*sizes, config.data.seq_length, layout.chunk_layers, layout.pp),
    )


def _has_length(config: RunConfig) -> bool:
    return config.train.train_iters is not None or config.train.train_samples is not None


def known_vocab_size(config: RunConfig) -> tuple[int, bool]:
    """The padded vocabulary, and whether it is `ASSUMED_VOCAB`.

    Raises:
        UsageError: the tokenizer cannot be opened.
    """
    if config.data.tokenizer_type == "NullTokenizer" and config.data.vocab_size is None:
        return ASSUMED_VOCAB, True
    return padded_vocab_size(config.data, build_tokenizer(config.data)), False


def _ranks(config: RunConfig, world_size: int | None) -> int:
    ranks = world_size if world_size is not None else _default_world_size(config)
    if ranks < 1:
        raise UsageError("--world-size", ranks, ">= 1")
    return ranks


def _default_world_size(config: RunConfig) -> int:
    here = launched()
    if not here.alone:
        return here.world_size
    parallel = config.parallel
    tp = parallel.tensor_model_parallel_size
    degrees = {
        "tp": tp,
        "pp": parallel.pipeline_model_parallel_size,
        "ep": parallel.expert_model_parallel_size,
        "etp": parallel.expert_tensor_parallel_size or tp,
    }
    # A degree below one is an error in `resolve_layout`, which names its flag.
    return fewest_ranks(**{name: max(degree, 1) for name, degree in degrees.items()})


def _layers_each(layout: Layout) -> str:
    counts = layout.chunk_layers
    if len(set(counts)) == 1:
        return f"{counts[0]} layers each"
    return f"{' '.join(map(str, counts))} layers in the order of the model"


def _attention(model: ModelConfig) -> str:
    parts = [f"{model.num_attention_heads} heads x {model.kv_channels}"]
    if model.group_query_attention:
        parts.append(f"keys and values of {model.num_query_groups} groups")
    if model.qk_layernorm:
        parts.append(f"queries and keys normalised over each {model.qk_layernorm_scope}")
    return ", ".join(parts)


def _phase_section(schedule: RunSchedule) -> list[str]:
    """The phases as they will run: each one's place, what it changes, and its training data."""
    lines, before = ["Phases"], None
    for phase, line in zip(schedule.phases, phase_lines(schedule), strict=True):
        lines.append(f"  {line}")
        if before is not None:
            lines += [f"    {change}" for change in differences(before.config, phase.config)]
        shares = _shares_of(phase)
        lines += [f"    {row}" for row in share_lines(shares)] if shares else []
        before = phase
    return lines


def _phase_values(phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "first_iteration": phase.first_iteration,
        "last_iteration": phase.last_iteration,
        "first_sample": phase.first_sample,
        "samples": phase.samples,
        "first_token": phase.first_token,
        "last_token": phase.last_token,
        "learning_rate_counts_from": phase.rate_origin,
        "config": phase.config.to_dict(),
        "layout": dataclasses.asdict(phase.layout),
        "training_data": [dataclasses.asdict(share) for share in _shares_of(phase)],
    }


def _shares_of(phase: Phase) -> tuple[Share, ...]:
    with errors_of_phase(phase.label):
        return described_shares(phase.config, phase.layout.global_batch_size)


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> Iterator[str]:
    """A title with column heads, and rows of a name and integers, aligned."""
    first = max(len(title), *(len(row[0]) + 2 for row in rows))
    widths = [
        max(len(column), *(len(f"{row[i]:,}") for row in rows))
        for i, column in enumerate(columns, 1)
    ]
    heads = "  ".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))
    yield f"{title:<{first}}  {heads}"
    for name, *values in rows:
        cells = "  ".join(f"{v:>{w},}" for v, w in zip(values, widths, strict=True))
        yield f"{'  ' + name:<{first}}  {cells}"


def _config_lines(sections: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for section, values in sections.items():
        yield f"  {section}"
        for name, value in values.items():
            shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
            yield f"    {flag_of(name):<44}{shown}"


def _numbers(moe: MoEConfig) -> str:
    """Experts of each MoE layer; one number if all have as many."""
    return ", ".join(map(str, moe.moe_layer_num_experts or (moe.num_experts,)))
