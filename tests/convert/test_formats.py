"""Round trips between formats, bit by bit, and a forward pass that knows only the other format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.convert import model as convert_model
from megatron_moe.convert.formats import ConversionTarget, read, write
from megatron_moe.convert.inspection import check_same_tensors
from megatron_moe.convert.model import LogicalModel, average, cast
from megatron_moe.errors import UsageError
from megatron_moe.model.reference import ReferenceOpenMoE
from tests.convert.cases import CONFIG, VOCAB, model_of

Silent = lambda _: None  # noqa: E731


def through(model: LogicalModel, *targets: ConversionTarget) -> LogicalModel:
    """The model after a chain of formats."""
    for target in targets:
        write(model, target, Silent)
        model = read(target.format, target.path)
    return model


def same(found: LogicalModel, expected: LogicalModel) -> None:
    assert list(found.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(found.tensors[name].whole(), tensor.whole()), name
    assert (found.config.model, found.config.moe) == (expected.config.model, expected.config.moe)
    assert found.vocab_size == expected.vocab_size


@pytest.mark.parametrize("layout", ["stacked", "unstacked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard", [5 << 30, 4096])
def test_round_trips_are_bit_exact(
    tmp_path: Path, layout: Any, dtype: torch.dtype, max_shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_model, "PART_BYTES", 700)  # many parts of every tensor
    model = model_of(dtype=dtype)
    native = ConversionTarget(format="native", path=tmp_path / "native", max_shard=max_shard)
    hf = ConversionTarget(format="hf", path=tmp_path / "hf", layout=layout, max_shard=max_shard)
    back = ConversionTarget(format="native", path=tmp_path / "back")
    found = through(model, native, hf, back)
    same(found, model)
    files = list((tmp_path / "hf").glob("*.safetensors"))
    assert (len(files) > 3) == (max_shard == 4096)
    assert check_same_tensors(model, found, Silent) == len(model.tensors)


def rms(x: Tensor, scale: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale


def turned(x_NSD: Tensor, base: float) -> Tensor:
    """Rotate-half as Hugging Face's Llama does it."""
    steps, width = x_NSD.shape[1:]
    frequency = 1.0 / base ** (torch.arange(0, width, 2).double() / width)
    angle = torch.outer(torch.arange(steps).double(), frequency)
    angle = torch.cat((angle, angle), -1)
    first, second = x_NSD.chunk(2, -1)
    return x_NSD * angle.cos() + torch.cat((-second, first), -1) * angle.sin()


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Matrices [in, out]; the first half of the gate is linear."""
    linear, gating = (x @ gate).chunk(2, -1)
    return (linear * F.silu(gating) * (x @ up)) @ down


def by_hand(values: dict[str, Tensor], config: dict[str, Any], ids: Tensor) -> Tensor:
    """Logits from the files of the stacked layout, written out token by token; nothing drops."""
    w = {name: tensor.double() for name, tensor in values.items()}
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    x = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = rms(x, w[p + "input_layernorm.weight"])
        q, k, v = (
            (h @ w[f"{p}self_attn.{n}_proj.weight"].T).unflatten(-1, (count, -1)).transpose(0, 1)
            for n, count in (("q", heads), ("k", shared), ("v", shared))
        )
        k, v = (t[[head // (heads // shared) for head in range(heads)]] for t in (k, v))
        scores = turned(q, config["rope_theta"]) @ turned(k, config["rope_theta"]).mT
        scores = scores + torch.full(scores.shape[1:], -torch.inf).triu(1)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + mixed @ w[p + "self_attn.o_proj.weight"].T
        h = rms(x, w[p + "post_attention_layernorm.weight"])
        if (i + 1) % config["moe_layer_interval"]:
            x = x + gated(h, *(w[f"{p}mlp.{n}_proj.weight"].T for n in ("gate", "up", "down")))
            continue
        probs = (h @ w[p + "mlp.gate_weight"].T).softmax(-1)
        out = torch.zeros_like(x)
        for t in range(len(ids)):
            for expert in probs[t].topk(config["router_topk"]).indices.tolist():
                e = (w[f"{p}mlp.experts.{n}"][expert] for n in ("wi_gate", "wi_up", "wo"))
                out[t] += probs[t, expert] * gated(h[t], *e)
        x = x + out
        h = rms(x, w[p + "pre_extra_mlp_layernorm.weight"])
        x = x + gated(h, *(w[f"{p}extra_mlp.{n}_proj.weight"].T for n in ("gate", "up", "down")))
    return rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("groups", [3, 1])
def test_a_forward_pass_over_the_other_format_gives_our_logits(tmp_path: Path, groups: int) -> None:
    shared = {"group_query_attention": groups < 3, "num_query_groups": 1}
    run = replace(CONFIG, model=replace(CONFIG.model, **shared))  # type: ignore[arg-type]
    model = model_of(run)
    write(model, ConversionTarget(format="hf", path=tmp_path / "hf"), Silent)
    values = load_file(tmp_path / "hf/model.safetensors")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    ids = torch.tensor([5, 90, 3, 3, 41, 17, 8, 66])
    moe = replace(CONFIG.moe, moe_eval_capacity_factor=None)
    ours = ReferenceOpenMoE(run.model, moe, VOCAB, seed=None)
    ours.load_logical((name, tensor.whole()) for name, tensor in model.tensors.items())
    same(read("hf", tmp_path / "hf"), model)
    with torch.no_grad():
        logits = ours.eval()(ids[None], training_capacity=False).logits[0]
    torch.testing.assert_close(logits.double(), by_hand(values, config, ids), rtol=1e-4, atol=1e-4)


def test_the_unstacked_layout_holds_each_expert_transposed(tmp_path: Path) -> None:
    model = model_of()
    write(model, ConversionTarget(format="hf", path=tmp_path / "hf", layout="unstacked"), Silent)
    values = load_file(tmp_path / "hf/model.safetensors")
    gate = model.tensors["layers.1.moe.experts.gate"].whole()
    assert torch.equal(values["model.layers.1.mlp.experts.2.gate_proj.weight"], gate[2].T)
    router = model.tensors["layers.3.moe.router.weight"].whole()
    assert torch.equal(values["model.layers.3.mlp.gate.weight"], router)


def test_pytorch_s_own_files_are_read_too(tmp_path: Path) -> None:
    model = model_of()
    write(model, ConversionTarget(format="hf", path=tmp_path / "hf"), Silent)
    values = load_file(tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/model.safetensors").unlink()
    names = sorted(values)
    where = {}
    for number, part in enumerate((names[:9], names[9:])):
        file = f"pytorch_model-{number}.bin"
        torch.save({name: values[name] for name in part}, tmp_path / "hf" / file)
        where |= dict.fromkeys(part, file)
    index = {"weight_map": where}
    (tmp_path / "hf/pytorch_model.bin.index.json").write_text(json.dumps(index))
    same(read("hf", tmp_path / "hf"), model)


def test_a_file_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    write(model_of(), ConversionTarget(format="hf", path=tmp_path / "hf"), Silent)
    (tmp_path / "hf/model.safetensors").unlink()
    torch.save({"model.norm.weight": Hostile()}, tmp_path / "hf/pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pytorch_model\.bin"):
        read("hf", tmp_path / "hf")
    assert not (tmp_path / "ran").exists()


def test_casts_round_and_averages_are_means(tmp_path: Path) -> None:
    models = [model_of(seed=seed, step=seed) for seed in (1, 2, 6)]
    targets = [ConversionTarget(format="native", path=tmp_path / str(i)) for i in range(3)]
    paths = [write(m, t, Silent) for m, t in zip(models, targets, strict=True)]
    assert paths[2].name == "iter_0000006"
    mean = cast(average(read("native", target.path) for target in targets), "bf16")
    for name, tensor in mean.tensors.items():
        each = torch.stack([model.tensors[name].whole().double() for model in models])
        assert torch.equal(tensor.whole(), each.mean(0).float().bfloat16()), name
    assert mean.step == 6
    other = replace(CONFIG, moe=replace(CONFIG.moe, moe_router_topk=1))
    with pytest.raises(UsageError, match="another model"):
        average([models[0], model_of(other)])


def test_a_source_keeps_its_older_steps(tmp_path: Path) -> None:
    target = ConversionTarget(format="native", path=tmp_path)
    for step in (3, 8):
        write(model_of(step=step, seed=step), target, Silent)
    same(read("native", tmp_path, 3), model_of(seed=3))
    same(read("native", tmp_path), model_of(seed=8))


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("moe", {"moe_router_type": "toy"}, "--moe-router-type must be 'linear'"),
    ],
)
def test_what_the_other_format_cannot_say_is_refused(
    tmp_path: Path, section: str, change: dict[str, Any], named: str
) -> None:
    config = replace(CONFIG, **{section: replace(getattr(CONFIG, section), **change)})
    with pytest.raises(UsageError, match=named):
        write(model_of(config), ConversionTarget(format="hf", path=tmp_path / "hf"), Silent)
    assert list(tmp_path.iterdir()) == []


def _edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act in .* must be 'swiglu' or 'silu' \(got 'gelu'\)"),
        (
            {"num_key_value_heads": 2},
            r"num_key_value_heads .* must be a divisor of num_attention_heads \(3\) \(got 2\)",
        ),
        ({"num_key_value_heads": 1}, r"key_value_heads under megatron_moe .* must be 1 .* \(got 3"),
        ({"tie_word_embeddings": True}, "untie_embeddings_and_output_weights under megatron_moe"),
        ({"num_experts": "4"}, r"num_experts .* must be an integer from 1 to 65536 \(got '4'\)"),
        ({"architectures": ["MixtralForCausalLM"]}, "architectures"),
        ({"num_experts": 8}, "num_experts under megatron_moe"),
        ({"rms_norm_eps": 0.5}, "norm_epsilon under megatron_moe"),
        ({"max_position_embeddings": 128}, "max_position_embeddings under megatron_moe"),
        ({"router_capacity_factor_train": 1.5}, "router_capacity_factor_train .* as under megat"),
        ({"router_aux_loss_factor": 0.75}, "router_aux_loss_factor .* as under megatron_moe"),
        ({"z_loss_factor": 0.75}, "z_loss_factor .* as under megatron_moe"),
        ({"dropout_rate": 0.75}, "dropout_rate .* as under megatron_moe"),
        ({"router_capacity_factor_eval": 3.0}, "router_capacity_factor_eval .* as under megatron_"),
        ({"router_min_capacity": 7}, "router_min_capacity .* as under megatron_moe"),
    ],
)
def test_another_configuration_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    write(model_of(), ConversionTarget(format="hf", path=tmp_path / "hf"), Silent)
    _edit(tmp_path / "hf/config.json", **changes)
    with pytest.raises(UsageError, match=said):
        read("hf", tmp_path / "hf")


def test_a_released_configuration_without_our_field_is_read(tmp_path: Path) -> None:
    """As the published files are: the pattern and sizes come from their own fields."""
    write(model_of(), ConversionTarget(format="hf", path=tmp_path / "hf"), Silent)
    path = tmp_path / "hf/config.json"
    values = json.loads(path.read_text())
    del values["megatron_moe"]
    path.write_text(json.dumps(values))
    found = read("hf", tmp_path / "hf")
    assert found.config.model == replace(CONFIG.model, zero_padding_activations=True)
    released = {"moe_capacity_rule": "t5x", "moe_router_load_balancing_type": "group_aux_loss"}
    released["moe_ignore_padding_tokens"] = False
    assert found.config.moe == replace(CONFIG.moe, **released)


def test_damaged_and_missing_tensors_are_named(tmp_path: Path) -> None:
    write(model_of(), ConversionTarget(format="hf", path=tmp_path / "hf"), Silent)
    file = tmp_path / "hf/model.safetensors"
    whole, values = file.read_bytes(), load_file(file)
    for change, said in (
        ({"model.norm.weight": None}, r"without model\.norm\.weight"),
        (
            {"model.norm.weight": torch.ones(4)},
            r"shape of model\.norm\.weight .* must be \[16\] \(got \[4\]\)",
        ),
        ({"model.extra": torch.ones(4)}, "the model alone .*also has model.extra"),
    ):
        kept = {k: v for k, v in {**values, **change}.items() if v is not None}
        save_file(kept, file)
        with pytest.raises(UsageError, match=said):
            read("hf", tmp_path / "hf")
    file.write_bytes(whole[:-7])
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        read("hf", tmp_path / "hf")
    file.unlink()
    with pytest.raises(UsageError, match="without weights"):
        read("hf", tmp_path / "hf")


def test_a_difference_is_found(tmp_path: Path) -> None:
    model = model_of()
    write(model, ConversionTarget(format="hf", path=tmp_path / "hf"), Silent)
    file = tmp_path / "hf/model.safetensors"
    values = load_file(file)
    values["model.layers.1.mlp.experts.wo"][3, 5, 2] += 1e-6
    save_file(values, file)
    with pytest.raises(
        UsageError,
        match=r"layers\.1\.moe\.experts\.down .* must be those of .* 'other torch\.float32",
    ):
        check_same_tensors(model, read("hf", tmp_path / "hf"), Silent)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of a file's size stands for the disk: the same error at the same call."""
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        for name in ("native", "hf"):
            with pytest.raises(
                UsageError, match=r"writable directory with \d+ bytes of free space"
            ):
                write(model_of(), ConversionTarget(format=name, path=tmp_path / name), Silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert not (tmp_path / "hf").exists()
