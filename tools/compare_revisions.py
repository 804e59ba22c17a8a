r"""Check that two revisions compute and write the same, bit for bit.

For a change that must not change numbers. Each revision runs the same command lines: preprocess a
corpus, train 20 steps in several layouts and objectives, resume for ten more. The tool compares

- the metrics file and the TensorBoard scalars of every step, to the last bit;
- the SHA-256 of every file of the datasets and checkpoints;
- ten steps resumed by the head from checkpoints and run directories that the base wrote.

    # the working tree against a revision, all cases
    python tools/compare_revisions.py --base v0.1.0

    # two cases, and folders instead of revisions
    python tools/compare_revisions.py --base ../before --head ../after --only EP2,UL2

Both revisions run on CPU ranks, with the interpreter that runs this tool. Results are equal only on
the same machine: another processor may round differently. Exit code 1 if anything differs, and 2
for a usage error or a command that fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.command_line import Parser

ROOT = Path(__file__).resolve().parent.parent
STEPS = 20
"""Steps of every run; the checkpoint of the last is the one that is resumed."""
MORE = 10
"""Steps after resuming."""
CLOCKED = ("speed/", "memory/")
"""TensorBoard tags that depend on the machine's load, not on what is computed."""
_LINE = (
    "--preset openmoe-tiny-released --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 "
    "--kv-channels 8 --num-experts 4 --moe-shared-expert-intermediate-size 48 --seq-length 64 "
    "--router-init-method-std 0.3 --init-variance-scale 0.5 --lr 3e-3 --lr-warmup-iters 2 "
    "--num-workers 0 --micro-batch-size 2 --global-batch-size 8 --log-interval 5 "
    "--eval-interval 10 --eval-iters 2 --split 90,10,0 --data-cache-path cache "
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --vocab-extra-ids 20"
)
MODEL = _LINE.split()
BLEND = ["--data-path", "0.6", "first_text_document", "0.4", "second_text_document"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"]
RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform"]
EP2 = ["--expert-model-parallel-size", "2"]
PHASES = """[[stage]]
name = "first"
until-iteration = 8
objective = "ul2"

[[stage]]
name = "second"
objective = "causal"
lr = 1e-3
"""


class CommandError(Exception):
    """A command of one of the revisions failed; the message holds its output."""


@dataclass(frozen=True)
class Case:
    """One training run: its name, the number of ranks, and the flags on top of `MODEL`."""

    name: str
    world_size: int
    flags: list[str]


# Flags have the names that older revisions know: --stages, not --phases.
CASES = [
    Case("single", 1, BLEND),
    Case("TP2", 2, [*TP2, *BLEND]),
    Case("PP2-interleaved", 2, [*PP2, *BLEND]),
    Case("EP2", 2, [*EP2, *BLEND]),
    Case("DP2xEP2", 4, [*EP2, "--use-distributed-optimizer", "--overlap-grad-reduce", *BLEND]),
    Case("UL2", 1, ["--objective", "ul2", *BLEND]),
    Case("SFT", 1, ["--objective", "sft", "--data-path", "chat.jsonl"]),
    Case("phases", 2, ["--stages", "phases.toml", *EP2, *BLEND]),
    Case("SGD", 1, ["--optimizer", "sgd", *BLEND]),
    Case("Adafactor-TP2", 2, ["--optimizer", "adafactor", *TP2, *BLEND]),
    Case("bf16", 1, ["--bf16", *BLEND]),
    Case("bf16-EP2", 2, ["--bf16", "--use-distributed-optimizer", *EP2, *BLEND]),
    Case("reference-kernels", 1, ["--moe-dispatch-impl", "reference", *BLEND]),
    Case("batched", 1, ["--moe-expert-impl", "batched", *BLEND]),
    Case("probs-dropping", 1, ["--moe-token-drop-policy", "probs", *BLEND]),
    Case("async-save", 2, ["--async-save", *EP2, *BLEND]),
    Case("recompute", 1, [*RECOMPUTE, "--recompute-num-layers", "1", *BLEND]),
    Case("dropout-TP2", 2, ["--hidden-dropout", "0.1", "--attention-dropout", "0.1", *TP2, *BLEND]),
    Case("documents", 1, ["--reset-position-ids", "--reset-attention-mask", *BLEND]),
    Case("port-PP2", 2, ["--moe-capacity-rule", "port", "--ffn-variant", "swiglu", *PP2, *BLEND]),
]


def write_inputs(directory: Path) -> None:
    """Write two corpora, conversations and a phase table, the same at every call."""
    draw = random.Random(11)
    letters = "etaoinshrdlu"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 7))) for _ in range(400)]

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(3, most)))

    for name, count in (("first", 500), ("second", 300)):
        lines = (json.dumps({"text": text(90)}) for _ in range(count))
        (directory / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    turns = [{"messages": _conversation(text(12), text(30))} for _ in range(300)]
    (directory / "chat.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    (directory / "phases.toml").write_text(PHASES)


def _conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def run(tree: Path, directory: Path, script: str, *flags: str, world_size: int = 0) -> str:
    """Run a command of the revision at ``tree`` and return its standard output.

    Args:
        tree: a checkout.
        directory: current directory of the command. Paths on the command line are relative to it,
            so that the configurations in the checkpoints are equal.
        script: path of the command in the tree.
        flags: its arguments.
        world_size: ranks under torchrun; 0 runs the command without torchrun.

    Raises:
        CommandError: the command failed.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    launcher.append(f"--nproc-per-node={world_size}")
    command = [sys.executable, *(launcher if world_size else []), str(tree / script), *flags]
    environment = {**os.environ, "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        command, cwd=directory, env=environment, text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise CommandError(f"in {tree}: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def preprocess(tree: Path, directory: Path) -> None:
    """Train the tokenizer and write the datasets in ``directory``."""
    write_inputs(directory)
    corpora = ["first.jsonl", "second.jsonl"]
    flags = ["--input", *corpora, "--output", "tokenizer.model", "--vocab-size", "300"]
    run(tree, directory, "tools/train_tokenizer.py", *flags)
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"]
    for name in ("first", "second"):
        flags = ["--input", f"{name}.jsonl", "--output-prefix", name, *tokenizer, "tokenizer.model"]
        run(tree, directory, "tools/preprocess_data.py", *flags, "--append-eod", "--workers", "2")


def pretrain(tree: Path, directory: Path, case: Case, iterations: int, *flags: str) -> None:
    """Run a case up to ``iterations``; checkpoints and metrics go to folders of its name."""
    files = ["--save", f"{case.name}/checkpoint", "--metrics-file", f"{case.name}/metrics.jsonl"]
    files += ["--tensorboard-dir", f"{case.name}/tensorboard"]
    length = ["--train-iters", str(iterations), "--lr-decay-iters", "30"]
    arguments = [*MODEL, *case.flags, *files, *length, "--save-interval", "10", *flags]
    run(tree, directory, "pretrain_openmoe.py", *arguments, world_size=case.world_size)


def steps(directory: Path, case: Case) -> list[str]:
    """The lines of the metrics file, and one line for each TensorBoard tag not in `CLOCKED`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = (directory / case.name / "metrics.jsonl").read_text().splitlines()
    board = EventAccumulator(str(directory / case.name / "tensorboard"))
    board.Reload()
    for tag in sorted(board.Tags()["scalars"]):
        if not tag.startswith(CLOCKED):
            values = " ".join(f"{e.step}:{float(e.value).hex()}" for e in board.Scalars(tag))
            lines.append(f"{tag} {values}")
    return lines


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below ``directory``, by relative path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files
    }


def record(tree: Path, directory: Path, cases: list[Case]) -> dict[str, list[str]]:
    """Preprocess and train every case with the revision at ``tree``.

    Returns:
        For each result (`datasets`, `EP2: steps`, `EP2: checkpoint`) a line per step or file.
    """
    directory.mkdir(parents=True)
    preprocess(tree, directory)
    data = hashes(directory)
    found = {"datasets": [f"{name} {value}" for name, value in data.items()]}
    for case in cases:
        pretrain(tree, directory, case, STEPS)
        found[f"{case.name}: steps"] = steps(directory, case)
        saved = hashes(directory / case.name / "checkpoint")
        found[f"{case.name}: checkpoint"] = [f"{name} {value}" for name, value in saved.items()]
        print(f"  {case.name}: trained, {len(saved)} files saved", flush=True)
    return found


def resumed(tree: Path, directory: Path, cases: list[Case]) -> dict[str, list[str]]:
    """Resume every run in ``directory`` for `MORE` steps; another revision may have written it."""
    found = {}
    for case in cases:
        flags = ("--load", f"{case.name}/checkpoint")
        pretrain(tree, directory, case, STEPS + MORE, *flags)
        found[f"{case.name}: resumed steps"] = steps(directory, case)
        print(f"  {case.name}: resumed", flush=True)
    return found


def differences(base: dict[str, list[str]], head: dict[str, list[str]]) -> list[str]:
    """One line for each result that differs or is empty, with the first difference."""
    found = []
    for name in sorted(base.keys() | head.keys()):
        expected, actual = base.get(name, []), head.get(name, [])
        if expected == actual and expected:
            continue
        pairs = zip(expected, actual, strict=False)
        lengths = f"{len(expected)} lines in base, {len(actual)} in head"
        first = next((f"base {a} | head {b}" for a, b in pairs if a != b), lengths)
        found.append(f"{name}: {first}")
    return found


def compare(base: Path, head: Path, work: Path, cases: list[Case]) -> list[str]:
    """Run ``cases`` with two checkouts, in the empty folder ``work``; the differences.

    Raises:
        CommandError: a command failed.
    """
    print(f"base: {base}", flush=True)
    expected = record(base, work / "base", cases)
    print(f"head: {head}", flush=True)
    found = record(head, work / "head", cases)
    shutil.copytree(work / "base", work / "mixed")
    print("runs of base, resumed by base", flush=True)
    expected |= resumed(base, work / "base", cases)
    print("runs of base, resumed by head", flush=True)
    found |= resumed(head, work / "mixed", cases)
    return differences(expected, found)


def checkout(revision: str, directory: Path) -> Path:
    """The sources of ``revision`` of this repository, in the new folder ``directory``.

    An archive rather than a worktree, which would stay registered in the repository.

    Raises:
        CommandError: there is no such revision.
    """
    archive = directory.with_suffix(".tar")
    command = ["git", "archive", "--output", str(archive), revision]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode:
        raise CommandError(
            f"--base must be a revision or the folder of a checkout (got {revision!r}); "
            f"git: {done.stderr.strip()}"
        )
    with tarfile.open(archive) as sources:
        sources.extractall(directory, filter="data")
    archive.unlink()
    return directory


def select_cases(names: str | None) -> list[Case]:
    """The cases named in a comma-separated list; all of them for None.

    Raises:
        CommandError: there is no such case.
    """
    known = {case.name: case for case in CASES}
    selected = names.split(",") if names else list(known)
    if unknown := [name for name in selected if name not in known]:
        raise CommandError(f"--only must be some of {', '.join(known)} (got {', '.join(unknown)})")
    return [known[name] for name in selected]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("compare_revisions.py", __doc__)
    parser.add_argument("--base", required=True, help="git revision, or the folder of a checkout")
    parser.add_argument(
        "--head", type=Path, default=ROOT, help="folder of the other checkout (default: this one)"
    )
    parser.add_argument(
        "--only",
        metavar="CASES",
        help=f"comma-separated (default: all): {', '.join(case.name for case in CASES)}",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        help="new folder for the runs, which is kept (default: a temporary folder)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print the differences; 1 if there are any, 2 if a command failed."""
    args = parse_args(argv)
    try:
        cases = select_cases(args.only)
        if args.work_dir is None:
            with tempfile.TemporaryDirectory(prefix="compare-") as work:
                found = _compare_in(Path(work), args, cases)
        else:
            args.work_dir.mkdir(parents=True)
            found = _compare_in(args.work_dir.resolve(), args, cases)
    except (CommandError, FileExistsError) as error:
        print(f"compare_revisions.py: error: {error}", file=sys.stderr)
        return 2
    print(*(found or ["no difference"]), sep="\n")
    return 1 if found else 0


def _compare_in(work: Path, args: argparse.Namespace, cases: list[Case]) -> list[str]:
    # An empty name is no revision, and not the current folder either.
    is_checkout = args.base != "" and (Path(args.base) / "pretrain_openmoe.py").exists()
    base = Path(args.base).resolve() if is_checkout else checkout(args.base, work / "tree")
    return compare(base, args.head.resolve(), work, cases)


if __name__ == "__main__":
    sys.exit(main())
