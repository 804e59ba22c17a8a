r"""torchrun with an exit status that tells how the run ended.

Takes the arguments of torchrun (`torchrun --help`). torchrun itself ends with 1 whatever is wrong,
and after a signal also where all ranks have saved. The status of this command is

    0    the run is finished: all steps are done
    75   preempted: saved before its end, on a signal, --exit-duration-in-mins, --exit-interval or
         --kill-switch-file; start it again to go on
    2    a flag, file or setting is invalid; a start with the same command ends the same way
    1    failed, see the log and failure-report.json
    143  ended by SIGTERM before it could save (128 + the number of the signal)

usage: torchrun.py [options of torchrun] program [its arguments], e.g.

    python tools/torchrun.py --nproc-per-node 8 pretrain_openmoe.py --save ckpt --load ckpt \
        --allow-missing-load --exit-signal-handler ...

srun ends with the highest status of its tasks, so with one of these on each node it is the same.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_moe.errors import USAGE_EXIT_CODE
from megatron_moe.parallel.launch import EXIT_STATUS_FILE

FAILED = 1


def main(argv: Sequence[str] | None = None) -> None:
    """Run torchrun in this process, and exit with the status of the run."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words in (["--help"], ["-h"]):  # torchrun's own takes seconds, and is one command away
        print(__doc__)
        sys.exit(0)
    with tempfile.TemporaryDirectory(prefix="exit-status-") as folder:
        noted = Path(folder) / "status"
        os.environ[EXIT_STATUS_FILE] = str(noted)
        try:
            status = run(words)
        finally:
            del os.environ[EXIT_STATUS_FILE]
        if noted.exists():
            status = status_of(status, int(noted.read_text()))
    sys.exit(status)


def run(argv: Sequence[str]) -> int:
    """Run torchrun: 0, 1 if a rank failed, or 128 plus the number of the signal that ended it."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    try:
        torchrun(parse_args([*argv]))
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return FAILED
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def status_of(launcher: int, noted: int) -> int:
    """The status of the run.

    Args:
        launcher: from `run`.
        noted: what the ranks noted before they ended: 0, 75 or 2. A rank that failed afterwards
            counts more, but usage errors are failures to torchrun.
    """
    if launcher == FAILED and noted != USAGE_EXIT_CODE:
        return FAILED
    return noted


if __name__ == "__main__":
    main()
