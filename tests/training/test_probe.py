"""The routing probe: no effect on training, the same in every layout and after every resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.errors import UsageError
from megatron_moe.model.reference import ReferenceOpenMoE
from megatron_moe.training.dataloaders import open_data
from megatron_moe.training.probe import RoutingProbe, probe_choices
from megatron_moe.training.step import train_step
from tests.support.pool import Pool
from tests.training.ranks import PADDED_VOCAB, rank_batches, tiny_run
from tests.training.tiny import MODEL, pretrain_rank, write_domains

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
LAYOUTS: dict[str, tuple[int, str]] = {
    "DP2": (2, ""),
    "TP2": (2, TP2),
    "PP2-interleaved": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "EP2": (2, "--expert-model-parallel-size 2"),
    "TP2xPP2": (4, f"{TP2} {PP2}"),
}
DATA = "--split 60,40,0 --eval-iters 1 --eval-interval 1000 --routing-probe-rows 6"


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_domains(tmp_path_factory.mktemp("domains"))


def flags(domains: dict[str, str]) -> list[str]:
    return ["--data-path", "0.8", domains["low"], "0.2", domains["high"], *DATA.split()]


def run(pool: Pool, ranks: int, argv: list[str]) -> str:
    results = pool.run(pretrain_rank, ranks, argv=[*MODEL, *argv])
    assert [(code, error) for code, _, error in results] == [(0, "")] * ranks
    return results[0][1]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def probes(path: Path) -> dict[int, dict[str, Any]]:
    return {line["iteration"]: line["probe"] for line in lines(path) if "probe" in line}


def test_a_probe_leaves_no_trace(pool: Pool, domains: dict[str, str], tmp_path: Path) -> None:
    """Losses, norms and the reported routing, to the last bit, with dropout."""
    found = []
    for interval in (1, 0):
        files = [str(tmp_path / f"{name}{interval}") for name in ("metrics", "routing")]
        argv = [*flags(domains), "--train-iters", "6", "--log-interval", "2"]
        argv += ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
        argv += ["--routing-log-interval", str(interval)]
        run(pool, 1, [*argv, "--metrics-file", files[0], "--routing-log-file", files[1]])
        layers = [line for line in lines(Path(files[1])) if "layers" in line]
        found.append((Path(files[0]).read_bytes(), layers))
        assert len(probes(Path(files[1]))) == 6 * interval
    assert found[0] == found[1]


def choices(rank: int, world_size: int, *, argv: list[str], steps: int) -> Any:
    """Of some rows of this rank's data, after some steps on made-up batches."""
    run = tiny_run(world_size, argv)
    for number in range(steps):
        train_step(run, rank_batches(run), 1e-2, number + 1)
    data = open_data(run.config, run.ctx.layout, rank, 0)
    names, rows = ([], None) if data.probe is None else data.probe.rows(6)
    found, squares = probe_choices(run, rows, 6)
    weights = None
    if world_size == 1:
        weights = {n: p.detach().clone() for n, p in run.chunks[0].named_parameters()}
    return names, rows, found, squares, weights


@pytest.fixture(scope="module")
def whole(pool: Pool, domains: dict[str, str]) -> Any:
    return pool.run(choices, 1, argv=flags(domains), steps=0)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_see_the_same_choices(
    pool: Pool, domains: dict[str, str], whole: Any, name: str
) -> None:
    ranks, layout = LAYOUTS[name]
    argv = [*flags(domains), *layout.split()]
    for names, rows, found, squares, _ in pool.run(choices, ranks, argv=argv, steps=0):
        assert np.array_equal(found, whole[2])
        np.testing.assert_allclose(squares, whole[3], rtol=1e-4)
        if rows is not None:
            assert names == whole[0]
            assert np.array_equal(rows, whole[1])


def test_one_process_sees_what_the_reference_model_chooses(
    domains: dict[str, str], whole: Any
) -> None:
    from tests.training.ranks import tiny_config

    config = tiny_config(flags(domains))
    seed = config.train.seed
    model = ReferenceOpenMoE(config.model, config.moe, PADDED_VOCAB, seed=seed).eval()
    names, rows, found, squares, _ = whole
    assert names == ["low", "high"] * 3
    tokens = torch.from_numpy(rows[0]).long()
    # Each micro-batch of two rows by itself; a capacity group is one row.
    with torch.no_grad():
        _, routing = model.hidden_states(tokens, training_capacity=False)
    assert [r.layer for r in routing] == [1, 3]
    for layer, of_layer in zip(routing, found, strict=True):
        assert np.array_equal(layer.ids_TK.numpy(), of_layer.reshape(-1, 2))
    assert len(set(map(tuple, found.reshape(-1, 2)))) > 6
    assert squares.min() > 0


def test_rows_are_the_first_of_each_domain_or_of_the_blend(domains: dict[str, str]) -> None:
    from tests.training.ranks import tiny_config

    def probe(argv: list[str]) -> tuple[tuple[str, ...], list[str]]:
        config = tiny_config(argv)
        from megatron_moe.parallel.layout import resolve_layout

        data = open_data(config, resolve_layout(config, 1, PADDED_VOCAB), 0, 0)
        assert data.probe is not None
        return data.probe_domains, data.probe.rows(6)[0]

    both = flags(domains)
    assert probe(both) == (("low", "high"), ["low", "high"] * 3)
    blend = ["--domain-eval-iters", "0", "--eval-iters", "4"]
    for other in (blend, ["--eval-iters", "0"]):
        names, rows = probe([*both, *other])
        assert names == ("low", "high")
        assert sorted(rows) == ["high"] * 3 + ["low"] * 3, "although one row of five is high"
    assert probe(["--data-path", domains["low"]]) == (("low",), ["low"] * 6)


def test_a_resume_in_another_layout_goes_on_comparing(
    pool: Pool, domains: dict[str, str], tmp_path: Path
) -> None:
    """Weights change little in these steps, so nearly all choices stay; not by chance, 50%."""
    argv = [*flags(domains), "--train-iters", "12", "--routing-log-interval", "4", "--lr", "1e-3"]
    log, save = tmp_path / "routing", tmp_path / "save"
    argv += ["--routing-log-file", str(log), "--save", str(save)]
    run(pool, 2, [*argv, "--expert-model-parallel-size", "2", "--exit-interval", "8"])
    extra = json.loads((save / "iter_0000008" / "state.json").read_text())["train"]["extra"]
    saved = extra["routing_probe"]
    assert (saved["first"]["iteration"], saved["previous"]["iteration"]) == (4, 8)
    out = run(pool, 2, [*argv, *TP2.split(), "--load", str(save)])
    assert " routing at iteration 12 | tokens 192 | agreement with previous probe " in out
    parts = probes(log)
    assert list(parts) == [4, 8, 12]
    log.unlink()
    run(pool, 1, argv[:-2])
    for iteration, expected in probes(log).items():
        for number, layer in expected["layers"].items():
            found = parts[iteration]["layers"][number]
            for name in ("previous", "first"):
                if layer[name] is None:
                    assert found[name] is None
                    continue
                assert found[name]["choices"] == pytest.approx(layer[name]["choices"], abs=0.02)
                assert 0.7 < found[name]["choices"] <= 1
            assert found["logit_drift"] == pytest.approx(layer["logit_drift"], rel=1e-3)
            assert found["token_share"] == pytest.approx(layer["token_share"], abs=0.02)
    drift = probes(log)[12]["layers"]["1"]["logit_drift"]
    assert drift != 1.0
    assert probes(log)[4]["layers"]["1"]["logit_drift"] == 1.0


def test_other_rows_begin_anew(pool: Pool, domains: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "routing"
    argv = [*flags(domains), "--routing-log-interval", "2", "--train-iters", "2", "--lr", "0"]
    argv += ["--lr-warmup-iters", "0", "--routing-log-file", str(log), "--save", str(tmp_path)]
    run(pool, 1, argv)
    argv[argv.index("--train-iters") + 1] = "4"
    argv += ["--load", str(tmp_path)]
    run(pool, 1, [*argv, "--save", str(tmp_path / "other"), "--routing-probe-rows", "4"])
    assert probes(log)[4]["layers"]["1"]["previous"] is None
    run(pool, 1, argv)
    assert probes(log)[4]["layers"]["1"]["previous"] == {"choices": 1.0, "top1": 1.0}


@pytest.mark.parametrize("damage", [{"first": None}, {"tokens": "x"}, []])
def test_damaged_state_is_an_error(damage: Any) -> None:
    from tests.training.ranks import tiny_config

    with pytest.raises(UsageError, match="'routing_probe' of the checkpoint must be a probe"):
        RoutingProbe(tiny_config([]), damage)
