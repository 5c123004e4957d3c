"""Router replay: a model's own routes change no bit, foreign ones reach exactly those experts, mistakes are loud."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.tiny import build, dense_config, moe_config
from xtuner_hf import Qwen3ForCausalLM, Qwen3MoeForCausalLM
from xtuner_hf.moe.replay import (
    NATIVE,
    RecordingModel,
    ReplayingModel,
    RouteRecorder,
    RouteReplay,
    RouterMap,
    align_routes,
    freeze_routers,
)

B, S, L, E, K = 2, 7, 2, 8, 2  # the tiny model has three layers, the middle one dense


def model_and_map(seed: int = 0, **config) -> tuple[Qwen3MoeForCausalLM, RouterMap]:
    model = build(Qwen3MoeForCausalLM, moe_config(**config), seed=seed)
    return model, RouterMap(model)


def batch(packed: bool = False) -> dict:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 128, (B, S), generator=generator)
    if packed:
        return {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]])}
    mask = torch.ones(B, S, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def foreign_routes(seed: int = 2) -> torch.Tensor:
    """[B, S, L, K] int16, distinct experts for each token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(B, S, L, E, generator=generator).topk(K).indices.to(torch.int16)


def record(model, routers: RouterMap, inputs: dict) -> torch.Tensor:
    recorder = RouteRecorder(routers)
    with torch.no_grad():
        model(**inputs, routes=recorder)
    return recorder.ids_BSLK(B)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_models_own_routes_change_no_bit(mode, packed):
    model, routers = model_and_map()
    getattr(model, mode)()
    inputs = batch(packed)
    ids = record(model, routers, inputs)
    assert ids.shape == (B, S, L, K)
    assert ids.dtype == torch.int16
    native, grads = model(**inputs).logits, []
    replayed = model(**inputs, routes=RouteReplay(routers, ids)).logits
    assert torch.equal(replayed, native)
    for logits in (native, replayed):
        model.zero_grad()
        logits.logsumexp(-1).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_foreign_routes_reach_exactly_those_experts_with_a_router_gradient():
    model, routers = model_and_map()
    model.train()
    ids, seen = foreign_routes(), []
    hooks = [
        model.model.layers[layer].mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1:]))
        for layer in (0, 2)
    ]
    logits = model(**batch(), routes=RouteReplay(routers, ids)).logits
    for hook in hooks:
        hook.remove()
    for layer, (topk_ids, weights) in enumerate(seen):
        assert torch.equal(topk_ids, ids[:, :, layer].flatten(0, 1).long())
        assert torch.allclose(weights.sum(-1), torch.ones(B * S))  # norm_topk_prob, over the experts replayed
    assert not torch.allclose(logits, model(**batch()).logits, atol=1e-3)
    logits.logsumexp(-1).sum().backward()
    assert all(model.model.layers[layer].mlp.gate.weight.grad.abs().sum() > 0 for layer in (0, 2))


def test_weights_come_from_the_scores_of_all_experts():
    """An independent router: softmax over all experts, gathered at the given ids, divided by their sum."""
    model, routers = model_and_map()
    router, hidden = model.model.layers[0].mlp.gate, torch.randn(B * S, 64)
    ids = foreign_routes()
    from xtuner_hf.moe.tokens import TokenLayout

    layout = TokenLayout(B, S, hidden.device, routes=RouteReplay(routers, ids))
    routing = router(hidden, layout)
    chosen = (hidden @ router.weight.T).softmax(-1).gather(1, ids[:, :, 0].flatten(0, 1).long())
    assert torch.allclose(routing.weights_TK, chosen / chosen.sum(-1, keepdim=True), rtol=1e-6)


def test_tokens_without_routes_are_routed_natively():
    model, routers = model_and_map()
    own, ids = record(model, routers, batch()), foreign_routes()
    ids[0] = NATIVE
    ids[1, 3, :, 0] = NATIVE  # half a row is no route
    recorded = []
    replay = RouteReplay(routers, ids)
    for router in routers.position:
        router.register_forward_hook(lambda _, __, routing: recorded.append(routing.topk_ids_TK))
    model(**batch(), routes=replay)
    first_layer = recorded[0].view(B, S, K)
    assert torch.equal(first_layer[0], own[0, :, 0].long())
    assert torch.equal(first_layer[1, 3], own[1, 3, 0].long())
    assert torch.equal(first_layer[1, 4:], ids[1, 4:, 0].long())


def test_a_recomputed_forward_replays_too():
    model, routers = model_and_map()
    ids, grads = foreign_routes(), []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model.zero_grad()
        model(**batch(), routes=RouteReplay(routers, ids)).logits.logsumexp(-1).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_chunks_of_rows():
    model, routers = model_and_map()
    inputs, ids = batch(), foreign_routes()
    whole = model(**inputs, routes=RouteReplay(routers, ids)).logits
    replaying, recording = ReplayingModel(model, routers, ids), RecordingModel(model, routers)
    rows = [{key: value[row : row + 1] for key, value in inputs.items()} for row in range(B)]
    assert torch.allclose(torch.cat([replaying(**row).logits for row in rows]), whole, atol=1e-5)
    for row in rows:
        recording(**row)
    assert torch.equal(recording.ids_BSLK, record(model, routers, inputs))


def test_alignment_with_padded_prompts():
    _, routers = model_and_map()
    lengths = [(2, 3), (4, 1), (1, 1)]
    samples = [foreign_routes(seed)[0, : p + c - 1] for seed, (p, c) in enumerate(lengths)]
    aligned = align_routes(routers, [samples[0], samples[1].tolist(), None], lengths, prompt_width=4, width=7)
    assert aligned.shape == (3, 7, L, K)
    assert torch.equal(aligned[0, 2:6], samples[0])
    assert torch.equal(aligned[1, :4], samples[1])
    assert (aligned[0, :2] == NATIVE).all()  # padding
    assert (aligned[0, 6] == NATIVE).all()  # the last token was never fed
    assert (aligned[2] == NATIVE).all()


def test_an_engine_may_report_dense_layers_too():
    _, routers = model_and_map()
    ids = foreign_routes()
    with_dense = torch.zeros(B, S, 3, K, dtype=torch.int16)
    with_dense[:, :, [0, 2]] = ids
    assert torch.equal(routers.of_moe_layers(with_dense), ids)


def test_mistakes_are_loud():
    model, routers = model_and_map()
    ids = foreign_routes()
    with pytest.raises(ValueError, match="1 layers and 2 experts per token; this model has 2 MoE layers of 3 and 2"):
        routers.of_moe_layers(ids[:, :, :1])
    with pytest.raises(ValueError, match="2 layers and 1 experts per token"):
        routers.of_moe_layers(ids[..., :1])
    with pytest.raises(ValueError, match="experts from 0 to 8; there are 8"):
        routers.of_moe_layers(ids.where(ids != 7, 8))
    with pytest.raises(ValueError, match="one expert twice, as the zeros of lost routes do"):
        routers.of_moe_layers(torch.zeros_like(ids))
    with pytest.raises(ValueError, match=r"Sample 0 has 5 tokens and routes of shape \(3, 2, 2\)"):
        align_routes(routers, [ids[0, :3]], [(2, 3)], 2, 5)
    with pytest.raises(ValueError, match="routes for 1 samples, and 2 samples"):
        align_routes(routers, [None], [(2, 3), (2, 3)], 2, 5)
    with pytest.raises(ValueError, match=r"given for \(2, 6\) tokens, the forward has 14"):
        model(**batch(), routes=RouteReplay(routers, ids[:, :6]))
    with pytest.raises(RuntimeError, match="2 of 2 routers did not replay"):
        RouteReplay(routers, ids).check_used()
    with pytest.raises(ValueError, match="the model has no routers; set it to None for a dense model"):
        RouterMap(build(Qwen3ForCausalLM, dense_config()))


def test_frozen_routers():
    model, _ = model_and_map()
    assert freeze_routers(model) == L
    model(**batch()).logits.sum().backward()
    gates = {name for name, p in model.named_parameters() if p.grad is None}
    assert gates == {"model.layers.0.mlp.gate.weight", "model.layers.2.mlp.gate.weight"}


def replay_on_ranks(ep_size: int) -> dict:
    """Loss and gradients of rank-wise rows under replay, sharded with FSDP2 and expert parallelism."""
    import torch.distributed as dist

    from tests.trainers.scenario import full
    from xtuner_hf.parallel.layout import ParallelLayout
    from xtuner_hf.parallel.shard import shard_model, sum_gradients

    model = build(Qwen3MoeForCausalLM, moe_config(experts_implementation="xtuner_reference"))
    model.set_experts_implementation("xtuner_reference")
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if world > 1:
        layout = ParallelLayout(world_size=world, ranks_per_node=world, ep_size=ep_size)
        model = shard_model(model, layout.distributed_config())
        sum_gradients(model)
    model.train()
    rows = slice(rank, rank + 1) if world > 1 else slice(None)
    inputs = {key: value[rows] for key, value in batch().items()}
    routers = RouterMap(model)
    logits = model(**inputs, routes=RouteReplay(routers, foreign_routes()[rows])).logits
    logits.logsumexp(-1).sum().backward()
    return {"logits": logits.detach(), "grads": {name: full(p.grad) for name, p in model.named_parameters()}}


def test_expert_parallelism_changes_nothing():
    (single,) = run_on_ranks("tests.moe.test_replay:replay_on_ranks", 1, ep_size=1)
    ranks = run_on_ranks("tests.moe.test_replay:replay_on_ranks", 2, ep_size=2)
    assert torch.allclose(torch.cat([rank["logits"] for rank in ranks]), single["logits"], atol=1e-5)
    for name, expected in single["grads"].items():
        found = ranks[0]["grads"][name]
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1e-6), name
