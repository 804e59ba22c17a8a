"""The modelling file that is exported with weights, in `transformers`, against the reference."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_moe.convert.formats import read
from megatron_moe.convert.hf import hf_name
from tests.convert.cases import CONFIG, VOCAB
from tests.convert.exported import VARIANTS, export, reference_of, varied

TOKENS = torch.randint(2, VOCAB, (3, 11), generator=torch.Generator().manual_seed(8))


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, **options
    ).eval()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["stacked", "unstacked"])
def test_loss_logits_and_gradients_are_the_reference_s(
    tmp_path: Path, variant: str, layout: Any
) -> None:
    """In fp64, so that a wrong factor anywhere stands out."""
    model = export(tmp_path / "hf", varied(VARIANTS[variant]), layout)
    theirs, ours = load(tmp_path / "hf").double(), reference_of(model, torch.float64)
    found = theirs(TOKENS, labels=TOKENS, output_router_logits=True, use_cache=False)
    labels, scored = TOKENS.roll(-1, 1), torch.ones(TOKENS.shape, dtype=torch.float64)
    scored[:, -1] = 0.0
    expected = ours(TOKENS, labels, scored, training_capacity=False)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.aux_loss.double(), expected.aux_loss)
    torch.testing.assert_close(found.router_z_loss.double(), expected.router_z_loss)
    assert len(found.router_logits) == len(expected.routing)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-9, atol=1e-9)
    found.loss.backward()
    expected.loss.backward()
    gradients = {name: each.grad for name, each in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        right = _theirs(name, layout, gradients)
        torch.testing.assert_close(parameter.grad, right, rtol=1e-7, atol=1e-9, msg=name)


EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


def _theirs(name: str, layout: Any, gradients: dict[str, Tensor | None]) -> Tensor | None:
    """The gradient of the logical tensor, or of the expert, that has a name in the layout."""
    found = EXPERT.fullmatch(name)
    if found:
        stack = gradients[f"layers.{found[1]}.moe.experts.{found[3]}"]
        return None if stack is None else stack[int(found[2])].T
    names = {hf_name(logical, layout): logical for logical in gradients}
    return gradients[names[name]]


def test_without_router_outputs_the_loss_is_the_cross_entropy(tmp_path: Path) -> None:
    """By hand, with positions that have no target; and divided as a trainer asks."""
    export(tmp_path / "hf", CONFIG)
    theirs = load(tmp_path / "hf")
    labels = TOKENS.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        found = theirs(TOKENS, labels=labels)
    logs = found.logits.double().log_softmax(-1)
    scored = [
        -logs[row, at - 1, labels[row, at]].item()
        for row in range(3)
        for at in range(1, 11)
        if labels[row, at] != -100
    ]
    assert found.loss.item() == pytest.approx(sum(scored) / len(scored), rel=1e-5)
    with torch.no_grad():
        part = theirs(TOKENS, labels=labels, num_items_in_batch=100)
    assert part.loss.item() == pytest.approx(sum(scored) / 100, rel=1e-5)
    assert found.router_logits is None


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_with_a_cache_is_the_reference_s_token_by_token(
    tmp_path: Path, variant: str, attention: str
) -> None:
    model = export(tmp_path / "hf", varied(VARIANTS[variant]))
    theirs, ours = load(tmp_path / "hf", attn_implementation=attention), reference_of(model)
    found = theirs.generate(
        TOKENS,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    rows = TOKENS
    for step in found.logits:
        with torch.no_grad():
            logits = ours(rows, training_capacity=False).logits[:, -1]
        torch.testing.assert_close(step, logits, rtol=1e-4, atol=1e-4)
        rows = torch.cat((rows, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(found.sequences, rows)
    with torch.no_grad():
        assert theirs(TOKENS, output_attentions=True).attentions[1].sum(-1).allclose(torch.ones(()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(tmp_path: Path, side: str) -> None:
    """Rows of a batch padded to one length have the logits of each row alone."""
    export(tmp_path / "hf", CONFIG)
    theirs, lengths = load(tmp_path / "hf"), (4, 11, 7)
    padded, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    places = [slice(11 - n, 11) if side == "left" else slice(0, n) for n in lengths]
    for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
        padded[row, place], mask[row, place] = TOKENS[row, :n], 1
    with torch.no_grad():
        together = theirs(padded, attention_mask=mask, labels=padded, output_router_logits=True)
        alone = [theirs(TOKENS[row : row + 1, :n]).logits[0] for row, n in enumerate(lengths)]
        routers = [
            theirs(TOKENS[row : row + 1, :n], output_router_logits=True)
            for row, n in enumerate(lengths)
        ]
    for row, place in enumerate(places):
        torch.testing.assert_close(together.logits[row, place], alone[row], rtol=1e-4, atol=1e-4)
    # The balance loss is a mean over rows, the z-loss over tokens; padding is in neither.
    assert together.aux_loss.item() == pytest.approx(
        sum(each.aux_loss.item() for each in routers) / 3, rel=1e-4
    )
    z_losses = [each.router_z_loss.item() * n for each, n in zip(routers, lengths, strict=True)]
    assert together.router_z_loss.item() == pytest.approx(sum(z_losses) / sum(lengths), rel=1e-4)
    if side == "left":
        batch = theirs.generate(
            padded, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        for row, n in enumerate(lengths):
            single = theirs.generate(
                TOKENS[row : row + 1, :n], max_new_tokens=6, do_sample=False, eos_token_id=None
            )
            assert batch[row, 11:].tolist() == single[0, n:].tolist()


@pytest.mark.parametrize("rule", ["t5x", "port", "megatron"])
@pytest.mark.parametrize("policy", ["position", "probs"])
def test_with_a_capacity_the_same_choices_are_dropped(
    tmp_path: Path, rule: str, policy: str
) -> None:
    changes = {
        "moe_capacity_rule": rule,
        "moe_token_drop_policy": policy,
        "moe_eval_capacity_factor": 0.8,
        "moe_expert_capacity_factor": 0.4,
        "moe_min_capacity": 1,
        "moe_router_load_balancing_type": "group_aux_loss",
        "moe_loss_convention": "megatron",
    }
    model = export(tmp_path / "hf", varied(changes))
    ours = reference_of(model)
    ours.moe = model.config.moe
    for block in ours.layers:
        if block.moe is not None:
            block.moe.moe = model.config.moe
    for capacity in ("eval", "train"):
        theirs = load(tmp_path / "hf", moe_capacity=capacity)
        with torch.no_grad():
            found = theirs(TOKENS, labels=TOKENS, output_router_logits=True)
            labels, scored = TOKENS.roll(-1, 1), torch.ones(TOKENS.shape)
            scored[:, -1] = 0.0
            right = ours(TOKENS, labels, scored, training_capacity=capacity == "train")
        assert not all(each.kept_TK.all() for each in right.routing)
        torch.testing.assert_close(found.logits, right.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.aux_loss, right.aux_loss)
        torch.testing.assert_close(found.loss, right.loss, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="moe_capacity must be 'dropless' with padding or a c"):
            theirs(TOKENS, use_cache=True)
        with pytest.raises(ValueError, match="moe_capacity must be 'dropless'"):
            theirs(TOKENS, attention_mask=torch.ones_like(TOKENS).tril(3))
        generate = {"max_new_tokens": 2, "use_cache": False, "do_sample": False}
        if rule != "t5x":
            with pytest.raises(ValueError, match=r"generate must get one row \(got 3\)"):
                theirs.generate(TOKENS, eos_token_id=None, **generate)
        first = theirs.generate(TOKENS[:1], eos_token_id=None, **generate)
        assert first.shape == (1, 13)


def test_bf16_is_the_reference_s(tmp_path: Path) -> None:
    model = export(tmp_path / "hf", CONFIG)
    theirs = load(tmp_path / "hf", dtype=torch.bfloat16)
    ours = reference_of(model, torch.bfloat16)
    with torch.no_grad():
        found = theirs(TOKENS).logits
        expected = ours(TOKENS, training_capacity=False).logits
    assert found.dtype == expected.dtype == torch.float32
    assert theirs.model.embed_tokens.weight.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["stacked", "unstacked"])
@pytest.mark.parametrize("variant", ["released", "paper", "widths"])
def test_a_saved_model_is_loaded_again_by_both(tmp_path: Path, layout: Any, variant: str) -> None:
    model = export(tmp_path / "hf", varied(VARIANTS[variant]), layout)
    theirs = load(tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, theirs(TOKENS).logits)
    back = read("hf", tmp_path / "again")
    assert (back.config.model, back.config.moe) == (model.config.model, model.config.moe)
    for name, tensor in model.tensors.items():
        assert torch.equal(back.tensors[name].whole(), tensor.whole()), name


def test_training_features_change_no_number(tmp_path: Path) -> None:
    """Checkpointed activations, and a vocabulary that grows and keeps the fp32 logits."""
    export(tmp_path / "hf", CONFIG)
    theirs, gradients = load(tmp_path / "hf").train(), []
    for checkpointing in (False, True):
        if checkpointing:
            theirs.gradient_checkpointing_enable()
        theirs.zero_grad()
        theirs(TOKENS, labels=TOKENS, output_router_logits=True).loss.backward()
        gradients.append([each.grad.clone() for each in theirs.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    theirs = load(tmp_path / "hf", dtype=torch.bfloat16)
    with torch.no_grad():
        before = theirs(TOKENS).logits
        theirs.resize_token_embeddings(VOCAB + 8)
        after = theirs(TOKENS, logits_to_keep=2).logits
    assert after.dtype == torch.float32
    assert torch.equal(after[..., :VOCAB], before[:, -2:])
    assert math.prod(after.shape) == 3 * 2 * (VOCAB + 8)


def test_a_released_configuration_gets_the_released_variant(tmp_path: Path) -> None:
    """`config.json` as published, without any field of ours: its own fields say everything."""
    import json

    model = export(tmp_path / "hf", varied({"moe_capacity_rule": "t5x"}))
    path = tmp_path / "hf/config.json"
    ours = {"megatron_moe", "expert_layout", "moe_capacity", "attention_dropout"}
    values = {k: v for k, v in json.loads(path.read_text()).items() if k not in ours}
    path.write_text(json.dumps(values))
    reference = reference_of(replace(model, config=CONFIG))
    with torch.no_grad():
        found = load(tmp_path / "hf")(TOKENS).logits
        expected = reference(TOKENS, training_capacity=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_row_in_pieces_is_the_whole_row(tmp_path: Path) -> None:
    """With the cache and no positions given: pieces of several tokens, and of one."""
    export(tmp_path / "hf", CONFIG)
    theirs, cache, found = load(tmp_path / "hf"), None, []
    with torch.no_grad():
        for piece in TOKENS.split([4, 5, 1, 1], dim=1):
            output = theirs(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
        torch.testing.assert_close(torch.cat(found, 1), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pieces", [[11], [3, 3, 5]])
@pytest.mark.parametrize("padding", [0, 2])
def test_a_cache_of_fixed_size_is_the_whole_row(
    tmp_path: Path, pieces: list[int], padding: int
) -> None:
    """Longer than the row, whole and in pieces, with and without padding before it."""
    from transformers import StaticCache

    export(tmp_path / "hf", CONFIG)
    theirs, found, end = load(tmp_path / "hf"), [], 0
    cache = StaticCache(config=theirs.config, max_cache_len=16)
    mask = torch.ones_like(TOKENS)
    mask[:, :padding] = 0
    with torch.no_grad():
        for piece in TOKENS.split(pieces, dim=1):
            end += piece.shape[1]
            output = theirs(piece, attention_mask=mask[:, :end], past_key_values=cache)
            found.append(output.logits)
        whole = theirs(TOKENS[:, padding:]).logits
    torch.testing.assert_close(torch.cat(found, 1)[:, padding:], whole, rtol=1e-4, atol=1e-4)


def test_layers_on_several_devices_get_what_they_share() -> None:
    """As `accelerate` moves the arguments of a layer; the losses are on the mask's device."""
    from accelerate.utils import send_to_device

    from megatron_moe.convert.modeling.configuration_openmoe import OpenMoeConfig
    from megatron_moe.convert.modeling.modeling_openmoe import Step, router_losses

    x, cache = torch.ones(2), object()
    step: Any = Step(x, x, None, 3, x, cache, False)
    moved = send_to_device((x, step), "meta")[1]
    assert {each.device.type for each in (moved.cos, moved.sin, moved.valid)} == {"meta"}
    assert (moved.mask, moved.past, moved.cache, step.cos.device.type) == (None, 3, cache, "cpu")
    valid = torch.ones(2, 3, dtype=torch.bool, device="meta")
    losses = router_losses(OpenMoeConfig(num_experts=4), (torch.ones(6, 4),), valid)
    assert {each.device.type for each in losses} == {"meta"}


def test_values_given_to_from_pretrained_are_checked(tmp_path: Path) -> None:
    export(tmp_path / "hf", CONFIG)
    said = r"moe_capacity in config.json must be 'dropless' or 'eval' or 'train' \(got 'evaluation'"
    with pytest.raises(ValueError, match=said):
        load(tmp_path / "hf", moe_capacity="evaluation")
    theirs = load(tmp_path / "hf")
    theirs.config.moe_capacity = "evaluation"
    with pytest.raises(ValueError, match=said):
        theirs(TOKENS)
