"""Router replay in every family: packed, recomputed, over expert parallelism; with an engine of noisy routers."""

from __future__ import annotations

import pytest
import torch

from tests.families import FAMILIES
from tests.ranks import run_on_ranks
from xtuner_hf.moe.replay import RouteRecorder, RouteReplay, RouterMap

B, S = 2, 7
TOLERANCE = 1e-6  # routers of DeepSeek V3 and its relatives are fp32 in a model of any dtype


def model_of(family: str, **changes):
    return FAMILIES[family].ours(torch.float64, kernel="xtuner_reference", **changes).train()


def batch(packed: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 128, (B, S), generator=torch.Generator().manual_seed(1))
    if packed:
        return {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]])}
    mask = torch.ones(B, S, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def foreign_routes(routers: RouterMap, seed: int = 2) -> torch.Tensor:
    """[B, S, L, K], distinct experts for each token, in no order."""
    generator = torch.Generator().manual_seed(seed)
    shape = (B, S, len(routers.layers), routers.num_experts)
    return torch.rand(shape, generator=generator).topk(routers.top_k).indices.to(torch.int16)


def run(model, inputs: dict, routes=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(**inputs, routes=routes, use_cache=False).logits
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_own_and_foreign_routes(family, packed):
    """Own routes change no bit; foreign ones reach exactly those experts, also in a recomputed forward."""
    model, inputs = model_of(family), batch(packed)
    routers = RouterMap(model)
    recorder = RouteRecorder(routers)
    with torch.no_grad():
        model(**inputs, routes=recorder, use_cache=False)
    native = run(model, inputs)
    replayed = run(model, inputs, RouteReplay(routers, recorder.ids_BSLK(B)))
    assert torch.equal(replayed[0], native[0])
    assert all(torch.equal(replayed[1][name], grad) for name, grad in native[1].items())

    ids, seen = foreign_routes(routers), []
    for router in routers.position:
        router.register_forward_hook(lambda _, __, routing: seen.append(routing.topk_ids_TK))
    foreign = run(model, inputs, RouteReplay(routers, ids))
    for layer, chosen in enumerate(seen[: len(routers.layers)]):
        assert torch.equal(chosen, ids[:, :, layer].flatten(0, 1).long())
    gates = [name for name in foreign[1] if name.endswith(("mlp.gate.weight", "mlp.router.weight"))]
    assert len(gates) == len(routers.layers)
    assert all(foreign[1][name].abs().sum() > 0 for name in gates)
    assert not torch.allclose(foreign[0], native[0], atol=1e-4)

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = run(model, inputs, RouteReplay(routers, ids))
    assert torch.equal(recomputed[0], foreign[0])
    assert all(torch.equal(recomputed[1][name], grad) for name, grad in foreign[1].items())


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_of_a_noisy_engine_lowers_k3(family):
    """An engine whose routers choose otherwise: KL(engine || trainer) a token, with its routes and without."""
    engine, trainer, inputs = model_of(family), model_of(family), batch(packed=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for router in RouterMap(engine).position:
            spread = 0.2 * router.weight.std()
            router.weight += spread * torch.randn(router.weight.shape, generator=generator).to(router.weight)
    recorder = RouteRecorder(RouterMap(engine))

    def logps(model, **keywords) -> torch.Tensor:
        with torch.no_grad():
            logits = model(**inputs, use_cache=False, **keywords).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]

    of_engine = logps(engine, routes=recorder)
    routes = recorder.ids_BSLK(B)

    def k3(of_trainer: torch.Tensor) -> float:
        log_ratio = of_trainer - of_engine
        return float((log_ratio.exp() - 1 - log_ratio)[inputs["attention_mask"][:, 1:].bool()].mean())

    without = k3(logps(trainer))
    replayed = k3(logps(trainer, routes=RouteReplay(RouterMap(trainer), routes)))
    assert 0 < replayed < without


def on_ranks(ep_size: int) -> dict:
    """Loss and gradients of each family, one row a rank, packed, recomputed and replayed."""
    import torch.distributed as dist

    from tests.trainers.scenario import full
    from xtuner_hf.parallel.layout import ParallelLayout
    from xtuner_hf.parallel.shard import shard_model, sum_gradients

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    results = {}
    for family in FAMILIES:
        model = model_of(family)
        if world > 1:
            layout = ParallelLayout(world_size=world, ranks_per_node=world, ep_size=ep_size)
            model = shard_model(model, layout.distributed_config()).train()
            sum_gradients(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        routers = RouterMap(model)
        rows = slice(rank, rank + 1) if world > 1 else slice(None)
        inputs = {key: value[rows] for key, value in batch(packed=True).items()}
        replay = RouteReplay(routers, foreign_routes(routers)[rows])
        model(**inputs, routes=replay, use_cache=False).logits.logsumexp(-1).sum().backward()
        results[family] = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return results


def test_expert_parallelism_changes_nothing():
    (single,) = run_on_ranks("tests.moe.test_replay_families:on_ranks", 1, ep_size=1)
    ranks = run_on_ranks("tests.moe.test_replay_families:on_ranks", 2, ep_size=2)
    for family, grads in single.items():
        for name, expected in grads.items():
            difference = (ranks[0][family][name] - expected).abs().max()
            assert difference < TOLERANCE * expected.abs().max().clamp(min=1e-6), (family, name)
