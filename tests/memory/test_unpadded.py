"""Padded batches, packed: the same numbers for every family, padding not computed, routes at their tokens."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import PreTrainedModel

from tests.families import ALL_FAMILIES, FAMILIES
from tests.moe.ep_cases import OperatorSpy
from tests.trainers.exact_head import ExactLogProbs
from xtuner_hf._compat import add_fused_lm_head
from xtuner_hf.memory.unpadded import UnpaddedModel, scores_unpadded
from xtuner_hf.moe.replay import NATIVE, RouteRecorder, RouteReplay, RouterMap

B, S = 4, 17
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def batch() -> dict[str, torch.Tensor]:
    """Prompts padded on the left and answers on the right, as GRPO has them; one row without padding."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(B, S, dtype=torch.long)
    for row, (left, right) in enumerate([(3, 2), (0, 7), (0, 0), (7, 0)]):
        mask[row, :left] = mask[row, S - right :] = 0
    ids = torch.randint(2, 128, (B, S), generator=generator)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :9] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(model: PreTrainedModel, wrapped, **inputs):
    """Results by position, and gradients of a loss that weighs every token differently."""
    model.zero_grad()
    outputs = wrapped(**inputs, fused_lm_head=True, use_cache=False)
    weights = torch.linspace(-1, 2, outputs.log_probs.numel(), dtype=outputs.log_probs.dtype).view(B, S - 1)
    ((outputs.log_probs + 0.3 * outputs.entropy) * weights).sum().backward()
    values = {name: outputs[name].detach() for name in OUTPUTS} | {"loss": outputs.loss.detach()}
    return values, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        worst = (found[name].double() - tensor.double()).abs().max()
        assert worst <= tolerance * max(1.0, float(tensor.double().abs().max())), name


def ready(family: str, dtype: torch.dtype) -> PreTrainedModel:
    model = ALL_FAMILIES[family].ours(dtype, kernel="xtuner_reference").train()
    add_fused_lm_head(model, outputs=OUTPUTS)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_equals_the_padded_batch(family, dtype, tolerance, monkeypatch):
    """With the positions that `generate` gives a padded batch."""
    if dtype == torch.float64:  # TRL's kernel returns fp32
        monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", ExactLogProbs)
    model, inputs = ready(family, dtype), batch()
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = run(model, model, **inputs, position_ids=positions)
    found = run(model, UnpaddedModel(model), **inputs)
    assert_close(found[0], expected[0], tolerance)
    assert_close(found[1], expected[1], 3 * tolerance)  # sums over tokens, which fp32 adds up in another order
    assert found[0]["log_probs"].dtype == expected[0]["log_probs"].dtype


def test_padding_is_not_computed():
    model, inputs, seen = ready("qwen3_moe", torch.float32), batch(), []
    for module in (model.model.layers[0].mlp.gate, model.lm_head):
        module.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:2]))
    run(model, UnpaddedModel(model), **inputs)
    tokens = int(inputs["attention_mask"].sum())
    assert seen == [(1, tokens), tokens]


def test_what_lies_in_padding_changes_nothing():
    model, inputs = ready("qwen3_moe", torch.float32), batch()
    expected = run(model, UnpaddedModel(model), **inputs)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 10**9)  # no such token
    for values, others in zip(run(model, UnpaddedModel(model), **inputs), expected, strict=True):
        assert_close(values, others, 0.0)


def test_a_sample_does_not_depend_on_the_length_of_others():
    """To the last bit, one row at a time and with padding of another width."""
    model, inputs = ready("qwen3_moe", torch.float64), batch()
    whole = run(model, UnpaddedModel(model), **inputs)[0]["log_probs"]
    with torch.no_grad():
        alone = UnpaddedModel(model)(**{n: t[:1, 3:15] for n, t in inputs.items()}, fused_lm_head=True).log_probs
    torch.testing.assert_close(alone, whole[:1, 3:14], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_routes_are_those_of_the_tokens(family):
    model, inputs = ready(family, torch.float64), batch()
    routers, on = RouterMap(model), batch()["attention_mask"].bool()
    generator = torch.Generator().manual_seed(2)
    shape = (B, S, len(routers.layers), routers.num_experts)
    ids = torch.rand(shape, generator=generator).topk(routers.top_k).indices.to(torch.int16)
    ids[1, 4] = NATIVE
    used: list[torch.Tensor] = []
    for router in routers.position:
        router.register_forward_hook(lambda _, __, routing: used.append(routing.topk_ids_TK))
    replay = RouteReplay(routers, ids)
    UnpaddedModel(model)(**inputs, routes=replay, fused_lm_head=True)
    replay.check_used()
    given = ids[on]
    for layer, chosen in enumerate(used):
        is_given = (given[:, layer] >= 0).all(1)
        assert int(is_given.sum()) == len(given) - 1
        assert torch.equal(chosen[is_given], given[is_given, layer].long())

    recorder = RouteRecorder(routers)
    with torch.no_grad():
        native = UnpaddedModel(model)(**inputs, routes=recorder, fused_lm_head=True).log_probs
        recorded = recorder.ids_BSLK(B)
        assert (recorded[~on] == NATIVE).all()
        assert (recorded[on] >= 0).all()
        again = UnpaddedModel(model)(**inputs, routes=RouteReplay(routers, recorded), fused_lm_head=True).log_probs
    assert torch.equal(again, native)


def test_the_host_waits_once_for_the_tokens_and_not_in_every_layer():
    """Rows were packed by masks, which a device must count before the host can go on: in each layer, under replay."""
    model, inputs = ready("qwen3_moe", torch.float32), batch()
    routers = RouterMap(model)
    recorder = RouteRecorder(routers)
    for routes in (recorder, None):
        routes = routes or RouteReplay(routers, recorder.ids_BSLK(B))
        with OperatorSpy(("nonzero", "masked_select")) as spy:
            UnpaddedModel(model)(**inputs, routes=routes, fused_lm_head=True).log_probs.sum().backward()
        assert spy.found == ["nonzero"] * 2, "the real tokens, and where documents begin"


def test_what_cannot_be_packed_stays_padded():
    model, inputs, seen = ready("qwen3_moe", torch.float32), batch(), []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    UnpaddedModel(model)(**inputs, fused_lm_head=True, inputs_of_another_kind=None)
    assert seen[0]["attention_mask"] is inputs["attention_mask"]
    assert scores_unpadded(model)
    assert scores_unpadded(get_peft_model(ready("qwen3_moe", torch.float32), LoraConfig(target_modules=["q_proj"])))
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert not scores_unpadded(get_peft_model(ready("qwen3_moe", torch.float32), prompts))
    model.set_attn_implementation("sdpa")
    assert not scores_unpadded(model)
