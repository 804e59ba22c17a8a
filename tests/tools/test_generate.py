"""Text from a checkpoint: the model's own choices, the sampling rules, the errors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_moe.checkpoint.blocks import Block
from megatron_moe.checkpoint.index import MODEL
from megatron_moe.checkpoint.parts import Part
from megatron_moe.checkpoint.ranks import Ranks
from megatron_moe.checkpoint.reading import CONFIG, STATE
from megatron_moe.checkpoint.state import Metadata, TrainState, as_json
from megatron_moe.checkpoint.writer import write_checkpoint
from megatron_moe.config import DataConfig, ModelConfig, MoEConfig, RunConfig
from megatron_moe.data.tokenizer import ByteTokenizer
from megatron_moe.model.reference import ReferenceOpenMoE
from tools.generate import Sampling, generate, main, next_token

PADDED = 384
CONFIG_OF_RUN = RunConfig(
    model=ModelConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=32,
        num_attention_heads=2,
        kv_channels=16,
        max_position_embeddings=40,
    ),
    moe=MoEConfig(
        num_experts=4,
        moe_layer_freq="[0,1]",
        moe_shared_expert_intermediate_size=None,
        moe_eval_capacity_factor=0.25,
        moe_min_capacity=1,
    ),
    data=DataConfig(tokenizer_type="ByteTokenizer"),
)


def _model(moe: MoEConfig = CONFIG_OF_RUN.moe) -> ReferenceOpenMoE:
    model = ReferenceOpenMoE(CONFIG_OF_RUN.model, moe, PADDED, seed=2)
    with torch.no_grad():
        model.layers[1].moe.experts.down *= 50  # what experts do, and so drops, must show
        model.output.weight *= 8  # peaked enough for different texts to differ
        model.output.weight[[0, 1, 2]] = 0  # no special ids: an early end would hide the rest
        model.output.weight[259:] *= 8  # and padding that would win if it were allowed
    return model.eval()


def _save(directory: Path, config: RunConfig) -> None:
    """Write a native checkpoint of `_model()`, trained with a byte tokenizer."""
    parts = [
        Part(MODEL, name, tuple(t.shape), Block.whole(tuple(t.shape)), t)
        for name, t in _model().state_dict().items()
    ]
    metadata = Metadata(padded_vocab_size=PADDED, tokenizer_hash=ByteTokenizer().identity)
    state = {
        "train": as_json(TrainState(iteration=7)),
        "metadata": as_json(metadata),
        "optimizer": None,
        "random": None,
    }
    write_checkpoint(
        directory,
        7,
        ranks=Ranks(),
        parts=parts,
        documents={CONFIG: config.to_dict(), STATE: state},
        header={"format": "pt"},
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    _save(directory, CONFIG_OF_RUN)
    return directory


def _text(capsys: pytest.CaptureFixture[str], checkpoint: Path, *flags: str) -> str:
    main(["--load", str(checkpoint), *flags])
    return capsys.readouterr().out[:-1]


def _greedy(model: ReferenceOpenMoE, prompt: str, tokens: int) -> str:
    """The most probable continuation, from the logits of plain forward passes."""
    tokenizer = ByteTokenizer()
    ids = tokenizer.tokenize(prompt)
    for _ in range(tokens):
        logits = model(torch.tensor([ids]), training_capacity=False).logits[0, -1]
        ids.append(int(logits[: tokenizer.vocab_size].argmax()))
    return tokenizer.detokenize(ids)


def test_greedy_text_is_the_models_own_without_drops(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    dropless = _model(replace(CONFIG_OF_RUN.moe, moe_eval_capacity_factor=None))
    flags = ("--prompt", "abcd", "--max-new-tokens", "12", "--temperature", "0")
    text = _text(capsys, checkpoint, *flags)
    assert text == _greedy(dropless, "abcd", 12)
    dropping = _text(capsys, checkpoint, *flags, "--drop-tokens")
    assert dropping == _greedy(_model(), "abcd", 12)
    assert dropping != text, "the case cannot tell dropless from dropping"


def test_a_seed_repeats_a_sample_and_another_gives_another(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    flags = ("--prompt", "ab", "--max-new-tokens", "16", "--temperature", "2", "--seed")
    first = _text(capsys, checkpoint, *flags, "1")
    assert first == _text(capsys, checkpoint, *flags, "1")
    assert first != _text(capsys, checkpoint, *flags, "2")
    assert first.startswith("ab")


def test_an_empty_prompt_begins_a_document(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    assert _text(capsys, checkpoint, "--max-new-tokens", "4")


def test_bf16_runs(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    assert _text(capsys, checkpoint, "--bf16", "--prompt", "a", "--max-new-tokens", "4")


def test_generation_ends_at_the_end_of_a_document() -> None:
    model = _model()
    prompt = [10, 11]
    greedy = partial(
        generate, model, prompt, tokens=6, vocab_size=259, sampling=Sampling(temperature=0), seed=0
    )
    ids = list(greedy(eod=1))
    assert len(ids) == 6
    assert list(greedy(eod=ids[3])) == ids[: ids.index(ids[3])]


LOGITS = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()


def _frequencies(sampling: Sampling, draws: int = 1000) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    counts = Counter(next_token(LOGITS, sampling, generator) for _ in range(draws))
    return [counts[token] / draws for token in range(4)]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.5, 0.1, 0.3, 0.1]),
        (Sampling(temperature=0), [1, 0, 0, 0]),
        (Sampling(temperature=0.5), [25 / 36, 1 / 36, 9 / 36, 1 / 36]),
        (Sampling(top_k=2), [0.625, 0, 0.375, 0]),
        (Sampling(top_k=9), [0.5, 0.1, 0.3, 0.1]),
        (Sampling(top_p=0.45), [1, 0, 0, 0]),
        (Sampling(top_p=0.6), [0.625, 0, 0.375, 0]),
        (Sampling(top_p=0.85), [5 / 9, 1 / 9, 3 / 9, 0]),  # of equals, the first
        (Sampling(top_k=2, top_p=0.62), [1, 0, 0, 0]),  # p is of what top-k left
        (Sampling(top_p=0.7, temperature=0.5), [25 / 34, 0, 9 / 34, 0]),
    ],
)
def test_sampling_rules_worked_by_hand(sampling: Sampling, expected: list[float]) -> None:
    found = _frequencies(sampling)
    # Four standard deviations of a frequency over 1000 draws.
    assert found == pytest.approx(expected, abs=0.063)
    assert [f > 0 for f in found] == [e > 0 for e in expected]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--top-k", "-1"], "--top-k"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "x" * 30, "--max-new-tokens", "11"], "at most 10: the prompt has 30"),
        (["--ckpt-step", "8"], "8"),
        (["--device", "abacus"], "--device"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, flags: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--load", str(checkpoint), *flags])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert named in printed.err


def test_a_missing_checkpoint_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--load", str(tmp_path / "none")])
    assert ended.value.code == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_another_tokenizer_than_the_trained_one_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _save(tmp_path, replace(CONFIG_OF_RUN, data=DataConfig(vocab_size=300)))
    with pytest.raises(SystemExit) as ended:
        main(["--load", str(tmp_path), "--prompt", "1 2"])
    assert ended.value.code == 2
    assert "tokenizer of the checkpoint" in capsys.readouterr().err
