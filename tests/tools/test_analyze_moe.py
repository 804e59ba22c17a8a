"""`tools/analyze_moe.py`, from the command line."""

from __future__ import annotations

import csv
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_moe.data.indexed.manifest import Manifest, write_manifest
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.model.reference import ReferenceOpenMoE
from megatron_moe.moe.trace import read_step
from tests.analysis.families import make
from tests.analysis.families import save as save_family
from tests.inference.cases import CONFIG, PADDED, save
from tools.analyze_moe import main, parts_of


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a run, and two datasets of bytes."""
    folder = tmp_path_factory.mktemp("analyze")
    for step in (3, 7):
        save(folder / "run", step=step)
    for name, first in (("code", 40), ("text", 90)):
        with IndexedWriter(str(folder / name), 259) as writer:
            for document in range(30):
                writer.add_document([first + (document * i) % 31 for i in range(40)])
    return folder


def _main(folder: Path, words: str) -> int:
    """Exit code; FOLDER in the words is the folder."""
    try:
        main(words.replace("FOLDER", str(folder)).split())
    except SystemExit as end:
        return int(end.code or 0)
    return 0


FOREIGN = Manifest(
    tokenizer="SentencePieceTokenizer",
    tokenizer_hash="another",
    vocab_size=259,
    key="text",
    append_eod=True,
    text_documents="file",
    domain=None,
    inputs=(),
    documents=30,
    sequences=30,
    tokens=1200,
)
"""Of a copy of `code` that another tokenizer made."""
DATA = "--data code=FOLDER/code text=FOLDER/text --seq-length 20 --tokens 800 --draws 5"


def test_a_report_of_two_steps_and_nothing_twice(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"--load a=FOLDER/run@3 FOLDER/run@7 {DATA} --analyses domains similarity"
    assert _main(folder, f"{command} --out {tmp_path}") == 0
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    for label in ("a", "run@7"):
        rows = list(csv.DictReader((tmp_path / label / "domains" / "shares.csv").open()))
        assert {row["domain"] for row in rows} == {"code", "text"}
    assert list((tmp_path / "figures" / "domains").glob("*.svg"))
    results = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    assert _main(folder, f"{command} --out {tmp_path}") == 0
    assert results == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}


def test_two_checkpoints_side_by_side_with_some_experts(folder: Path, tmp_path: Path) -> None:
    command = f"--compare FOLDER/run@3 FOLDER/run@7 {DATA} --analyses domains --experts 1 3"
    assert _main(folder, f"{command} --out {tmp_path}") == 0
    page = (tmp_path / "report.html").read_text()
    assert "run@3" in page and "run@7" in page
    bars = re.findall(r'"type":"bar","name":"[^"]*","x":\[([^\]]*)\]', page)
    assert bars and set(bars) == {"1,3"}


def test_figures_of_a_paper_say_what_they_need(folder: Path, tmp_path: Path) -> None:
    command = f"--load FOLDER/run {DATA} --analyses domains coactivation --figures olmoe"
    assert _main(folder, f"{command} --out {tmp_path}") == 0
    page = (tmp_path / "report.html").read_text()
    assert "Figure 21" in page
    assert "Not drawn: needs several checkpoints of one run: --load run@1000 run@20000 (see" in page


def test_checkpoints_of_one_run_in_several_directories(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second has other weights in its last router only: there it agrees less."""
    for name in ("early", "late"):
        model = make("olmoe", vocab_size=300)
        if name == "late":
            with torch.no_grad():
                model.model.layers[-1].mlp.gate.weight.mul_(-1)
        save_family(model, tmp_path / name)
    load = f"--load {tmp_path}/early@50 {tmp_path}/late@200 {DATA} --analyses saturation"
    assert _main(folder, f"{load} --out {tmp_path / 'out'}") == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "early@50 is in another directory" in page and "--same-run" in page
    assert not (tmp_path / "out" / "compared").exists()
    assert _main(folder, f"{load} --same-run --out {tmp_path / 'out'}") == 0
    table = (tmp_path / "out" / "compared" / "saturation" / "saturation.csv").open()
    rows = list(csv.DictReader(table))
    assert [(row["checkpoint"], row["layer"]) for row in rows] == [
        ("early@50", str(layer)) for layer in range(3)
    ]
    assert [float(row["top_k"]) for row in rows[:2]] == [1, 1] and float(rows[2]["top_k"]) < 0.9
    for words, said in (
        ("--same-run early@50", "labels of at least two checkpoints"),
        (
            "--same-run early@50 other",
            r"--same-run must be some of early@50, late@200 \(got 'other'\)",
        ),
        ("--same-run --same-run late@200 early@50", "in one group only"),
    ):
        capsys.readouterr()
        assert _main(folder, f"{load} --out {tmp_path / 'out'} {words}") == 2
        assert re.search(said, capsys.readouterr().err)


def test_a_trace_is_replayed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traces, out = tmp_path / "traces", tmp_path / "out"
    command = f"--load FOLDER/run {DATA} --out {out}"
    assert _main(folder, f"{command} --routing-trace-dir {traces}") == 0
    assert _main(folder, f"{command} --routing-replay-dir {traces}/run@7") == 0
    assert "run@7 with choices of megatron_moe" in capsys.readouterr().out
    rows = list(csv.DictReader((out / "run@7" / "replay.csv").open()))
    assert [row["domain"] for row in rows] == ["code", "text", "all"]
    for row in rows:
        assert float(row["same_choices"]) == 1
        assert float(row["loss_replayed"]) == pytest.approx(float(row["loss"]), rel=1e-6)
    other = f"--load FOLDER/run@3 {DATA} --out {out} --tokens 400"
    assert _main(folder, f"{other} --routing-replay-dir {traces}/run@7") == 2
    assert "wrote of these tokens" in capsys.readouterr().err


def test_traces_of_every_token(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"--load FOLDER/run {DATA} --routing-trace-dir {tmp_path / 'traces'}"
    assert _main(folder, f"{command} --out {tmp_path / 'out'}") == 0
    assert f"traces: {tmp_path / 'traces'}" in capsys.readouterr().out
    trace, about = read_step(tmp_path / "traces" / "run@7", 7)
    assert len(trace) == 1600 and set(trace.domain) == {"code", "text"} and about.topk == 2


def test_weights_need_no_data(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(folder, f"--load FOLDER/run --out {tmp_path}") == 0
    assert "no --data: only the analyses of weights; left out: " in capsys.readouterr().out
    assert (tmp_path / "run@7" / "similarity" / "result.json").is_file()
    assert not (tmp_path / "run@7" / "pass").exists()


def test_losses_without_an_expert(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(folder, f"--load FOLDER/run {DATA} --out {tmp_path} --ablate 1:2") == 0
    assert "run@7 without 1:2" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "run@7" / "ablation.csv").open()))
    assert [row["domain"] for row in rows] == ["code", "text", "all"]
    for row in rows:
        change = float(row["loss_without"]) - float(row["loss"])
        assert change == pytest.approx(float(row["change"]), abs=1e-9) and change != 0
        for column in ("", "_without"):
            perplexity = float(row[f"perplexity{column}"])
            assert perplexity == pytest.approx(math.exp(float(row[f"loss{column}"])))


def test_the_analyses_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(folder, "--list") == 0
    out = capsys.readouterr().out
    assert "domains" in out and "Do experts specialize in domains?" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--out OUT", "--load must be given"),
        ("--load FOLDER/run", "--out must be a directory for the results"),
        ("--load FOLDER/none --out OUT", "checkpoint directory .*none must be"),
        ("--load FOLDER/run@5 --out OUT", "--ckpt-step must be a complete step"),
        ("--load FOLDER/dense --out OUT", "MoE layers of .*dense must be at least one"),
        ("--load FOLDER/other --out OUT", "model_type in .*config.json must be one of .*olmoe"),
        ("--load FOLDER/run --analyses foo --out OUT", "--analyses must be some of .*domains"),
        (f"--load FOLDER/run {DATA} --analyses saturation --out OUT", "at least 2 checkpoints for"),
        ("--load FOLDER/run --layers 0 --out OUT", "--layers must be MoE layers of run@7: 1"),
        ("--load FOLDER/run FOLDER/run@7 --out OUT", "--load must be a different label"),
        ("--load figures=FOLDER/run --out OUT", "--load must be a label that is a file name"),
        ("--load ../x=FOLDER/run --out OUT", "--load must be a label that is a file name"),
        ("--load FOLDER/run --compare FOLDER/run FOLDER/run --out OUT", "--compare must be absent"),
        ("--load FOLDER/run --analyses domains --out OUT", "--data must be given with --analyses"),
        ("--load FOLDER/run --ablate 1:2 --out OUT", "--data must be given with --ablate"),
        (f"--load FOLDER/run {DATA} --ablate 1:9 --out OUT", "expert to leave out of layer 1 must"),
        (f"--load FOLDER/run {DATA} --ablate 0:1 --out OUT", "must be an MoE layer: 1 "),
        (f"--load FOLDER/run {DATA} --ablate x --out OUT", "--ablate must be LAYER:EXPERT"),
        ("--load FOLDER/run --data FOLDER/none --out OUT", "data path must be the prefix"),
        ("--load FOLDER/run --data FOLDER/code --seq-length 41 --out OUT", "--seq-length must be"),
        ("--load FOLDER/run --data FOLDER/foreign --out OUT", "tokenizer of .*foreign must be"),
        (  # before the weights are analysed, which need no tokens
            "--load FOLDER/run --data FOLDER/code --tokens 10 --seq-length 10 "
            "--analyses similarity domains --out OUT",
            "tokens of --data must be >= 20, 10 choices for each of 4 experts .*got 10",
        ),
        ("--load FOLDER/run --experts 1 4 --out OUT", "--experts must be from 0 to 3, experts of"),
        ("--load FOLDER/run --draws 0 --out OUT", "--draws must be >= 1"),
        ("--load FOLDER/run --out FOLDER/code.bin", "--out must be a directory"),
        ("--load FOLDER/run --device nothing --out OUT", "--device must be a device"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    if not (folder / "dense").exists():
        config = replace(CONFIG, moe=replace(CONFIG.moe, moe_layer_freq="[0,0]"))
        dense = ReferenceOpenMoE(config.model, config.moe, PADDED, seed=1)
        save(folder / "dense", config, made=dense)
        (folder / "other").mkdir()
        (folder / "other" / "config.json").write_text('{"model_type": "gpt2"}')
        for suffix in (".bin", ".idx"):
            shutil.copyfile(folder / f"code{suffix}", folder / f"foreign{suffix}")
        write_manifest(str(folder / "foreign"), FOREIGN)
    out = tmp_path / "out"
    assert _main(folder, words.replace("OUT", str(out))) == 2
    error = capsys.readouterr().err
    assert error.startswith("analyze_moe.py: error: ") and error.count("\n") == 1
    assert re.search(said, error), error
    assert not out.exists()


def test_a_directory_with_a_mark_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "a=b@3").mkdir()
    assert parts_of(str(tmp_path / "a=b@3")) == (None, str(tmp_path / "a=b@3"), None)
    assert parts_of(f"x={tmp_path}@3") == ("x", str(tmp_path), 3)
    assert parts_of(f"{tmp_path}@3") == (None, str(tmp_path), 3)
