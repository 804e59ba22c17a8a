r"""Show that two revisions compute and write the same, bit for bit.

For a change that must not change behaviour. Each revision runs the same command lines: a corpus is
preprocessed, short runs train in several layouts and objectives, one run resumes. Compared are the
losses and gradient norms of every step, as hexadecimal floats, and the SHA-256 of every file of
datasets and checkpoints. Last, the newer revision resumes a checkpoint of the older one and loads
its run directory.

    python tools/compare_revisions.py --base v0.1.0 --work-dir /tmp/compare
    python tools/compare_revisions.py --base HEAD~1 --only EP2,UL2

Both revisions run with the Python that runs this, on CPU ranks. Equality holds on one machine:
another processor may round differently. Exit code 1 if anything differs.
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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 20
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


@dataclass(frozen=True)
class Case:
    """One training run."""

    name: str
    world_size: int
    flags: list[str]


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
    """Two corpora, conversations and a phase table, the same at every call."""
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
    """A command of the revision at ``tree``, in ``directory``; its output.

    Args:
        tree: a checkout.
        directory: current directory of the command, so that configurations hold the same paths.
        script: path of the command in the tree.
        flags: its arguments.
        world_size: ranks under torchrun; 0 starts it alone.

    Raises:
        SystemExit: the command failed.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    command = [sys.executable, *(launcher if world_size else []), str(tree / script), *flags]
    environment = {**os.environ, "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        command, cwd=directory, env=environment, text=True, capture_output=True, check=False
    )
    if done.returncode:
        sys.exit(f"{tree}: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def preprocess(tree: Path, directory: Path) -> None:
    """Train the tokenizer and write the datasets, in ``directory``."""
    write_inputs(directory)
    corpora = ["first.jsonl", "second.jsonl"]
    flags = ["--input", *corpora, "--output", "tokenizer.model", "--vocab-size", "300"]
    run(tree, directory, "tools/train_tokenizer.py", *flags)
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"]
    for name in ("first", "second"):
        flags = ["--input", f"{name}.jsonl", "--output-prefix", name, *tokenizer, "tokenizer.model"]
        run(tree, directory, "tools/preprocess_data.py", *flags, "--append-eod", "--workers", "2")


def pretrain(tree: Path, directory: Path, case: Case, iterations: int, *flags: str) -> None:
    """Run a case up to an iteration; checkpoints and metrics go to folders of its name."""
    files = ["--save", f"{case.name}/checkpoint", "--metrics-file", f"{case.name}/metrics.jsonl"]
    files += ["--tensorboard-dir", f"{case.name}/tensorboard"]
    length = ["--train-iters", str(iterations), "--lr-decay-iters", "30"]
    arguments = [*MODEL, *case.flags, *files, *length, "--save-interval", "10", *flags]
    run(tree, directory, "pretrain_openmoe.py", *arguments, world_size=case.world_size)


def steps(directory: Path, case: Case) -> list[str]:
    """The metrics file, and every TensorBoard scalar but those that a clock measured."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = (directory / case.name / "metrics.jsonl").read_text().splitlines()
    board = EventAccumulator(str(directory / case.name / "tensorboard"))
    board.Reload()
    for tag in sorted(board.Tags()["scalars"]):
        if not tag.startswith(("speed/", "memory/")):
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
    """Run everything with one revision.

    Returns:
        By name of what was made, a line for each step or file.
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
        print(f"  {case.name}: {len(found[f'{case.name}: steps'])} steps, {len(saved)} files")
    return found


def resumed(tree: Path, directory: Path, cases: list[Case]) -> dict[str, list[str]]:
    """Continue every recorded run by ten steps; the run directory may be another revision's."""
    found = {}
    for case in cases:
        flags = ("--load", f"{case.name}/checkpoint")
        pretrain(tree, directory, case, STEPS + 10, *flags)
        found[f"{case.name}: resumed steps"] = steps(directory, case)
        print(f"  {case.name}: resumed")
    return found


def differences(base: dict[str, list[str]], head: dict[str, list[str]]) -> list[str]:
    """One line for each thing that differs, with the first difference."""
    found = []
    for name in base.keys() | head.keys():
        pairs = base.get(name, []), head.get(name, [])
        if pairs[0] == pairs[1] and pairs[0]:
            continue
        both = zip(*pairs, strict=False)
        first = next((f"{a} | {b}" for a, b in both if a != b), "another number of lines, or none")
        found.append(f"{name}: {first}")
    return sorted(found)


def compare(base: Path, head: Path, work: Path, cases: list[Case]) -> list[str]:
    """Everything that two checkouts do differently."""
    print(f"base {base}")
    expected = record(base, work / "base", cases)
    print(f"head {head}")
    found = record(head, work / "head", cases)
    shutil.copytree(work / "base", work / "mixed")
    print("base, resumed by base")
    expected |= resumed(base, work / "base", cases)
    print("base, resumed by head")
    found |= resumed(head, work / "mixed", cases)
    return differences(expected, found)


def chosen_cases(names: str | None) -> list[Case]:
    """The cases named in a comma-separated list; all without one.

    Raises:
        SystemExit: there is no such case.
    """
    wanted = names.split(",") if names else [case.name for case in CASES]
    known = {case.name: case for case in CASES}
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"--only must name some of {', '.join(known)} (got {', '.join(unknown)})")
    return [known[name] for name in wanted]


def main(argv: list[str] | None = None) -> int:
    """Compare; 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, help="revision, or the folder of a checkout")
    parser.add_argument("--head", type=Path, default=ROOT, help="folder of the other checkout")
    parser.add_argument("--work-dir", type=Path, required=True, help="new folder for the runs")
    parser.add_argument("--only", help="names of cases, comma-separated")
    args = parser.parse_args(argv)
    work: Path = args.work_dir.resolve()
    work.mkdir(parents=True)
    base = Path(args.base)
    if not (base / "pretrain_openmoe.py").exists():
        base = work / "tree"
        subprocess.run(
            ["git", "worktree", "add", "--detach", base, args.base], check=True, cwd=ROOT
        )
    found = compare(base.resolve(), args.head.resolve(), work, chosen_cases(args.only))
    print(*(found or ["no difference"]), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
