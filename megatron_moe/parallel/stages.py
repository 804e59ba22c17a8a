"""Which layers each pipeline stage holds: evenly, with some fewer at the ends, or as written out.

A model chunk is a run of consecutive layers, and chunk c lies on stage c % PP. Without interleaving
there is one chunk per stage. The first chunk also embeds the tokens and the last one computes
logits and loss, so an even split leaves the last stage with more work than the others; `--describe`
prints the FLOPs of each stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.errors import UsageError
from megatron_moe.parallel.layout_rules import degree, divides, divisors

LAYOUT = "--pipeline-model-parallel-layout"
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
EMBEDDING = "--account-for-embedding-in-pipeline-split"
LOSS = "--account-for-loss-in-pipeline-split"
LAYERS_OF_CHUNK = "--num-layers-per-virtual-pipeline-stage"
CHUNKS = "--num-virtual-stages-per-pipeline-rank"
MOST_LETTERS = 65536
"""Of a written-out layout: `(t*9999)*9999` must be an error, not an allocation."""


@dataclass(frozen=True)
class StageSplit:
    """How the layers are divided.

    Args:
        vp: model chunks per rank, `None` for one.
        chunk_layers: layers of every chunk, in the order of the model.
    """

    vp: int | None
    chunk_layers: tuple[int, ...]


def split_layers(parallel: ParallelConfig, num_layers: int, pp: int) -> StageSplit:
    """Divide the layers as the flags say.

    Args:
        parallel: the flags.
        num_layers: of the model.
        pp: pipeline stages.

    Raises:
        UsageError: flags contradict each other, or the layers cannot be divided like that.
    """
    if parallel.pipeline_model_parallel_layout is not None:
        return _written_out(parallel, num_layers, pp)
    first = parallel.decoder_first_pipeline_num_layers
    last = parallel.decoder_last_pipeline_num_layers
    if first is None and last is None:
        return _counted(parallel, num_layers, pp)
    return _with_given_ends(parallel, num_layers, pp)


def _counted(parallel: ParallelConfig, num_layers: int, pp: int) -> StageSplit:
    """As many layers everywhere, where embedding and loss may count as a layer each."""
    embedding = int(parallel.account_for_embedding_in_pipeline_split)
    loss = int(parallel.account_for_loss_in_pipeline_split)
    total, what = num_layers + embedding + loss, "--num-layers"
    if total > num_layers:
        names = [name for name, given in ((EMBEDDING, embedding), (LOSS, loss)) if given]
        what = f"--num-layers with {' and '.join(names)}"
    if total % pp:
        raise UsageError(
            "--pipeline-model-parallel-size",
            pp,
            f"a divisor of {what} ({total}): {divisors(total)}",
            f"or give {FIRST}, {LAST} or {LAYOUT}",
        )
    vp = _chunks_per_rank(parallel, total // pp, pp)
    chunks = [total // (pp * (vp or 1))] * (pp * (vp or 1))
    chunks[0] -= embedding
    chunks[-1] -= loss
    return StageSplit(vp, _checked(chunks))


def _with_given_ends(parallel: ParallelConfig, num_layers: int, pp: int) -> StageSplit:
    """The first stage, the last one or both as given, and the others evenly."""
    first = parallel.decoder_first_pipeline_num_layers
    last = parallel.decoder_last_pipeline_num_layers
    flag, value = (FIRST, first) if first is not None else (LAST, last)
    if (
        parallel.account_for_embedding_in_pipeline_split
        or parallel.account_for_loss_in_pipeline_split
    ):
        raise UsageError(flag, value, f"used without {EMBEDDING} and {LOSS}")
    if parallel.num_layers_per_virtual_pipeline_stage is not None:
        expected = f"used without {LAYERS_OF_CHUNK}"
        raise UsageError(flag, value, expected, f"chunks differ between stages: give {CHUNKS}")
    if pp == 1:
        raise UsageError(flag, value, "used with --pipeline-model-parallel-size >= 2")
    given = [count for count in (first, last) if count is not None]
    left, stages = num_layers - sum(given), pp - len(given)
    each = left // stages if stages else 0
    if left != each * stages or left < 0 or (stages and not each):
        rest = f"the {stages} other stages" if stages else "no other stage"
        found = f"{max(left, 0)} of {num_layers} layers are left for {rest}"
        raise UsageError(flag, value, "such that the other stages share the rest evenly", found)
    ends = first if first is not None else each, last if last is not None else each
    per_stage = [ends[0], *[each] * (pp - 2), ends[1]]
    vp = parallel.num_virtual_stages_per_pipeline_rank
    if vp is None or vp == 1:
        return StageSplit(None, tuple(per_stage))
    for count in per_stage:
        divides(CHUNKS, vp, "the layers of one pipeline rank", count)
    return StageSplit(vp, tuple(count // vp for count in per_stage) * vp)


def _chunks_per_rank(parallel: ParallelConfig, per_rank: int, pp: int) -> int | None:
    """Chunks of the interleaved schedule from either flag, `None` for one."""
    layers = parallel.num_layers_per_virtual_pipeline_stage
    stages = parallel.num_virtual_stages_per_pipeline_rank
    if layers is not None and stages is not None:
        expected = f"used without {LAYERS_OF_CHUNK}"
        raise UsageError(CHUNKS, stages, expected, "give one of the two")
    flag, value = (LAYERS_OF_CHUNK, layers) if layers is not None else (CHUNKS, stages)
    if value is None:
        return None
    divides(flag, degree(flag, value), "the layers of one pipeline rank", per_rank)
    vp = per_rank // value if layers is not None else value
    if vp == 1:
        return None
    if pp == 1:
        expected = "used with --pipeline-model-parallel-size >= 2"
        raise UsageError(flag, value, expected, "the interleaved schedule needs several stages")
    return vp


def _written_out(parallel: ParallelConfig, num_layers: int, pp: int) -> StageSplit:
    """From `--pipeline-model-parallel-layout`, which also says how many chunks a rank has."""
    text = parallel.pipeline_model_parallel_layout or ""
    for name, given in (
        (FIRST, parallel.decoder_first_pipeline_num_layers),
        (LAST, parallel.decoder_last_pipeline_num_layers),
        (EMBEDDING, parallel.account_for_embedding_in_pipeline_split or None),
        (LOSS, parallel.account_for_loss_in_pipeline_split or None),
        (LAYERS_OF_CHUNK, parallel.num_layers_per_virtual_pipeline_stage),
        (CHUNKS, parallel.num_virtual_stages_per_pipeline_rank),
    ):
        if given is not None:
            raise UsageError(LAYOUT, text, f"used without {name}", "the layout says it all")
    chunks = parse_layout(text)
    whole = "".join(chunks)
    if whole != f"E{'t' * num_layers}L":
        found = f"it is {whole[:1] or 'nothing'}...{whole[-1:]} with {whole.count('t')} t"
        raise UsageError(LAYOUT, text, f"one E, then {num_layers} t (--num-layers), then L", found)
    if len(chunks) % pp:
        expected = f"a multiple of --pipeline-model-parallel-size ({pp}) chunks, parted by |"
        raise UsageError(LAYOUT, text, expected, f"it has {len(chunks)}")
    vp = len(chunks) // pp
    if vp > 1 and pp == 1:
        expected = "one chunk with --pipeline-model-parallel-size 1"
        raise UsageError(LAYOUT, text, expected, f"it has {len(chunks)}")
    counts = _checked([chunk.count("t") for chunk in chunks])
    return StageSplit(None if vp == 1 else vp, counts)


def _checked(chunks: list[int]) -> tuple[int, ...]:
    """A chunk between the first and the last one must have something to compute."""
    if min(chunks[1:-1], default=1) < 1 or min(chunks) < 0:
        raise UsageError(
            "layers of the model chunks",
            " ".join(map(str, chunks)),
            "at least one in every chunk but the first and the last",
        )
    return tuple(chunks)


def parse_layout(text: str) -> list[str]:
    """The chunks of a written-out layout, each as its letters.

    `E` embeds, `t` is a layer, `L` the logits and the loss, `|` parts chunks, commas are ignored,
    `x*n` repeats a letter and `(...)*n` what is in parentheses, as in Megatron-Core
    (`PipelineParallelLayerLayout`).

    Example: `Ett|(ttt|)*2L` is `Ett`, `ttt`, `ttt`, `L`.

    Raises:
        UsageError: anything else is in the text, or it is too long.
    """
    return "".join(_letters(text, text.replace(",", ""))).split("|")


_ITEM = re.compile(r"(?:\(([^()]+)\)|([EtL|]))(?:\*([0-9]{1,5}))?")
"""A group or a letter, and how often."""


def _letters(whole: str, text: str) -> Iterator[str]:
    place = length = 0
    while place < len(text):
        item = _ITEM.match(text, place)
        if item is None or (item[1] and not item[3]):
            why = f"not so from {text[place : place + 20]!r} on"
            if text[place] == "m":
                why = "multi-token prediction is not built"
            raise UsageError(LAYOUT, whole, "made of E, t, L, |, x*n and (...)*n", why)
        inner, times = item[2] or "".join(_letters(whole, item[1])), int(item[3] or 1)
        length += len(inner) * times
        if length > MOST_LETTERS:
            raise UsageError(LAYOUT, whole, f"at most {MOST_LETTERS} letters")
        yield inner * times
        place = item.end()
