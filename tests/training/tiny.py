"""A tiny run for tests of the training loop: its corpus, its flags, running it on pool ranks."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import numpy as np

from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.errors import USAGE_EXIT_CODE, UsageError

VOCAB = 100

_LINE = (
    "--preset openmoe-tiny-released --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 "
    "--kv-channels 8 --num-experts 4 --moe-shared-expert-intermediate-size 48 --vocab-size 100 "
    "--seq-length 32 --router-init-method-std 0.3 --init-variance-scale 0.5 "
    "--lr 3e-3 --lr-warmup-iters 2 --num-workers 0 "
    "--micro-batch-size 2 --global-batch-size 8 --log-interval 4 --eval-iters 0 "
    "--device-peak-tflops 1"
)
MODEL = _LINE.split()


def write_corpus(prefix: Path) -> str:
    """Documents of 5 to 60 tokens that count upwards, with some noise."""
    draw = np.random.default_rng(7)
    with IndexedWriter(str(prefix), VOCAB) as writer:
        for _ in range(300):
            length, start, step = (int(draw.integers(*b)) for b in ((5, 60), (2, 99), (1, 4)))
            noise = (draw.random(length) < 0.1) * draw.integers(0, 9, length)
            ids = (start + step * np.arange(length) + noise) % (VOCAB - 2) + 2
            writer.add_document([int(i) for i in ids])
    return str(prefix)


def write_domains(folder: Path) -> dict[str, str]:
    """`low` counts in ones with an end of document often, `high` in threes with one seldom."""
    for name, step, length in (("low", 1, 3), ("high", 3, 60)):
        with IndexedWriter(str(folder / name), VOCAB) as writer:
            for start in range(9000 // length):
                ids = [(start + step * i) % 97 + 2 for i in range(1 + start % (2 * length))]
                writer.add_document([*ids, VOCAB - 1])
    return {name: str(folder / name) for name in ("low", "high")}


def pretrain_rank(rank: int, world_size: int, *, argv: list[str]) -> tuple[int, str, str]:
    """`pretrain_openmoe.py` on a rank of the pool: exit code, standard output, usage error if any.

    The program exits on a usage error; here its text is returned.
    """
    import pretrain_openmoe

    launcher = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_PORT": 0}
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in launcher.items()})
    os.environ["MASTER_ADDR"] = "localhost"
    out, message, code = io.StringIO(), "", 0
    try:
        with contextlib.redirect_stdout(out):
            pretrain_openmoe.execute(pretrain_openmoe.parse(argv))
    except UsageError as error:
        message, code = str(error), USAGE_EXIT_CODE
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    finally:
        os.environ.clear()
        os.environ.update(before)
    return code, out.getvalue(), message
