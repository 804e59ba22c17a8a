"""What a run reports, read back: TensorBoard, metrics file, log, unigram baseline."""

from __future__ import annotations

import json
import re
from collections import Counter
from math import log
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_moe.config.cli import parse_args
from megatron_moe.data.pipeline import build_data
from megatron_moe.model.logical import expert_width
from megatron_moe.training.optim.schedule import learning_rate
from megatron_moe.training.plan import rate_lengths
from megatron_moe.training.unigram import unigram_loss
from tests.training.tiny import MODEL, VOCAB, pretrain_rank

DATA = ["--split", "80,15,5", "--train-iters", "8", "--eval-iters", "2", "--eval-interval", "4"]
TRAIN = ("lm loss", "logit z", "grad norm", "learning rate")
LAYER = (
    "max over mean load",
    "MaxVio",
    "dead experts",
    "drop rate",
    "drop rate of real tokens",
    "drop rate of choice 1",
    "drop rate of choice 2",
    "tokens",
    "kept choices",
    "dropped choices",
    "router entropy",
    "router confidence",
    "router logit RMS",
    "load balancing loss",
    "load balancing loss 2",
    "router z loss",
)


class Reported:
    """One run on two ranks, and everything it left."""

    def __init__(self, pool, corpus: str, directory: Path) -> None:
        self.argv = [*MODEL, *DATA, "--data-path", corpus, "--expert-model-parallel-size", "2"]
        self.argv += ["--moe-router-load-balancing-type", "seq_aux_loss", "aux_loss"]
        self.argv += ["--moe-aux-loss-coeff", "0.01", "0.02"]
        self.argv += ["--tensorboard-dir", str(directory / "board")]
        self.argv += ["--metrics-file", str(directory / "metrics.jsonl")]
        self.argv += ["--routing-log-file", str(directory / "routing.jsonl")]
        self.results = pool.run(pretrain_rank, 2, argv=self.argv)
        self.config = parse_args(self.argv).config
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        self.steps = [json.loads(line) for line in lines]
        lines = (directory / "routing.jsonl").read_text().splitlines()
        self.routing = [json.loads(line) for line in lines]
        self.board = EventAccumulator(str(directory / "board"), {"scalars": 0, "histograms": 0})
        self.board.Reload()

    def scalars(self, tag: str) -> dict[int, float]:
        return {event.step: event.value for event in self.board.Scalars(tag)}


@pytest.fixture(scope="module")
def reported(pool, corpus, tmp_path_factory) -> Reported:
    return Reported(pool, corpus, tmp_path_factory.mktemp("reported"))


def test_tensorboard_has_what_the_documentation_promises(reported):
    tags = set(reported.board.Tags()["scalars"])
    expected = {f"train/{name}" for name in (*TRAIN, "consumed samples", "batch size")}
    expected |= {f"speed/{name}" for name in ("tokens per second", "seconds per step", "MFU")}
    expected |= {"speed/model TFLOPs per device", "memory/max allocated MiB"}
    expected |= {"speed/done TFLOPs per device", "speed/MFU of done arithmetic"}
    expected |= {f"{s}/{n}" for s in ("validation", "test") for n in ("lm loss", "perplexity")}
    expected |= {f"moe/layer {layer}/{name}" for layer in ("01", "03") for name in LAYER}
    assert tags == expected
    assert set(reported.board.Tags()["histograms"]) == {
        f"moe/layer {layer}/{name}"
        for layer in ("01", "03")
        for name in ("load per expert", "drop rate by position")
    }
    manual = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    for tag in expected - {"test/lm loss", "test/perplexity"}:
        assert re.sub(r"layer \d\d", "layer NN", tag) in manual, tag


def test_tensorboard_and_metrics_file_agree(reported):
    for name in TRAIN:
        key = {"learning rate": "learning_rate", "grad norm": "grad_norm"}.get(
            name, name.replace(" ", "_")
        )
        points = reported.scalars(f"train/{name}")
        assert points == pytest.approx({s["iteration"]: s[key] for s in reported.steps}, rel=1e-6)
    assert reported.scalars("train/consumed samples") == {4: 32.0, 8: 64.0}
    assert reported.scalars("train/batch size") == {4: 8.0, 8: 8.0}


def test_steps_are_counted_and_their_hexadecimal_floats_are_exact(reported):
    assert [step["iteration"] for step in reported.steps] == list(range(1, 9))
    assert [step["consumed_samples"] for step in reported.steps] == list(range(8, 65, 8))
    for step in reported.steps:
        assert float.fromhex(step["lm_loss_hex"]) == step["lm_loss"]
        assert float.fromhex(step["grad_norm_hex"]) == step["grad_norm"]
        lengths = rate_lengths(reported.config, 8)
        rate = learning_rate(reported.config.optimizer, lengths, step["iteration"] - 1)
        assert step["learning_rate"] == rate
        assert step["targets"] == 8 * 32
    assert reported.steps[-1]["lm_loss"] < reported.steps[0]["lm_loss"]


def test_every_choice_of_every_token_is_in_the_load_histogram(reported):
    # Steps of an interval x sequences x positions x choices of a token.
    choices = 4 * 8 * 32 * 2
    for layer in ("01", "03"):
        events = reported.board.Histograms(f"moe/layer {layer}/load per expert")
        assert [event.step for event in events] == [4, 8]
        for event in events:
            bars = event.histogram_value
            assert sum(bars.bucket) == choices
            assert list(bars.bucket_limit) == [0.5, 1.5, 2.5, 3.5]
            busiest = max(bars.bucket) * 4 / choices
            assert reported.scalars(f"moe/layer {layer}/max over mean load")[event.step] == (
                pytest.approx(busiest)
            )
        assert all(
            0 < v < 1.3863 for v in reported.scalars(f"moe/layer {layer}/router entropy").values()
        )
        assert all(0 < v < 1 for v in reported.scalars(f"moe/layer {layer}/drop rate").values())


def test_the_routing_log_has_every_layer_and_says_what_tensorboard_says(reported):
    assert [line["iteration"] for line in reported.routing] == [4, 8]
    tags = {
        "max over mean load": "max_over_mean_load",
        "MaxVio": "max_violation",
        "dead experts": "dead_experts",
        "drop rate": "drop_rate",
        "drop rate of real tokens": "drop_rate_of_real",
        "tokens": "tokens",
        "router entropy": "router_entropy",
        "router confidence": "router_confidence",
        "router logit RMS": "logit_rms",
        "load balancing loss": "aux_loss",
        "router z loss": "z_loss",
    }
    for line in reported.routing:
        assert line["layers"].keys() == {"1", "3"}
        for number, layer in line["layers"].items():
            for tag, key in tags.items():
                shown = reported.scalars(f"moe/layer 0{number}/{tag}")[line["iteration"]]
                assert shown == pytest.approx(layer[key], rel=1e-6), tag
            for rank in (0, 1):
                shown = reported.scalars(f"moe/layer 0{number}/drop rate of choice {rank + 1}")
                assert shown[line["iteration"]] == pytest.approx(layer["drop_rate_by_choice"][rank])
            (second,) = layer["further_aux_losses"]
            shown = reported.scalars(f"moe/layer 0{number}/load balancing loss 2")
            assert shown[line["iteration"]] == pytest.approx(second, rel=1e-6)
            assert 2 < second < layer["aux_loss"], "loads of all rows differ less than of each"
            assert layer["drop_rate_of_padding"] is None, "rows of this objective have none"
            assert sum(layer["load"]) == 2 * layer["tokens"] == 2 * 4 * 8 * 32
            assert sum(map(sum, layer["kept_at"][0])) == sum(layer["kept"])
            # Positions compete in order, so the end of a row loses more than its start.
            at = layer["drop_rate_by_position"]
            assert at[0] < at[-1]
            assert sum(at) / 8 == pytest.approx(layer["drop_rate"])
            assert layer["max_violation"] == pytest.approx(layer["max_over_mean_load"] - 1)


def test_throughput_is_consistent(reported):
    speed = reported.scalars("speed/tokens per second")
    seconds = reported.scalars("speed/seconds per step")
    tflops = reported.scalars("speed/model TFLOPs per device")
    for step, rate in speed.items():
        assert rate == pytest.approx(8 * 32 / seconds[step], rel=1e-5)
        # --device-peak-tflops is 1.
        assert reported.scalars("speed/MFU")[step] == pytest.approx(tflops[step], rel=1e-5)
        done = reported.scalars("speed/done TFLOPs per device")[step]
        mfu = reported.scalars("speed/MFU of done arithmetic")[step]
        assert mfu == pytest.approx(done, rel=1e-5)


def test_arithmetic_done_leaves_out_what_was_dropped(reported):
    """By hand, from the choices that the routing log says were kept: all tokens are real."""
    model, moe = reported.config.model, reported.config.moe
    choice = 2 * (model.input_blocks + 1) * model.hidden_size * expert_width(model, moe)
    tflops = reported.scalars("speed/model TFLOPs per device")
    done = reported.scalars("speed/done TFLOPs per device")
    log = reported.results[0][1].splitlines()
    for line in reported.routing:
        counts, step = line["arithmetic"], line["iteration"]
        dropped = sum(sum(x["load"]) - sum(x["kept"]) for x in line["layers"].values())
        assert dropped > 0
        assert counts["tokens"] == 4 * 8 * 32
        assert counts["asked"] - counts["done"] == pytest.approx(3 * choice * dropped, rel=1e-9)
        share = counts["done"] / counts["asked"]
        assert done[step] / tflops[step] == pytest.approx(share, rel=1e-5)
        shown = next(part for part in log if part.startswith(f" iteration {step}/"))
        assert f"TFLOP/s/device ({done[step]:.4g} done) | MFU " in shown
        assert re.search(r"MFU [\d.]+% \([\d.]+% done\)", shown)


def test_the_log_is_rank_zeros_and_ends_with_losses_and_speed(reported):
    (code, out, _), (other_code, other_out, _) = reported.results
    assert (code, other_code, other_out) == (0, 0, "")
    lines = out.splitlines()
    assert sum(line.startswith(" iteration ") for line in lines) == 2
    valid = reported.scalars("validation/lm loss")
    assert list(valid) == [4, 8]
    assert lines[-4] == " done at iteration 8, 64 samples consumed"
    first, last = reported.steps[0]["lm_loss"], reported.steps[-1]["lm_loss"]
    assert f"first {first:.6f} (iteration 1), last {last:.6f} (iteration 8) | " in lines[-3]
    assert re.search(r"\d+ tokens/s$", lines[-3])
    printed = re.fullmatch(r" validation loss: (\d+\.\d+) over 512 targets", lines[-2])
    assert printed is not None
    assert float(printed[1]) == pytest.approx(valid[8], rel=1e-5)
    assert lines[-1].endswith(f"tensorboard --logdir {reported.config.logging.tensorboard_dir}")


def test_the_unigram_loss_is_that_of_counting_by_hand(reported):
    dataset = IndexedDataset(reported.config.data.data_path[0])
    training = round(0.8 * len(dataset))
    counts = Counter(int(i) for number in range(training) for i in dataset[number])
    data = build_data(
        reported.config,
        dp_rank=0,
        dp_size=1,
        num_microbatches=4,
        consumed_train_samples=0,
        reads_data=True,
    )
    total, targets = 0.0, 0
    for batch in data.valid():
        for label, counted in zip(
            batch.labels_BS.flatten().tolist(), batch.loss_mask_BS.flatten().tolist(), strict=True
        ):
            if counted:
                total -= log((counts[label] + 1) / (counts.total() + VOCAB))
                targets += 1
    found = unigram_loss(reported.config)
    assert found.loss == pytest.approx(total / targets, rel=1e-9)
    assert (found.targets, found.training_tokens) == (targets, counts.total())


def test_overflow_of_bounded_buffers_is_said_logged_and_plotted(pool, corpus, tmp_path):
    """A router that is not trained loads two ranks unevenly: buffers of the even load are short."""
    argv = [*MODEL, "--data-path", corpus, "--split", "1,0,0", "--train-iters", "4"]
    argv += ["--expert-model-parallel-size", "2", "--moe-expert-impl", "grouped"]
    argv += ["--moe-expert-capacity-factor", "None", "--moe-dropless-buffer-factor", "1"]
    argv += ["--tensorboard-dir", str(tmp_path / "board"), "--log-interval", "4"]
    argv += ["--eval-iters", "0"]
    (code, log, message), _ = pool.run(pretrain_rank, 2, argv=argv)
    assert (code, message) == (0, "")
    rows = re.search(r"expert buffers: 2 x (\d+) rows .* choices past that are dropped", log)
    assert rows is not None
    parsed = parse_args(argv).config
    choices = parsed.train.micro_batch_size * parsed.data.seq_length * 2
    assert int(rows[1]) == choices // 2
    logged = dict(re.findall(r"layer (\d): (\d+) \(", log.split("OVERFLOW")[1].splitlines()[0]))
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    for layer, count in logged.items():
        (event,) = board.Scalars(f"moe/layer 0{layer}/overflowed choices")
        assert event.value == int(count) > 0
