r"""Convert checkpoints: native, Hugging Face, t5x; cast, strip, average; dense models to experts.

Tensors are streamed, so memory does not grow with the model. A conversion is all or nothing.

    python tools/convert_checkpoint.py --from native --load checkpoints --to hf --save openmoe-hf
    python tools/convert_checkpoint.py --from hf --load openmoe-8b --to native --save checkpoints \
        --dtype bf16 --verify
    python tools/convert_checkpoint.py --from t5x --load checkpoint_400000 --to native --save ckpt \
        --preset openmoe-8b-32e-released
    python tools/convert_checkpoint.py --from native --load a b c --to native --save mean
    python tools/convert_checkpoint.py --from native --load checkpoints --to hf --save x --dry-run
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_moe.config import RunConfig
from megatron_moe.config.presets import PRESETS
from megatron_moe.convert.formats import FORMATS, Target, compare, planned, read, write
from megatron_moe.convert.lazy import LazyTensor
from megatron_moe.convert.model import DTYPES, Model, average, cast
from megatron_moe.convert.upcycle import MODES, Upcycling, upcycle
from megatron_moe.errors import USAGE_EXIT_CODE, UsageError

_SHARD_GIB = 5.0
_PROMPT = (7, 3, 11, 3, 19, 2, 5, 13)
"""Token ids, taken modulo the vocabulary, on which logits are compared."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, choices=FORMATS)
    add("--to", dest="target", required=True, choices=FORMATS)
    add("--load", required=True, nargs="+", type=Path, help="a checkpoint; several are averaged")
    add("--save", required=True, type=Path, help="hf: a new directory; native: of a run's steps")
    add("--ckpt-step", type=int, help="native: the step to read, by default the tracker's")
    add("--preset", choices=PRESETS, help="t5x: the model, which its checkpoints do not name")
    add("--config", type=Path, help="t5x: likewise, from the config.json of a run")
    add("--dtype", choices=DTYPES, help="of the result; by default that of the source")
    add("--expert-layout", choices=("stacked", "unstacked"), default="stacked", help="hf")
    add("--max-shard-size", type=float, default=_SHARD_GIB, help="GiB of one file")
    add("--tokenizer-model", type=Path, help="a tokenizer file to put beside the result")
    add("--dry-run", action="store_true", help="list the tensors, write nothing")
    add("--verify", action="store_true", help="read the result back and compare it")
    add("--verify-logits", action="store_true", help="--verify, and the logits of a prompt")
    more = parser.add_argument_group("a mixture of experts from a dense checkpoint")
    add = more.add_argument
    add("--upcycle", choices=MODES, help="shared: starts exactly as the dense model; copy: nearly")
    add("--num-experts", type=int, help="with --upcycle")
    add("--moe-layer-freq", help="with --upcycle: which layers, e.g. ([0]*3+[1])*8")
    add("--moe-router-topk", type=int, help="with --upcycle, by default 2")
    add("--upcycle-noise", type=float, help="relative standard deviation added to each expert")
    add("--upcycle-fresh", type=float, help="share of each expert's hidden units drawn anew")
    add("--seed", type=int, help="with --upcycle, by default 1234")
    return parser.parse_args(argv)


def upcycling(options: argparse.Namespace) -> Upcycling | None:
    """What `--upcycle` asks for.

    Raises:
        UsageError: a flag of it is missing, or there without it.
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
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(flag, value, "absent without --upcycle")
        return None
    for name in ("num_experts", "moe_layer_freq"):
        if name not in given:
            raise UsageError(f"--{name.replace('_', '-')}", None, "given with --upcycle")
    values = {"topk": 2, **{names[name]: value for name, value in given.items()}}
    return Upcycling(mode=options.upcycle, **values)


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for.

    Raises:
        UsageError: a flag or a checkpoint is wrong.
    """
    if not options.max_shard_size > 0:
        raise UsageError("--max-shard-size", options.max_shard_size, "a positive number of GiB")
    config = configuration(options)
    models = [read(options.source, path, options.ckpt_step, config) for path in options.load]
    model = with_tokenizer(average(models), options.tokenizer_model)
    how = upcycling(options)
    model = cast(model if how is None else upcycle(model, how), options.dtype)
    target = Target(
        format=options.target,
        path=options.save,
        layout=options.expert_layout,
        max_shard=int(options.max_shard_size * 2**30),
    )
    tensors = planned(model, target)
    if options.dry_run:
        print_plan(tensors, model.bytes)
        return
    with tqdm(total=model.bytes, unit="B", unit_scale=True, desc="converting") as bar:
        where = write(model, target, bar.update)
    print(f"{len(model.tensors)} tensors, {model.bytes} bytes: {where}")
    if options.verify or options.verify_logits:
        verify(model, target, options.verify_logits)


def configuration(options: argparse.Namespace) -> RunConfig | None:
    """Of `--preset` or `--config`, if one is given.

    Raises:
        UsageError: both are, or the format says what the model is by itself.
    """
    if options.preset is None and options.config is None:
        return None
    flag, value = ("--preset", options.preset) if options.preset else ("--config", options.config)
    if options.source != "t5x":
        raise UsageError(flag, str(value), f"absent: checkpoints of {options.source} hold theirs")
    if options.preset and options.config:
        raise UsageError("--config", str(options.config), "absent beside --preset")
    return PRESETS[options.preset] if options.preset else RunConfig.load(options.config)


def with_tokenizer(model: Model, path: Path | None) -> Model:
    """The model with another tokenizer file.

    Raises:
        UsageError: there is no such file.
    """
    if path is None:
        return model
    if not path.is_file():
        raise UsageError("--tokenizer-model", str(path), "a file")
    from dataclasses import replace

    data = replace(model.config.data, tokenizer_model=str(path))
    config = replace(model.config, data=data)
    return replace(model, config=config, tokenizer_files=(path,))


def print_plan(tensors: Mapping[str, LazyTensor], size: int) -> None:
    """A line per tensor that would be written."""
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        print(f"{name}  {list(tensor.shape)}  {dtype}  {tensor.bytes} bytes")
    print(f"{len(tensors)} tensors, {size} bytes; nothing was written")


def verify(model: Model, target: Target, logits: bool) -> None:
    """Read the result back and compare it with what it was made from.

    Raises:
        UsageError: it differs.
    """
    step = model.step if target.format == "native" else None
    config = model.config if target.format == "t5x" else None
    written = read(target.format, target.path, step, config)
    with tqdm(total=model.bytes, unit="B", unit_scale=True, desc="verifying") as bar:
        count = compare(model, written, bar.update)
    print(f"verified: {count} tensors have the same shape, type and SHA-256")
    if logits:
        difference = logits_difference(model, written)
        if difference != 0.0:
            raise UsageError("logits of the result", f"off by {difference}", "those of the source")
        print(f"verified: logits of {len(_PROMPT)} tokens are the same")


def logits_difference(first: Model, second: Model) -> float:
    """Largest difference of logits on a prompt, by the single-device model in fp32."""
    import torch

    from megatron_moe.model.reference import ReferenceOpenMoE

    found = []
    for model in (first, second):
        moe, size = model.config.moe, model.vocab_size
        reference = ReferenceOpenMoE(model.config.model, moe, size, seed=None)
        reference.load_logical((n, t.whole().float()) for n, t in model.tensors.items())
        tokens = torch.tensor([[token % size for token in _PROMPT]])
        with torch.no_grad():
            found.append(reference.eval()(tokens, training_capacity=False).logits)
    return float((found[0] - found[1]).abs().max())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    try:
        run(parse(argv))
    except UsageError as error:
        print(f"convert_checkpoint.py: error: {error}", file=sys.stderr)
        return USAGE_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
