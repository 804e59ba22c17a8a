"""The report of every analysis and of every paper's figures, from the command line to the browser.

What is drawn here was computed from checkpoints, where tests/analysis/test_report_browser.py draws
invented results: shapes, labels and numbers are those that readers see.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.analysis.base import all_analyses
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.model.reference import ReferenceOpenMoE
from tests.analysis.browser import Opened
from tests.inference.cases import CONFIG, PADDED, save
from tools import analyze_moe

RUN = replace(
    CONFIG,
    model=replace(CONFIG.model, num_layers=4),
    moe=replace(CONFIG.moe, num_experts=8, moe_layer_freq="[0,1]*2", moe_eval_capacity_factor=1.0),
)
DOMAINS = ("pile_books", "pile_papers", "code_python", "lang_french", "prose")
DOCUMENTS = 24


def _checkpoints(folder: Path) -> list[str]:
    """Two steps of one run: the second has moved by a third of the weights' deviation."""
    made = ReferenceOpenMoE(RUN.model, RUN.moe, PADDED, seed=2)
    for step in (7, 9):
        save(folder, RUN, step=step, made=made)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.std().nan_to_num() / 3)
    return [f"{folder}@{step}" for step in (7, 9)]


def _data(folder: Path) -> list[str]:
    """Bytes of five domains, each with a distribution of its own."""
    draw = np.random.default_rng(3)
    words = []
    for place, name in enumerate(DOMAINS):
        with IndexedWriter(str(folder / name), 260) as writer:
            for _ in range(DOCUMENTS):
                writer.add_document((30 + 20 * place + draw.zipf(1.4, 100) % 60).tolist())
        words.append(f"{name}={folder / name}")
    return words


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line without `--figures`; results are kept from one report to the next."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "data").mkdir()
    how = ["--out", str(folder / "out"), "--seq-length", "40", "--draws", "20"]
    return ["--load", *_checkpoints(folder / "run"), "--data", *_data(folder / "data"), *how]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("figures", "width", "scheme"),
    [("openmoe", 1280, "light"), ("olmoe", 400, "dark"), ("closer-look", 1280, "light")],
)
def test_every_analysis_and_figure_is_drawn(
    command: list[str], browser: Any, figures: str, width: int, scheme: str
) -> None:
    analyze_moe.main([*command, "--figures", figures])
    report = Path(command[command.index("--out") + 1]) / "report.html"
    opened = Opened(browser, report, width, scheme)
    drawn = opened.draw_all()
    opened.check()
    for key in all_analyses():
        section = opened.page.locator(f"#analysis-{key}")
        assert section.count() == 1, key
        assert section.locator("figure").count() > 0, key
    assert drawn > 2 * len(all_analyses())
    opened.page.close()
