"""Parsers of settings, data and tokenizers."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import zstandard
from pyarrow import parquet

from megatron_moe.config import DataConfig, RunConfig
from megatron_moe.config.cli import all_flags
from megatron_moe.config.phases import read_phases
from megatron_moe.config.validate import validate
from megatron_moe.config.words import split, translate
from megatron_moe.data.blend import blends_of
from megatron_moe.data.indexed.cache import IndexCache
from megatron_moe.data.indexed.check import inspect_source
from megatron_moe.data.indexed.manifest import Manifest, Origin, read_manifest, write_manifest
from megatron_moe.data.indexed.scan import scan_source
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.data.named_mixture import read_named_mixture
from megatron_moe.data.objectives.chat import read_line
from megatron_moe.data.objectives.denoiser import OPENMOE, read_denoisers
from megatron_moe.data.preprocess.inputs import cut, find_inputs
from megatron_moe.data.preprocess.reading import read_batches
from megatron_moe.errors import raise_errors
from megatron_moe.inference.prompts import read_prompts
from megatron_moe.text import argument_text
from megatron_moe.tokenizer.build import build_tokenizer
from tests.data.pieces import train
from tests.fuzz.target import HOSTILE, Opened, Target, with_values

SENTENCES = [f"the {word} of text {i} wörd\n" for i in range(60) for word in ("sum", "end", "cat")]


def _file(name: str, content: bytes | str, read: Callable[[Path], object]) -> Any:
    """A target whose file has this content."""

    def make(folder: Path) -> Opened:
        file = folder / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return Opened(file, lambda: read(file))

    return make


def _settings() -> str:
    return json.dumps(RunConfig().to_dict())


def _load(file: Path) -> None:
    validate(RunConfig.load(file))


PHASES = """
[[stage]]
name = "one"
until-iteration = 10
lr = 1e-3
data-path = ["1", "a", 2, "b"]
[[stage]]
name = "two"
"""
MIXTURE = '[domains]\nc4 = "web"\n[[source]]\ndomain = "c4"\nprefix = "c4_text"\nweight = 15\n'


FLAGS = all_flags()


def _words(file: Path) -> None:
    words = file.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    raise_errors(translate(split([argument_text("word", word) for word in words]), FLAGS).errors)


def _manifest(folder: Path) -> Opened:
    origin = Origin(path="a.jsonl", size=9, hash="00", start=0, end=9)
    made = Manifest(
        tokenizer="ByteTokenizer",
        tokenizer_hash="x",
        vocab_size=300,
        key="text",
        append_eod=True,
        text_documents="file",
        domain="c4",
        inputs=(origin,),
        documents=2,
        sequences=2,
        tokens=9,
    )
    write_manifest(str(folder / "a"), made)

    def read() -> None:
        found = read_manifest(str(folder / "a"))
        assert found is not None
        assert found.tokens_per_byte + found.vocab_size + len(found.key + str(found.domain)) >= 0
        assert sum(part.end - part.start for part in found.inputs) is not None

    return Opened(folder / "a.json", read)


def _indexed(suffix: str) -> Callable[[Path], Opened]:
    def make(folder: Path) -> Opened:
        prefix = str(folder / "a")
        with IndexedWriter(prefix, 300) as writer:
            ids, lengths = np.arange(40, dtype=np.int32), np.array([10, 0, 30])
            writer.add_documents(ids, lengths, np.array([1, 2]))

        def read() -> None:
            source = inspect_source(prefix)
            scan_source(source)
            assert len(source.document_bounds()) + len(source.lengths())

        return Opened(folder / f"a{suffix}", read)

    return make


def _cache(name: str) -> Callable[[Path], Opened]:
    def make(folder: Path) -> Opened:
        cache = IndexCache(str(folder))

        def read() -> None:
            for values in cache.arrays("e", {}, lambda: [np.arange(9)]):
                assert values.sum() < 1 << 70
            cache.record("r", lambda: {"n": 3})

        read()
        return Opened(folder / name, read)

    return make


def _documents(file: Path) -> None:
    (slices,) = cut(find_inputs([str(file)]), 1)
    for piece in slices:
        for batch in read_batches(piece, ["text"], "block"):
            for _ in batch.documents(["text"]):
                pass


LINES = "".join(json.dumps({"text": text}) + "\n" for text in SENTENCES[:20]).encode()


def _parquet(folder: Path) -> Opened:
    parquet.write_table(pyarrow.table({"text": SENTENCES[:20]}), folder / "a.parquet")
    return Opened(folder / "a.parquet", lambda: _documents(folder / "a.parquet"))


def _chat(file: Path) -> None:
    for line in file.read_bytes().split(b"\n"):
        for exchange in read_line(line, "messages", "a line"):
            (exchange.prompt + exchange.answer).encode()


TURNS = [{"role": role, "content": "a b"} for role in ("system", "user", "assistant")]
CHAT = json.dumps({"messages": TURNS})


def _prompts(file: Path) -> None:
    for prompt in read_prompts(str(file)):
        prompt.encode()


def _use(data: DataConfig) -> None:
    tokenizer = build_tokenizer(data)
    tokenizer.enable_fast_encode()
    tokenizer.enable_word_cache()
    ids = tokenizer.encode("the end of wörd\n  x".encode())
    tokenizer.detokenize([*ids.tolist(), tokenizer.eod])
    assert tokenizer.eod >= 0


def _sentencepiece(folder: Path) -> Opened:
    data = train(folder / "tokenizer.model", SENTENCES, vocab_size=288, model_type="unigram")
    return Opened(folder / "tokenizer.model", lambda: _use(data))


_NO_VOCABULARY = b"""{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
"normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
"decoder": null, "model": {"type": "WordLevel", "vocab": {}, "unk_token": "<unk>"}}"""


def _huggingface(name: str) -> Callable[[Path], Opened]:
    def make(folder: Path) -> Opened:
        from tokenizers import Tokenizer, models, pre_tokenizers

        vocabulary = {word: i for i, word in enumerate(["</s>", "<unk>", *"theundofcat"])}
        made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.add_special_tokens(["</s>", "<unk>"])
        made.save(str(folder / "tokenizer.json"))
        config = {"eos_token": "</s>", "unk_token": {"content": "<unk>"}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        data = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))
        return Opened(folder / name, lambda: _use(data))

    return make


def _gpt2(name: str) -> Callable[[Path], Opened]:
    def make(folder: Path) -> Opened:
        from tokenizers import pre_tokenizers

        pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "<|endoftext|>"]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
        data = DataConfig(
            tokenizer_type="GPT2BPETokenizer",
            vocab_file=str(folder / "vocab.json"),
            merge_file=str(folder / "merges.txt"),
        )
        return Opened(folder / name, lambda: _use(data))

    return make


def _blend(file: Path) -> None:
    blends_of(DataConfig(data_args_path=str(file)))


def _targets() -> Sequence[Target]:
    denoisers = OPENMOE.read_text()
    phases = (*HOSTILE, *with_values('[[stage]]\nname = "a"\nlr = @\n'))
    mixtures = (*HOSTILE, *with_values(MIXTURE.replace("15", "@")))
    chat = with_values(CHAT.replace('"a b"', "@"), '"\\ud83d"')
    prompts = with_values('{"prompt": @}', '"\\ud83d"')
    documents = with_values('{"text": @}', '"\\ud83d"')
    return [
        Target("run-config", _file("config.json", _settings(), _load),
               (*HOSTILE, *with_values('{"train": {"seed": @}, "optimizer": {"lr": @}}'))),
        Target("command-line", _file("words", "--lr\n1e-3\n--num-layers=4", _words),
               (*with_values("--num-layers\n@"), *with_values("--lr=@"), b"--\x1b]0;x\x07")),
        Target("phases", _file("phases.toml", PHASES, lambda f: read_phases(str(f))), phases),
        Target("mixture", _file("m.toml", MIXTURE, lambda f: read_named_mixture(str(f), None)),
               mixtures),
        Target("denoisers", _file("ul2.toml", denoisers, lambda f: read_denoisers(str(f))),
               (*HOSTILE, *with_values(denoisers.replace("weight = 1", "weight = @")))),
        Target("data-args", _file("args", "0.5 a 0.5 b", _blend), (*HOSTILE, b"1e999 a", b"a\0b")),
        Target("data-manifest", _manifest, HOSTILE),
        Target("indexed-idx", _indexed(".idx"), HOSTILE),
        Target("indexed-bin", _indexed(".bin")),
        Target("index-cache-npy", _cache("e/0.npy")),
        Target("index-cache-record", _cache("r/record.json"), HOSTILE),
        Target("documents-jsonl", _file("a.jsonl", LINES, _documents), (*HOSTILE, *documents)),
        Target("documents-gzip", _file("a.jsonl.gz", gzip.compress(LINES), _documents)),
        Target("documents-zstd", _file("a.jsonl.zst", zstandard.compress(LINES), _documents)),
        Target("documents-parquet", _parquet),
        Target("documents-text", _file("a.txt", b"one\n\ntwo\n", _documents), HOSTILE),
        Target("chat", _file("chat.jsonl", CHAT, _chat), (*HOSTILE, *chat)),
        Target("prompts-jsonl", _file("p.jsonl", '{"prompt": "a"}', _prompts),
               (*HOSTILE, *prompts)),
        Target("prompts-text", _file("p.txt", "one\ntwo\n", _prompts), HOSTILE),
        Target("sentencepiece", _sentencepiece),
        Target("tokenizer-json", _huggingface("tokenizer.json"), (*HOSTILE, _NO_VOCABULARY)),
        Target("tokenizer-config", _huggingface("tokenizer_config.json"), HOSTILE),
        Target("gpt2-vocab", _gpt2("vocab.json"), HOSTILE),
        Target("gpt2-merges", _gpt2("merges.txt"), HOSTILE),
    ]  # fmt: skip


TARGETS = _targets()
