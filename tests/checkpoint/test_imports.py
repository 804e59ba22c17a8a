"""Tools that only read a checkpoint do not import Megatron-Core."""

from __future__ import annotations

import subprocess
import sys


def test_reading_needs_no_megatron_core() -> None:
    program = (
        "import sys, megatron_moe.checkpoint as c;"
        "c.load_logical, c.read_config, c.verify;"
        "before = 'megatron.core' in sys.modules;"
        "c.save_checkpoint, c.load_checkpoint;"
        "print(before, 'megatron.core' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True"]
