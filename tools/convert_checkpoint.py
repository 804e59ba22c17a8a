r"""Convert checkpoints between native, Hugging Face and t5x, and from Megatron-LM; cast, average,
upcycle.

Tensors are streamed, so memory does not grow with the model. A conversion is complete or writes
nothing. Optimizer state is not converted.

    python tools/convert_checkpoint.py --from native --load checkpoints --to hf --save openmoe-hf
    python tools/convert_checkpoint.py --from hf --load openmoe-8b --to native --save checkpoints \
        --dtype bf16 --verify
    python tools/convert_checkpoint.py --from t5x --load checkpoint_400000 --to native --save ckpt \
        --preset openmoe-8b-32e-released
    python tools/convert_checkpoint.py --from megatron --load checkpoints/mixtral --to native \
        --save checkpoints
    python tools/convert_checkpoint.py --from native --load a b c --to native --save mean
    python tools/convert_checkpoint.py --from native --load checkpoints --to hf --save x --dry-run
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_moe.checkpoint.foreign import weights_in
from megatron_moe.command_line import Parser
from megatron_moe.config import RunConfig
from megatron_moe.config.fields import flag_named
from megatron_moe.config.presets import PRESETS
from megatron_moe.console import escape_unprintable
from megatron_moe.convert.formats import (
    FORMATS,
    OPENMOE,
    SOURCES,
    ConversionTarget,
    planned_tensors,
    read,
    write,
)
from megatron_moe.convert.inspection import (
    PROMPT,
    check_same_tensors,
    free_memory,
    logits_difference,
    memory_needed,
)
from megatron_moe.convert.llama import ARCHITECTURES
from megatron_moe.convert.model import DTYPES, LazyTensor, LogicalModel, average, cast
from megatron_moe.convert.second_reading import verify_result, verify_source
from megatron_moe.convert.tokenizers import with_tokenizer
from megatron_moe.convert.upcycle import MODES, Upcycling, upcycle
from megatron_moe.errors import USAGE_EXIT_CODE, UsageError

_SHARD_GIB = 5.0
_MEGATRON_FLAGS = {"--model-type", "--loader", "--saver", "--load-dir", "--save-dir"}
"""Flags of Megatron-LM's own conversion tool, which has another command line."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = Parser("convert_checkpoint.py", summary, examples)
    words = sys.argv[1:] if argv is None else argv
    if of_megatron := [word for word in words if word.partition("=")[0] in _MEGATRON_FLAGS]:
        fix = "--from megatron --load FOLDER --to native --save FOLDER converts its checkpoints"
        expected = "used with Megatron-LM's tools/checkpoint/convert.py"
        raise UsageError(of_megatron[0].partition("=")[0], " ".join(words), expected, fix)
    add = parser.add_argument
    add("--from", dest="source", required=True, choices=SOURCES)
    add("--to", dest="target", required=True, choices=FORMATS)
    add("--load", required=True, nargs="+", type=Path, help="a checkpoint; several are averaged")
    add(
        "--save",
        required=True,
        type=Path,
        help="hf, t5x: new directory; native: checkpoints of a run",
    )
    add("--ckpt-step", type=int, help="native, megatron: step to read, the tracker's")
    add("--preset", choices=PRESETS, help="t5x: the model, which its checkpoints do not record")
    add("--config", type=Path, help="t5x, megatron: the model, from the config.json of a run")
    add("--dtype", choices=DTYPES, help="dtype of the result, by default that of the source")
    add(
        "--expert-layout",
        choices=("stacked", "unstacked"),
        default="stacked",
        help="hf: layout of the experts",
    )
    add(
        "--architecture",
        choices=(OPENMOE, *ARCHITECTURES),
        default=OPENMOE,
        help="hf: class of transformers to load the result",
    )
    add("--max-shard-size", type=float, default=_SHARD_GIB, help="maximal GiB of a file (5)")
    tokenizer = "tokenizer to store with the result: a file or folder (the one beside the weights)"
    add("--tokenizer-model", type=Path, metavar="FILE", help=tokenizer)
    add("--dry-run", action="store_true", help="list the tensors and write nothing")
    add("--verify", action="store_true", help="read the result back; compare tensors and logits")
    add("--verify-logits", action="store_true", help="--verify; an error if memory is too small")
    more = parser.add_argument_group("upcycling: a mixture of experts from a dense checkpoint")
    add = more.add_argument
    add("--upcycle", choices=MODES, help="shared: starts exactly at the dense model; copy: nearly")
    add("--num-experts", type=int, help="with --upcycle")
    add("--moe-layer-freq", help="with --upcycle: MoE layers, e.g. ([0]*3+[1])*8")
    add("--moe-router-topk", type=int, help="with --upcycle, by default 2")
    add("--upcycle-noise", type=float, help="relative standard deviation of noise on each expert")
    add("--upcycle-fresh", type=float, help="share of each expert's hidden units to redraw")
    add("--seed", type=int, help="with --upcycle, by default 1234")
    return parser.parse_args(argv)


def upcycling(options: argparse.Namespace) -> Upcycling | None:
    """The settings of `--upcycle`, if given.

    Raises:
        UsageError: a required flag is missing, or a flag is given without `--upcycle`.
    """
    names = {
        "num_experts": "num_experts",
        "moe_layer_freq": "layer_freq",
        "moe_router_topk": "topk",
        "upcycle_noise": "noise",
        "upcycle_fresh": "fresh",
        "seed": "seed",
    }
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.upcycle is None:
        for name, value in given.items():
            raise UsageError(flag_named(name), value, "absent without --upcycle")
        return None
    for name in ("num_experts", "moe_layer_freq"):
        if name not in given:
            raise UsageError(flag_named(name), None, "given with --upcycle")
    values = {"topk": 2, **{names[name]: value for name, value in given.items()}}
    return Upcycling(mode=options.upcycle, **values)


def run(options: argparse.Namespace) -> None:
    """Run the conversion.

    Raises:
        UsageError: a flag or a checkpoint is invalid.
    """
    if not options.max_shard_size > 0:
        raise UsageError("--max-shard-size", options.max_shard_size, "> 0 GiB")
    check_sources(options)
    config = configuration(options)
    models = [read(options.source, path, options.ckpt_step, config) for path in options.load]
    model, lines = with_tokenizer(average(models), options.tokenizer_model)
    how = upcycling(options)
    model = cast(model if how is None else upcycle(model, how), options.dtype)
    target = ConversionTarget(
        format=options.target,
        path=options.save,
        layout=options.expert_layout,
        architecture=options.architecture,
        max_shard=int(options.max_shard_size * 2**30),
    )
    tensors = planned_tensors(model, target)
    # Standard output of a dry run is the list of tensors.
    print(*lines, sep="\n", file=sys.stderr if options.dry_run else sys.stdout)
    if options.dry_run:
        print_plan(tensors, model.bytes)
        return
    if options.verify_logits:
        require_memory(model)
    with tqdm(total=model.bytes, unit="B", unit_scale=True, desc="converting") as bar:
        where = write(model, target, bar.update)
    print(f"{len(model.tensors)} tensors, {model.bytes} bytes: {where}")
    if options.verify or options.verify_logits:
        verify_sources(options)
        verify(model, target, tensors, where)


def check_sources(options: argparse.Namespace) -> None:
    """Check that the directories to read have the format of `--from`, as far as names tell.

    Raises:
        UsageError: one has another of our formats.
    """
    for path in options.load:
        found = weights_in(path)
        actual = None if found is None else found.format.split()[0]
        actual = "megatron" if actual == "torch_dist" else actual
        if found is not None and actual in SOURCES and actual != options.source:
            expected = f"{actual} for {path}, {found.described}"
            raise UsageError("--from", options.source, expected)


def configuration(options: argparse.Namespace) -> RunConfig | None:
    """The configuration of `--preset` or `--config`, if given.

    Raises:
        UsageError: both are given, or the source format contains the configuration.
    """
    if options.preset is None and options.config is None:
        return None
    flag, value = ("--preset", options.preset) if options.preset else ("--config", options.config)
    if options.source != "t5x" and not (options.source == "megatron" and options.config):
        expected = f"absent with --from {options.source}, whose checkpoints contain it"
        raise UsageError(flag, str(value), expected)
    if options.preset and options.config:
        raise UsageError("--config", str(options.config), "absent with --preset")
    return PRESETS[options.preset] if options.preset else RunConfig.load(options.config)


def print_plan(tensors: Mapping[str, LazyTensor], size: int) -> None:
    """A line per tensor that would be written."""
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        print(f"{name}  {list(tensor.shape)}  {dtype}  {tensor.bytes} bytes")
    print(f"{len(tensors)} tensors, {size} bytes; nothing was written")


def require_memory(model: LogicalModel) -> None:
    """Check, before anything is written, that `--verify-logits` has enough memory.

    Raises:
        UsageError: the model does not fit in the available memory.
    """
    needed, free = memory_needed(model), free_memory()
    if needed > free:
        what = "memory needed for --verify-logits"
        fix = "--verify compares everything but the logits"
        raise UsageError(what, needed, f"<= {free} bytes, the available memory", fix)


def verify_sources(options: argparse.Namespace) -> None:
    """Compare the converter's reading of each source with that of other code.

    Raises:
        UsageError: they differ.
    """
    for path in options.load:
        with tqdm(unit="B", unit_scale=True, desc="verifying the source") as bar:
            line = verify_source(options.source, path, bar.update, options.ckpt_step)
        print(f"verified: {line}")


def verify(
    model: LogicalModel,
    target: ConversionTarget,
    planned: Mapping[str, LazyTensor],
    where: Path,
) -> None:
    """Compare the result with the source, as other code and as the converter's reader read it.

    Logits too, if memory suffices.

    Raises:
        UsageError: they differ.
    """
    step = model.step if target.format == "native" else None
    config = model.config if target.format == "t5x" else None
    written = read(target.format, target.path, step, config)
    with tqdm(total=model.bytes, unit="B", unit_scale=True, desc="verifying") as bar:
        line = verify_result(model, planned, target.format, where, bar.update)
    print(f"verified: {line}")
    count = check_same_tensors(model, written, lambda _: None)
    print(f"verified: {count} tensors, read back by the converter, have the same SHA-256")
    needed, free = memory_needed(model), free_memory()
    if needed > free:
        gib = f"{needed / 2**30:.1f} GiB, {max(0, free) / 2**30:.1f} GiB are available"
        print(f"logits are not compared: the model needs {gib}")
        return
    difference = logits_difference(model, written)
    if difference != 0.0:
        raise UsageError("difference of the logits", difference, "0")
    print(f"verified: logits of {len(PROMPT)} tokens are the same as those of {model.source}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    escape_unprintable()
    try:
        run(parse(argv))
    except UsageError as error:
        print(f"convert_checkpoint.py: error: {error}", file=sys.stderr)
        return USAGE_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
