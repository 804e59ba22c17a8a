"""Megatron-LM's flags on the command line: accepted by value, or an error with its own reason."""

from __future__ import annotations

import pytest

from megatron_moe.config.cli import all_flags, parse_args, parse_or_exit
from megatron_moe.config.megatron_flags import entries, entries_of
from megatron_moe.config.words import closest
from megatron_moe.errors import UsageError
from tests.config.megatron_lists import megatron_flags, script_flags

KNOWN = sorted({*megatron_flags(), *(row.flag for row in script_flags())})


def test_every_flag_of_megatron_lm_is_a_flag_here_or_has_an_entry() -> None:
    assert len(KNOWN) > 1000
    ours = all_flags()
    assert [flag for flag in KNOWN if flag not in ours and not entries_of(flag)] == []


def test_the_table_has_no_flag_that_nobody_has_and_no_pattern_without_flags() -> None:
    names = {name for entry in entries() for name in entry.flags}
    patterns = {name for name in names if name.endswith("*")}
    others = {"adamw", "fused_adam"}
    assert names - patterns - set(KNOWN) - others == set()
    unused = [name for name in patterns if not any(flag.startswith(name[:-1]) for flag in KNOWN)]
    assert unused == []


def test_all_that_is_wrong_is_shown_at_once_each_with_its_reason() -> None:
    line = (
        "--multi-latent-attention --lr fast --kv-lora-rank 512 --mtp-num-layers 1 --optimizer lion "
        "--context-parallel-size 2 --hidden-sizes 8 --min-lr slow --normalization LayerNorm "
        "--fp8-param-gather --num-layers 3 --colour blue --warmup 3"
    )
    with pytest.raises(UsageError) as error:
        parse_args(line.split())
    lines = str(error.value).split("\n  ")
    assert lines[0] == "11 errors:"
    expected = [
        "flag must be a known flag, the closest is --hidden-size (got '--hidden-sizes'); see",
        "flag must be a known flag (got '--colour'); see --help",
        "--multi-latent-attention, --kv-lora-rank must be left out (got '--multi-latent-attention "
        "--kv-lora-rank 512'); multi-latent attention (MLA, DeepSeek) is not built",
        "--mtp-num-layers must be 0 (got '1'); multi-token prediction (MTP) is not built",
        "--optimizer must be one of adam, sgd, adafactor, muon (got 'lion'); Lion",
        "--context-parallel-size must be 1 (got '2'); context parallelism is not built",
        "--normalization must be RMSNorm (got 'LayerNorm'); LayerNorm is not built",
        "--fp8-param-gather must be left out (got True); weights are kept and gathered in the",
        "--warmup must be left out (got '3'); the flag is --lr-warmup-iters",
        "--lr must be a number (got 'fast')",
        "--min-lr must be a number (got 'slow')",
    ]
    assert len(lines) == 1 + len(expected)
    for found, start in zip(lines[1:], expected, strict=True):
        assert found.startswith(start)


def test_several_errors_end_the_command_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_or_exit(["--lr", "fast", "--fp16"])
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("pretrain_openmoe.py: error: 2 errors:\n  --fp16 must be left out")


ACCEPTED = {
    "--normalization RMSNorm": "",
    "--context-parallel-size 1": "",
    "--rotary-percent 1": "",
    "--rotary-percent 1.00": "",
    "--use-mcore-models --disable-bias-linear": "",
    "--override-opt_param-scheduler": "",
    "--cuda-graph-impl local --cuda-graph-modules attn moe": "",
    "--cp-comm-type p2p a2a": "",
    "--initial-loss-scale 65536": "",
    "--exit-interval 0": "",
    "--optimizer fusedadamw": "--optimizer adam",
    "--moe-token-dispatcher-type flex": "--moe-token-dispatcher-type alltoall",
    "--tokenizer-path a": "--tokenizer-model a",
    "--tokenizer-type Llama2Tokenizer": "--tokenizer-type SentencePieceTokenizer",
    "--tokenizer-type GPTSentencePieceTokenizer": "--tokenizer-type SentencePieceTokenizer",
    "--tokenizer-type PretrainedFromHF": "--tokenizer-type HuggingFaceTokenizer",
    "--tokenizer-type Llama3Tokenizer": "--tokenizer-type HuggingFaceTokenizer",
    "--disable-manual-gc-eval": "--no-manual-gc-eval",
    "--dataloader-type cyclic": "",
    "--encoder-seq-length 64": "--seq-length 64",
    "--layernorm-epsilon 1e-5": "--norm-epsilon 1e-5",
    "--fp8-hybrid": "--fp8-format hybrid",
    "--fp8-interval 1": "",
    "--moe-router-padding-for-fp8": "",
    "--exit-on-missing-checkpoint": "--no-allow-missing-load",
}


@pytest.mark.parametrize("line", list(ACCEPTED))
def test_a_flag_without_effect_or_with_another_name_is_accepted_and_said(line: str) -> None:
    command = parse_args(line.split())
    assert command.config == parse_args(ACCEPTED[line].split()).config
    note, *_ = command.notes
    for flag in line.replace("_", "-").replace("=", " ").split(" --"):
        assert flag.lstrip("-") in note


REJECTED = {
    "--normalization LayerNorm": "must be RMSNorm",
    "--context-parallel-size 2": "must be 1",
    "--rotary-percent 0.5": "must be 1.0",
    "--transformer-impl inference_optimized": "must be one of auto, local, transformer_engine",
    "--use-mcore-models yes": "must be used with no value",
    "--ckpt-format": "must be used with torch",
    "--logging-level many": "must be used with an integer",
    "--dataloader-type external": "must be single or cyclic",
    "--recompute-modules mlp mla_up_proj": "must be values, each one of core_attn, mlp, moe",
    "--moe-router-load-balancing-type sinkhorn": "must be one of",
    "--tokenizer-type TikTokenizer": "must be one of SentencePieceTokenizer",
    "--tokenizer-type MultimodalTokenizer": "must be one of SentencePieceTokenizer",
    "--retro-project-dir x": "must be left out",
}


@pytest.mark.parametrize("line", list(REJECTED))
def test_another_value_asks_for_another_model_and_is_an_error(line: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_args(line.split())
    assert str(error.value).startswith(f"{line.split()[0]} {REJECTED[line]}")


@pytest.mark.parametrize("line", ["--save=", "--data-path a= --lr="])
def test_an_empty_value_is_an_error_that_says_why(line: str) -> None:
    words = line.split() if line.startswith("--save") else ["--data-path", "a", "", "--lr", ""]
    with pytest.raises(UsageError) as error:
        parse_args(words)
    assert "--save must be given a value (got '')" in str(error.value) or (
        "--data-path must be given a value (got '')" in str(error.value)
        and "--lr must be given a value (got '')" in str(error.value)
    )
    assert "an unset variable of a script" in str(error.value)


def test_a_negative_number_is_a_value() -> None:
    assert parse_args(["--adam-eps", "-1"]).config.optimizer.adam_eps == -1


def test_unrelated_flags_are_not_suggested() -> None:
    """Flags of others, whose meaning is in the table, beside the flags here: none is a slip."""
    ours = [flag for flag in all_flags() if flag not in KNOWN]
    both = [flag for flag in all_flags() if flag in KNOWN]
    others = [flag for flag in KNOWN if flag not in both]
    suggested = {flag: closest(flag, [*ours, *both]) for flag in others}
    close = {flag: found for flag, found in suggested.items() if found is not None}
    assert len(close) < 0.02 * len(others)


def test_slips_of_one_letter_are_suggested() -> None:
    """A letter that is missing, twice, or swapped with the next one, anywhere in any flag."""
    flags = list(all_flags())
    right = total = 0
    for flag in flags[::7]:
        for at in range(3, len(flag) - 1, 4):
            slips = (
                flag[:at] + flag[at + 1 :],
                flag[:at] + flag[at] + flag[at:],
                flag[:at] + flag[at + 1] + flag[at] + flag[at + 2 :],
            )
            for slip in slips:
                if slip not in flags:
                    total += 1
                    right += closest(slip, flags) == flag
    assert right > 0.93 * total


def test_normalised_weights_do_not_depend_on_the_order_of_the_words() -> None:
    """A softmax over all experts, normalised over the chosen ones, is one over the chosen ones."""
    words = ["--norm-topk-prob", "--moe-router-pre-softmax"]
    for line in (words, words[::-1]):
        assert not parse_args(line).config.moe.moe_router_pre_softmax
    assert parse_args(words[1:]).config.moe.moe_router_pre_softmax
