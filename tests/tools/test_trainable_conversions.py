"""A checkpoint from elsewhere is converted, trained, generated from and evaluated by command lines.

The folders are written here, without the converter: a Hugging Face folder in the released layout,
and one of Llama by its own class. A tokenizer lies beside the weights; no later command names it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_moe.checkpoint import load_logical, read_identity
from megatron_moe.config import RunConfig
from megatron_moe.tokenizer.build import build_tokenizer
from tests.convert.test_llama_class import llama
from tests.data.pieces import train
from tests.support.pool import Pool
from tests.tokenizer.test_huggingface import make
from tests.training.tiny import pretrain_rank
from tools import convert_checkpoint, evaluate, generate, preprocess_data

PIECES, VOCAB, HIDDEN, FFN, EXPERTS = 300, 320, 32, 48, 4
LAYERS, HEADS = 4, 4
RUN = [
    "--use-checkpoint-args --finetune --seq-length 64 --micro-batch-size 4 --global-batch-size 8",
    "--eval-iters 0 --lr-warmup-iters 0 --lr-decay-style constant --num-workers 0",
    "--log-interval 1 --device-peak-tflops 1 --split 90,10,0",
]
TRAIN = " ".join(RUN).split()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of text and conversations, and a SentencePiece model that was trained on them."""
    folder = tmp_path_factory.mktemp("texts")
    chats = [
        [
            {"role": "user", "content": f"What follows {i}?"},
            {"role": "assistant", "content": f"The number that follows {i} is {i + 1}."},
        ]
        for i in range(120)
    ]
    lines = [turn["content"] for chat in chats for turn in chat]
    (folder / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
    train(folder / "pieces.model", lines, vocab_size=PIECES)
    return {name: str(folder / name) for name in ("chat.jsonl", "text.jsonl", "pieces.model")}


def _released(directory: Path, tokenizer: str) -> None:
    """An OpenMoE in the layout of the released files: fields, names and shapes written out."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(3)

    def weights(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    tensors: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": weights(VOCAB, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": weights(VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix, is_moe = f"model.layers.{layer}", (layer + 1) % 2 == 0
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["pre_extra_mlp_layernorm"] if is_moe else []
        tensors |= {f"{prefix}.{norm}.weight": torch.ones(HIDDEN) for norm in norms}
        for part in "qkvo":
            tensors[f"{prefix}.self_attn.{part}_proj.weight"] = weights(HIDDEN, HIDDEN)
        dense = f"{prefix}.{'extra_mlp' if is_moe else 'mlp'}"
        tensors[f"{dense}.gate_proj.weight"] = weights(2 * FFN, HIDDEN)
        tensors[f"{dense}.up_proj.weight"] = weights(FFN, HIDDEN)
        tensors[f"{dense}.down_proj.weight"] = weights(HIDDEN, FFN)
        if is_moe:
            tensors[f"{prefix}.mlp.gate_weight"] = weights(EXPERTS, HIDDEN)
            tensors[f"{prefix}.mlp.experts.wi_gate"] = weights(EXPERTS, HIDDEN, 2 * FFN)
            tensors[f"{prefix}.mlp.experts.wi_up"] = weights(EXPERTS, HIDDEN, FFN)
            tensors[f"{prefix}.mlp.experts.wo"] = weights(EXPERTS, FFN, HIDDEN)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    fields: dict[str, Any] = {
        "architectures": ["OpenMoeForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "swiglu",
        "max_position_embeddings": 128,
        "vocab_size": VOCAB,
        "num_experts": EXPERTS,
        "moe_layer_interval": 2,
        "router_topk": 2,
    }
    (directory / "config.json").write_text(json.dumps(fields))
    (directory / "tokenizer.model").write_bytes(Path(tokenizer).read_bytes())


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]) -> Path:
    directory = tmp_path_factory.mktemp("released") / "hf"
    _released(directory, texts["pieces.model"])
    return directory


def _convert(*words: object) -> None:
    assert convert_checkpoint.main([str(word) for word in words]) == 0


def _pretrain(pool: Pool, folder: Path, *words: object) -> tuple[list[float], str]:
    """Losses and log of a run from its command line."""
    metrics = folder / "metrics.jsonl"
    argv = [*TRAIN, "--metrics-file", str(metrics), *map(str, words)]
    ((code, log, error),) = pool.run(pretrain_rank, 1, argv=argv)
    assert code == 0, error
    return [json.loads(line)["lm_loss"] for line in metrics.read_text().splitlines()], log


def _used(directory: Path, data: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Generate from a checkpoint and evaluate it, with no flag but the checkpoint's."""
    capsys.readouterr()
    generate.main(["--load", str(directory), "--prompt", "What follows", "--max-new-tokens", "3"])
    evaluate.main(["--load", str(directory), "--data-path", data, "--seq-length", "32"])
    return capsys.readouterr().out


def _data(folder: Path, texts: dict[str, str], kind: str, model: str) -> str:
    words = ["--input", texts["text.jsonl"], "--output-prefix", str(folder / "data")]
    words += ["--tokenizer-type", kind, "--tokenizer-model", model, "--append-eod"]
    preprocess_data.main(words)
    return str(folder / "data_text_document")


def test_released_weights_are_tuned_for_chat(
    released: Path,
    texts: dict[str, str],
    tmp_path: Path,
    pool: Pool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    native, tuned = tmp_path / "native", tmp_path / "tuned"
    _convert("--from", "hf", "--load", released, "--to", "native", "--save", native)
    assert "tokenizer: SentencePieceTokenizer" in capsys.readouterr().out
    words = ["--load", native, "--save", tuned, "--objective", "sft", "--train-iters", "20"]
    words += ["--data-path", texts["chat.jsonl"], "--lr", "3e-3"]
    losses, _ = _pretrain(pool, tmp_path, *words)
    assert len(losses) == 20 and losses[-1] < 0.7 * losses[0]
    data = _data(tmp_path, texts, "SentencePieceTokenizer", texts["pieces.model"])
    for directory in (native, tuned):
        found = _used(directory, data, capsys)
        assert "What follows" in found and "perplexity" in found
    # The trained checkpoint brings its tokenizer to the Hugging Face layout, byte for byte.
    _convert("--from", "native", "--load", tuned, "--to", "hf", "--save", tmp_path / "back")
    stored = (tmp_path / "back" / "tokenizer.model").read_bytes()
    assert stored == Path(texts["pieces.model"]).read_bytes()
    identity = build_tokenizer(RunConfig.load(tuned / "iter_0000020" / "config.json").data).identity
    assert read_identity(native).tokenizer_hash == read_identity(tuned).tokenizer_hash == identity


def test_an_unknown_tokenizer_is_accepted_recorded_and_reported(
    released: Path,
    texts: dict[str, str],
    tmp_path: Path,
    pool: Pool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((released / name).read_bytes())
    native, trained = tmp_path / "native", tmp_path / "trained"
    _convert("--from", "hf", "--load", bare, "--to", "native", "--save", native)
    said = capsys.readouterr().out
    assert "no tokenizer: none beside the weights; --tokenizer-model FILE" in said
    assert read_identity(native).tokenizer_hash == ""
    with pytest.raises(SystemExit):
        generate.main(["--load", str(native), "--prompt", "What"])
    assert "--tokenizer-model must be given" in capsys.readouterr().err
    words = ["--load", native, "--objective", "sft", "--data-path", texts["chat.jsonl"]]
    words += ["--train-iters", "1"]
    argv = [*TRAIN, *map(str, words)]
    ((code, _, error),) = pool.run(pretrain_rank, 1, argv=argv)
    assert code == 2 and "--tokenizer-model must be given" in error
    words += ["--tokenizer-type", "SentencePieceTokenizer"]
    words += ["--tokenizer-model", texts["pieces.model"], "--save", trained]
    _, log = _pretrain(pool, tmp_path, *words)
    assert log.count("the checkpoint does not record its tokenizer") == 1
    identity = build_tokenizer(RunConfig.load(trained / "iter_0000001" / "config.json").data)
    assert read_identity(trained).tokenizer_hash == identity.identity
    # From then on another tokenizer is an error.
    (tmp_path / "other").mkdir()
    other = make(tmp_path / "other", ["</s>"])
    words = ["--load", str(trained), "--prompt", "What", "--tokenizer-model", str(other)]
    with pytest.raises(SystemExit):
        generate.main([*words, "--tokenizer-type", "HuggingFaceTokenizer"])
    assert "the tokenizer of the checkpoint" in capsys.readouterr().err


def test_t5x_continues_with_adafactor(
    released: Path, texts: dict[str, str], tmp_path: Path, pool: Pool
) -> None:
    """The weights, in several files, by way of t5x, which records neither model nor tokenizer."""
    t5x, native, more = tmp_path / "t5x", tmp_path / "native", ("--max-shard-size", "0.0001")
    _convert("--from", "hf", "--load", released, "--to", "t5x", "--save", t5x)
    _convert("--from", "hf", "--load", released, "--to", "native", "--save", tmp_path / "sizes")
    config = tmp_path / "sizes" / "iter_0000000" / "config.json"
    words = ["--from", "t5x", "--load", t5x, "--config", config, *more]
    words += ["--tokenizer-model", texts["pieces.model"]]
    _convert(*words, "--to", "native", "--save", native)
    assert len(list(native.rglob("*.safetensors"))) > 2
    data = _data(tmp_path, texts, "SentencePieceTokenizer", texts["pieces.model"])
    words = ["--load", native, "--data-path", data, "--train-iters", "8", "--lr", "0.01"]
    words += ["--optimizer", "adafactor", "--save", tmp_path / "more"]
    losses, _ = _pretrain(pool, tmp_path, *words)
    assert losses[-1] < 0.9 * losses[0]
    assert dict(load_logical(tmp_path / "more", kind="variance"))


def test_an_upcycled_llama_is_trained(
    texts: dict[str, str], tmp_path: Path, pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bf16, with a Hugging Face tokenizer and a vocabulary that no usual multiple divides."""
    source, native = tmp_path / "llama", tmp_path / "native"
    llama(source, torch.bfloat16, vocab_size=403)
    names = {"eos_token": "</s>", "pad_token": "<pad>", "chat_template": "{{ messages }}"}
    make(source, ["<pad>", "</s>"], tokenizer_config=names)
    (source / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # of tiktoken, as Llama 3's
    words = ["--from", "hf", "--load", source, "--to", "native", "--save", native, "--upcycle"]
    _convert(*words, "shared", "--num-experts", "4", "--moe-layer-freq", "[0,1,1]")
    said = capsys.readouterr().out
    assert "tokenizer.model is not used" in said and "tiktoken" in said
    assert "tokenizer: HuggingFaceTokenizer" in said
    data = _data(tmp_path, texts, "HuggingFaceTokenizer", str(source / "tokenizer.json"))
    words = ["--load", native, "--data-path", data, "--train-iters", "6", "--lr", "3e-3"]
    losses, _ = _pretrain(pool, tmp_path, *words, "--save", tmp_path / "tuned")
    assert losses[-1] < losses[0]
    assert "perplexity" in _used(tmp_path / "tuned", data, capsys)
    stored = json.loads((tmp_path / "tuned/iter_0000006/tokenizer_config.json").read_text())
    assert stored == names
