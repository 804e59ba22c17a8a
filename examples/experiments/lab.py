"""The experiments' setting: data, two sizes of a tiny OpenMoE, and runs of `pretrain_openmoe.py`.

Every run is the training program itself with its flags, in one process on one thread, in fp32. A
finished run is a file of the folder of runs and is not repeated, so that an interrupted script
continues where it was. What is kept of a run is read from its metrics file, routing log and log
(`records.py`).

Runs are forked from one process that has imported the program, because importing takes longer than
some of them train.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
PIECES = 512
"""Of the tokenizer: a small vocabulary, so that logits are no large part of the arithmetic."""
SPLIT = "90,10,0"


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model size.

    Args:
        hidden: width H; feed-forward layers and experts are four times as wide, as published.
        heads: attention heads, of H / heads.
        steps: of a run of length 1.
        adamw_lr: peak learning rate of AdamW; Adafactor has one for all sizes.
    """

    hidden: int
    heads: int
    steps: int
    adamw_lr: float

    def flags(self) -> list[str]:
        """Widths."""
        wide = str(4 * self.hidden)
        return [
            *("--hidden-size", str(self.hidden), "--ffn-hidden-size", wide),
            *("--moe-shared-expert-intermediate-size", wide),
            *("--num-attention-heads", str(self.heads)),
            *("--kv-channels", str(self.hidden // self.heads)),
        ]


SIZES = {
    "S": Size(hidden=32, heads=2, steps=300, adamw_lr=32e-3),
    "M": Size(hidden=64, heads=2, steps=250, adamw_lr=12e-3),
}
BASE = (
    *("--preset", "openmoe-tiny", "--num-layers", "2", "--moe-layer-freq", "[0]+[1]"),
    *("--seq-length", "128", "--split", SPLIT),
    *("--micro-batch-size", "8", "--global-batch-size", "8", "--num-workers", "0"),
    *("--optimizer", "adafactor", "--adafactor-min-dim", "32", "--lr", "0.1"),
    *("--min-lr", "0", "--lr-decay-style", "linear"),
    *("--eval-interval", "1000000", "--eval-iters", "64", "--domain-eval-iters", "0"),
    *("--moe-eval-capacity-factor", "None", "--log-failure-policy", "stop"),
)
"""OpenMoE's model and routing (`openmoe-tiny`: rule `t5x`, factor 1.25, drops by position) and its
optimizer (Adafactor, whose second moments are factored as in models of published widths); a decay
to zero, and a dropless evaluation on 65536 held-out tokens at the end."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Args:
        size: key of `SIZES`.
        variant: its name.
        flags: what the variant sets, after all other flags.
        seed: of weights and of the order of the data.
        length: of its steps in those of the size.
    """

    size: str
    variant: str
    flags: tuple[str, ...]
    seed: int
    length: float = 1.0

    @property
    def name(self) -> str:
        """A file name."""
        long = f"-x{self.length:g}" if self.length != 1 else ""
        return f"{self.size}-{self.variant}{long}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A folder with data and runs.

    Args:
        folder: for everything that is written.
        steps: instead of those of the sizes, for a quick look; 0 for those.
    """

    folder: Path
    steps: int = 0

    def prepare(self, megabytes: float = 16.0) -> None:
        """Corpus, tokenizer and tokenized data, unless they are there."""
        if (self.folder / "data" / "done").exists():
            return
        corpus, data = self.folder / "corpus", self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        tool("make_demo_corpus", "--output-dir", corpus, "--megabytes", megabytes)
        texts = [corpus / "code.jsonl", corpus / "text.jsonl"]
        output = ("--output", self.folder / "tokenizer.model", "--vocab-size", PIECES)
        tool("train_tokenizer", "--input", *texts, *output)
        for text in texts:
            prefix = ("--input", text, "--output-prefix", data / text.stem)
            tool("preprocess_data", *prefix, *self.tokenizer(), "--append-eod", "--workers", 1)
        (data / "done").touch()

    def tokenizer(self) -> list[str]:
        """Flags of the tokenizer."""
        kind = ("--tokenizer-type", "SentencePieceTokenizer")
        return [*kind, "--tokenizer-model", str(self.folder / "tokenizer.model")]

    def steps_of(self, run: Run) -> int:
        """Optimizer steps of a run."""
        return max(2, round((self.steps or SIZES[run.size].steps) * run.length))

    def command(self, run: Run) -> list[str]:
        """Flags of `pretrain_openmoe.py`; later ones win."""
        steps, folder = self.steps_of(run), self.folder / "runs" / run.name
        data = self.folder / "data"
        probes = max(1, steps // 4)
        return [
            *BASE,
            *self.tokenizer(),
            *("--data-path", "0.6", str(data / "code_text_document")),
            *("0.4", str(data / "text_text_document")),
            *SIZES[run.size].flags(),
            *("--seed", str(run.seed), "--train-iters", str(steps)),
            *("--lr-warmup-iters", str(steps // 10)),
            *("--log-interval", str(max(1, steps // 20))),
            *("--routing-log-interval", str(probes), "--routing-probe-rows", "32"),
            *("--metrics-file", str(folder / "metrics.jsonl")),
            *("--routing-log-file", str(folder / "routing.jsonl")),
            *run.flags,
        ]

    def finished(self, run: Run) -> Path:
        """The file that is there once the run has ended well: its command and seconds."""
        return self.folder / "runs" / run.name / "finished.json"

    def is_finished(self, run: Run) -> bool:
        """Whether a run is there, of the same flags and steps.

        Raises:
            UsageError: one of the same name was taken with others.
        """
        path = self.finished(run)
        if not path.exists():
            return False
        found, steps = json.loads(path.read_text()), self.steps_of(run)
        if (found["flags"], found["steps"]) != (list(run.flags), steps):
            flags = " ".join(found["flags"]) or "no flags"
            was = f"{run.name} of {found['steps']} steps with {flags}"
            expected = f"a folder without other runs of that name ({steps} steps)"
            raise UsageError("--out", was, expected, "choose another folder")
        return True

    def take(self, runs: Sequence[Run], workers: int = 1, most: int | None = None) -> None:
        """Take the runs that are not finished, in this order.

        Args:
            runs: which ones.
            workers: at a time.
            most: runs that this call takes; `None` for all.

        Raises:
            RuntimeError: a run has failed; its log is named.
        """
        left = [run for run in runs if not self.is_finished(run)][:most]
        if not left:
            return
        import_program()
        self.folder.joinpath("runs").mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        active: list[tuple[Run, multiprocessing.process.BaseProcess]] = []
        context = multiprocessing.get_context("fork")
        for number, run in enumerate(left, 1):
            while len(active) >= workers:
                active = self._still(active)
                time.sleep(0.05)
            process = context.Process(target=self._train, args=(run,))
            process.start()
            active.append((run, process))
            passed = time.monotonic() - started
            print(f"{number}/{len(left)} {run.name} ({passed:.0f} s)", flush=True)
        while active:
            active = self._still(active)
            time.sleep(0.05)

    def _still(
        self, active: list[tuple[Run, multiprocessing.process.BaseProcess]]
    ) -> list[tuple[Run, multiprocessing.process.BaseProcess]]:
        for run, process in active:
            if not process.is_alive() and not self.finished(run).exists():
                log = self.finished(run).with_name("log")
                raise RuntimeError(f"{run.name} has failed: see {log}")
        return [each for each in active if each[1].is_alive()]

    def _train(self, run: Run) -> None:
        """In a process of its own: the program, with its output in a file."""
        folder = self.finished(run).parent
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        import torch

        import pretrain_openmoe

        torch.set_num_threads(1)
        command, started = self.command(run), time.process_time()
        pretrain_openmoe.main(command)
        used = {"seconds_of_cpu": time.process_time() - started, "steps": self.steps_of(run)}
        self.finished(run).write_text(json.dumps({"flags": list(run.flags), **used}) + "\n")


def lab_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that all experiments have.

    Args:
        doc: of the module, whose first line says what it does.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of data and runs")
    add("--seeds", type=int, help="seeds 1 to N (as in docs/experiments.md)")
    add("--steps", type=int, default=0, help="steps of a run (those of the size)")
    add("--megabytes", type=float, default=16.0, help="of each domain of the corpus (16)")
    add("--workers", type=int, default=1, help="runs at a time (1), each on one core")
    add("--no-records", action="store_true", help="take runs, but leave the records as they are")
    return parser


def lab_of(options: argparse.Namespace) -> Lab:
    """The folder of a command line, with its data."""
    lab = Lab(folder=options.out.resolve(), steps=options.steps)
    lab.prepare(options.megabytes)
    return lab


def import_program() -> None:
    """Import what the program imports, once, before runs are forked."""
    from megatron_moe.platform import activate

    activate("gloo")
    import megatron_moe.checkpoint.manager
    import megatron_moe.model.build
    import megatron_moe.parallel.context
    import megatron_moe.training.reporting
    import megatron_moe.training.run
    import megatron_moe.training.trainer  # noqa: F401


def tool(name: str, *words: object) -> None:
    """Run a command of `tools/`.

    Raises:
        CalledProcessError: it failed.
    """
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment)
