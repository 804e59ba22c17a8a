"""`--describe`: complete, consistent with the counts, without torch or a launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import pretrain_openmoe
from megatron_moe.config import DataConfig, ParallelConfig, RunConfig
from megatron_moe.config.presets import OPENMOE_VOCAB, PRESETS
from megatron_moe.config.run import flag_of
from megatron_moe.errors import UsageError
from megatron_moe.planning.describe import ASSUMED_VOCAB, describe, describe_layout

ROOT = Path(__file__).parents[2]
LAYOUT = ParallelConfig(
    tensor_model_parallel_size=4,
    pipeline_model_parallel_size=4,
    expert_model_parallel_size=32,
    expert_tensor_parallel_size=1,
    sequence_parallel=True,
)
LARGE = replace(PRESETS["openmoe-34b-32e-released"], parallel=LAYOUT)


def test_text_has_sizes_parameters_flops_layout_and_every_setting() -> None:
    text = describe(LARGE)
    for shown in (
        "MoE layers (from 0): 3, 7, 11, 15, 19, 23, 27, 31",
        "24 heads x 128",
        "capacity      t5x, in groups of 2048 tokens (1 row); group_aux_loss",
        "46,270,737,408",  # all parameters
        "8,456,727,552",  # activated without embeddings
        "FLOPs per token at 2048 tokens",
        "18,891,079,680",  # forward
        "TP 4 x PP 4 x DP 8",
        "ETP 1 x EP 32 x PP 4 x DP 1",
        "876,632,064",  # a rank of the first stage
    ):
        assert shown in text
    settings = [line.split()[0] for line in text.splitlines() if line.startswith("    --")]
    expected = [flag_of(name) for section in LARGE.to_dict().values() for name in section]
    assert settings == expected
    assert {"--phases", "--kernel-impl"} <= set(settings)


@pytest.mark.parametrize(
    ("group", "shown"),
    [
        (4096, "4096 tokens (2 rows)"),
        (1024, "1024 tokens (1/2 row)"),
        (None, "2048 tokens (1 row)"),
    ],
)
def test_the_capacity_group_is_shown(group: int | None, shown: str) -> None:
    config = PRESETS["openmoe-8b-32e-released"]
    moe = replace(config.moe, moe_capacity_group_size=group)
    config = replace(config, moe=moe, train=replace(config.train, micro_batch_size=2))
    assert f"in groups of {shown}; group_aux_loss" in describe(config)
    if group == 4096:
        config = replace(config, train=replace(config.train, micro_batch_size=1))
        expected = r"\(got 4096\); a group lies in one micro-batch: set --micro-batch-size 2 or"
        with pytest.raises(UsageError, match=expected):
            describe(config)


def test_attention_is_described_with_what_has_no_effect() -> None:
    grouped = {"group_query_attention": True, "num_query_groups": 8, "qk_layernorm": True}
    model = replace(LARGE.model, **grouped, softmax_scale=None)  # type: ignore[arg-type]
    text = describe(replace(LARGE, model=model))
    shape = f"{model.num_attention_heads} heads x {model.kv_channels}"
    expected = f"{shape}, keys and values of 8 groups, queries and keys normalised over each head"
    assert expected in text and "  note  " not in text
    unused = replace(LARGE.model, num_query_groups=3)
    assert "--num-query-groups 3 has no effect without" in describe(replace(LARGE, model=unused))
    steep = replace(LARGE.model, qk_layernorm=True)
    deviation = f"deviation of {steep.kv_channels**0.5:.3g}, the square root of --kv-channels"
    assert deviation in describe(replace(LARGE, model=steep))


def test_json_holds_the_same_and_gives_the_configuration_back() -> None:
    values = json.loads(describe(LARGE, "json"))
    assert RunConfig.from_dict(values["config"], "describe") == LARGE
    assert values["vocabulary"] == {"padded_size": OPENMOE_VOCAB, "assumed": False}
    assert values["parameters"]["total"] == 46_270_737_408
    assert sum(values["parameters"]["by_kind"].values()) == values["parameters"]["total"]
    flops = values["flops_per_token"]
    assert sum(flops["forward_by_part"].values()) * 3 == flops["training"] == 56_673_239_040
    assert [rank["stage"] for rank in values["parameters_per_rank"]] == [0, 1, 2, 3]
    assert values["parameters_per_rank"][3]["total"] == 876_635_136
    assert values["layout"]["world_size"] == 128


def test_world_size_is_the_one_asked_for_or_the_fewest_ranks() -> None:
    config = PRESETS["openmoe-base-16e"]
    assert describe_layout(config, None, OPENMOE_VOCAB, 8).layout.dp == 8
    assert describe_layout(config, None, OPENMOE_VOCAB).layout.world_size == 1
    layout = describe_layout(config, None, OPENMOE_VOCAB, 4).layout
    assert describe_layout(config, layout, OPENMOE_VOCAB).layout is layout


def test_fewest_ranks_count_experts_split_as_far_as_the_rest() -> None:
    # Without --expert-tensor-parallel-size each expert is split over the TP ranks: 2 x EP 2.
    parallel = ParallelConfig(
        tensor_model_parallel_size=2, expert_model_parallel_size=2, sequence_parallel=True
    )
    config = replace(PRESETS["openmoe-base-16e"], parallel=parallel)
    assert describe_layout(config, None, OPENMOE_VOCAB).layout.world_size == 4


def test_stages_of_an_interleaved_pipeline_hold_their_own_chunks() -> None:
    tiny = PRESETS["openmoe-tiny"]
    config = replace(
        tiny,
        moe=replace(tiny.moe, moe_layer_freq="[0,0,1,0]"),
        train=replace(tiny.train, global_batch_size=8),
        parallel=ParallelConfig(
            pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2
        ),
    )
    first, second = describe_layout(config, None, 1024).per_stage
    assert first.expert == 8 * 3 * 256 * 1024  # layers 0 and 2, not 0 and 1
    assert second.expert == 0


def test_the_work_of_each_stage_is_shown() -> None:
    """Hand-counted for 34B on four even stages: the logits are 2 H V = 1.58e9 of 18.9e9."""
    text = describe(LARGE)
    assert "stage 0 with embedding                             8    4,328,964,096" in text
    assert "stage 3 with logits                                8    4,328,964,096" in text
    assert "1,575,223,296  5,904,187,392" in text
    assert "imbalance     1.250: the busiest stage has 25.0% more than the mean" in text
    fewer = replace(LAYOUT, decoder_last_pipeline_num_layers=5)
    text = describe(replace(LARGE, parallel=fewer))
    assert "9 9 9 5 layers in the order of the model" in text
    assert "imbalance     1.002" in text
    values = json.loads(describe(replace(LARGE, parallel=fewer), "json"))
    stages = [stage["forward"] for stage in values["flops_per_token_of_stages"]]
    assert sum(stages) == values["flops_per_token"]["forward"]
    assert values["stage_imbalance"] == max(stages) * 4 / sum(stages)
    assert "imbalance" not in describe(PRESETS["openmoe-base-16e"])


def test_world_size_of_a_launcher_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    config = PRESETS["openmoe-base-16e"]
    assert describe_layout(config, None, OPENMOE_VOCAB).layout.world_size == 4


def test_an_unknown_vocabulary_is_assumed_and_marked() -> None:
    text = describe(PRESETS["openmoe-tiny"])
    assert f"{ASSUMED_VOCAB} padded, tied (assumed" in text
    given = replace(PRESETS["openmoe-tiny"], data=DataConfig(vocab_size=1000))
    assert "1024 padded, tied\n" in describe(given)


@pytest.mark.parametrize(
    ("parallel", "world_size", "flag"),
    [
        (ParallelConfig(expert_model_parallel_size=3), None, "--expert-model-parallel-size"),
        (ParallelConfig(pipeline_model_parallel_size=0), None, "--pipeline-model-parallel-size"),
        (ParallelConfig(), 0, "--world-size"),
        (ParallelConfig(tensor_model_parallel_size=2), 3, "--tensor-model-parallel-size"),
    ],
)
def test_impossible_layouts_are_rejected(
    parallel: ParallelConfig, world_size: int | None, flag: str
) -> None:
    with pytest.raises(UsageError, match=flag):
        describe(replace(PRESETS["openmoe-base-16e"], parallel=parallel), "text", world_size)


def test_a_missing_tokenizer_is_rejected() -> None:
    data = DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model="/nowhere.model")
    with pytest.raises(UsageError, match="--tokenizer-model"):
        describe(replace(PRESETS["openmoe-base-16e"], data=data))


def test_training_data_is_described() -> None:
    config = PRESETS["openmoe-8b-32e"]
    assert "Training data" not in describe(config)
    config = replace(config, data=replace(config.data, mixture="v2", data_root="/none"))
    text = describe(config)
    rows = text.partition("Training data\n")[2].splitlines()[:10]
    assert rows[7].split() == [
        "commoncrawl", "43.50%", "no", "file", "-", "/none/commoncrawl_text_document",
    ]  # fmt: skip
    data = json.loads(describe(config, "json"))["training_data"]
    assert len(data) == 9
    assert sum(source["weight"] for source in data) == pytest.approx(1)


def test_it_needs_neither_torch_nor_megatron() -> None:
    script = (
        "import sys\n"
        "from dataclasses import replace\n"
        "from megatron_moe.config.presets import PRESETS\n"
        "from megatron_moe.planning.describe import describe\n"
        "config = PRESETS['openmoe-8b-32e']\n"
        "describe(config)\n"
        "describe(replace(config, data=replace(config.data, mixture='v2')))\n"
        "sys.exit('torch' in sys.modules or 'megatron.core' in sys.modules)"
    )
    environment = {name: v for name, v in os.environ.items() if name != "WORLD_SIZE"}
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=False)
    assert run.returncode == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "1e-4"], "--lr-warmup-init must be <= --lr (0.0001)"),
        (["--train-iters", "5", "--lr-decay-style", "cosine"], "--lr-warmup-iters must be < 5"),
        (["--train-samples", "10"], "--train-samples must be >= 128, one global batch"),
        (["--train-iters", "20000", "--freeze-params", "none.*"], "--freeze-params"),
    ],
)
def test_what_training_refuses_is_not_described(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flags of the whole command: the preset's warm-up takes 10000 steps at rate 0.01."""
    base = ["--preset", "openmoe-base-16e", *flags]
    for words in ([*base, "--describe"], base):
        with pytest.raises(SystemExit) as end:
            pretrain_openmoe.main(words)
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert message in error


def test_a_length_is_not_needed_to_describe_a_model() -> None:
    missing = "length        not given: training needs --train-iters, --train-samples or --phases"
    config = PRESETS["openmoe-base-16e"]
    assert missing in describe(config)
    assert missing not in describe(replace(config, train=replace(config.train, train_iters=20000)))
