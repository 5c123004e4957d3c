"""Routers against their definitions, written out token by token."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from xtuner_hf.moe.balance import BalanceConfig, LoadBalancer
from xtuner_hf.moe.router import Router, SigmoidGroupRouter, SoftmaxTopKRouter, TopKSoftmaxRouter
from xtuner_hf.moe.tokens import TokenLayout

TOKENS, HIDDEN, EXPERTS, TOP_K = 64, 16, 16, 4


def randomized(router: Router, bias: float = 0.3) -> Router:
    generator = torch.Generator().manual_seed(0)
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.data = bias * torch.randn(tensor.shape, generator=generator)
    return router


def hidden(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def sigmoid_router(**changes) -> SigmoidGroupRouter:
    values = {"num_groups": 4, "topk_groups": 2, "norm_topk_prob": True, "scaling_factor": 2.5}
    return randomized(SigmoidGroupRouter(HIDDEN, EXPERTS, TOP_K, **(values | changes)))


def by_hand(router: SigmoidGroupRouter, hidden_H: torch.Tensor) -> dict[int, float]:
    """DeepSeek-V3, eq. 12-16 and the group limit of section 2.1.2, for one token: expert -> weight."""
    scores = [torch.sigmoid(hidden_H @ row).item() for row in router.weight]
    biased = [score + bias for score, bias in zip(scores, router.e_score_correction_bias.tolist(), strict=True)]
    size = EXPERTS // router.num_groups
    groups = [sorted(biased[start : start + size])[-2:] for start in range(0, EXPERTS, size)]
    best = sorted(range(router.num_groups), key=lambda group: sum(groups[group]))[-router.topk_groups :]
    allowed = [expert for expert in range(EXPERTS) if expert // size in best]
    chosen = sorted(allowed, key=lambda expert: biased[expert])[-TOP_K:]
    total = sum(scores[expert] for expert in chosen) if router.norm_topk_prob else 1.0
    return {expert: router.scaling_factor * scores[expert] / total for expert in chosen}


@pytest.mark.parametrize("changes", [{}, {"num_groups": 1, "topk_groups": 1}, {"norm_topk_prob": False}])
def test_sigmoid_routing_is_the_definition(changes):
    router = sigmoid_router(**changes)
    routing = router(hidden())
    for token in range(TOKENS):
        found = dict(zip(routing.topk_ids_TK[token].tolist(), routing.weights_TK[token].tolist(), strict=True))
        assert found == pytest.approx(by_hand(router, hidden()[token]), rel=1e-5)


def test_masked_groups_lose_against_negative_scores():
    """With 0 instead of -inf an expert of a masked group would win."""
    router = sigmoid_router()
    router.e_score_correction_bias = torch.full((EXPERTS,), -2.0)  # every biased score is negative
    routing = router(hidden())
    assert all(len({expert // 4 for expert in token}) <= 2 for token in routing.topk_ids_TK.tolist())
    for token in range(TOKENS):
        assert set(routing.topk_ids_TK[token].tolist()) == set(by_hand(router, hidden()[token]))


def test_sigmoid_routing_equals_transformers_to_the_last_bit():
    ours = sigmoid_router()
    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, n_group=4, topk_group=2
    )
    stock = DeepseekV3TopkRouter(config)
    stock.load_state_dict(ours.state_dict())
    for found, expected in zip(ours(hidden()), stock(hidden()), strict=True):
        assert torch.equal(found, expected)


def test_the_correction_bias_moves_the_choice_and_not_the_weights():
    router = sigmoid_router(norm_topk_prob=False, scaling_factor=1.0)
    routing = router(hidden())
    scores_TE = router.scores(router.logits(hidden()))
    assert torch.equal(routing.weights_TK, scores_TE.gather(1, routing.topk_ids_TK))
    assert not torch.equal(routing.topk_ids_TK.sort().values, scores_TE.topk(TOP_K).indices.sort().values)
    assert not router.e_score_correction_bias.requires_grad


def test_topk_softmax_is_the_definition():
    router = randomized(TopKSoftmaxRouter(HIDDEN, EXPERTS, TOP_K))
    routing = router(hidden())
    for token in range(TOKENS):
        logits = router.weight @ hidden()[token] + router.bias
        top = logits.sort(descending=True)
        assert routing.topk_ids_TK[token].tolist() == top.indices[:TOP_K].tolist()
        expected = top.values[:TOP_K].exp() / top.values[:TOP_K].exp().sum()
        assert (routing.weights_TK[token] - expected).abs().max() < 1e-6


ROUTERS = [
    pytest.param(lambda: SoftmaxTopKRouter(HIDDEN, EXPERTS, TOP_K, norm_topk_prob=True), id="softmax, top-k"),
    pytest.param(lambda: TopKSoftmaxRouter(HIDDEN, EXPERTS, TOP_K), id="top-k, softmax"),
    pytest.param(sigmoid_router, id="sigmoid"),
]


@pytest.mark.parametrize("make", ROUTERS)
def test_everything_is_fp32_under_bf16_and_autocast(make):
    router = randomized(make())
    expected = router(hidden(torch.bfloat16).float())
    router.weight.data = router.weight.data.bfloat16()
    expected_bf16_weights = router(hidden(torch.bfloat16).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = router(hidden(torch.bfloat16))
    assert found.logits_TE.dtype == found.weights_TK.dtype == torch.float32
    assert torch.equal(found.logits_TE, expected_bf16_weights.logits_TE)
    assert (found.logits_TE - expected.logits_TE).abs().max() < 0.1


@pytest.mark.parametrize("make", ROUTERS)
def test_balance_finds_every_router_and_averages_probabilities(make):
    model = torch.nn.Sequential(randomized(make()))
    balancer = LoadBalancer.attach(model, BalanceConfig(aux_loss_coef=1.0, sequence_loss_coef=1.0))
    assert list(balancer.routers) == ["0"]
    balancer.start_step(torch.tensor(TOKENS), torch.tensor(1))
    with balancer.recording():
        routing = model[0](hidden(), TokenLayout(1, TOKENS, torch.device("cpu")))
    balancer.reduce()
    assert model[0].load.count_E.sum() == TOKENS * TOP_K
    assert (model[0].probabilities(routing.logits_TE).sum(-1) - 1).abs().max() < 1e-6
    assert abs(model[0].load.prob_sum_E.sum() - TOKENS) < 1e-3


def test_the_sequence_loss_of_sigmoid_scores_is_deepseek_s():
    """Eq. 17-20 of arXiv 2412.19437, written out for one document."""
    router = sigmoid_router()
    balancer = LoadBalancer.attach(torch.nn.Sequential(router), BalanceConfig(sequence_loss_coef=1.0))
    balancer.start_step(torch.tensor(TOKENS), torch.tensor(1))
    with balancer.recording():
        routing = router(hidden(), TokenLayout(1, TOKENS, torch.device("cpu")))
    scores_TE = torch.sigmoid(hidden().double() @ router.weight.double().T)
    share_TE = scores_TE / scores_TE.sum(1, keepdim=True)
    expected = 0.0
    for expert in range(EXPERTS):
        f = EXPERTS / (TOP_K * TOKENS) * (routing.topk_ids_TK == expert).sum()
        expected += f * share_TE[:, expert].mean()
    assert abs(router.load.other_losses[1] - expected) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 3}, "n_group 3 must divide the 16 experts"),
        ({"topk_groups": 5}, "topk_group 5 must be between 1 and n_group"),
        ({"num_groups": 8, "topk_groups": 1}, "num_experts_per_tok 4 is more than the 2 experts in topk_group 1"),
    ],
)
def test_groups_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        sigmoid_router(**changes)


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match="num_experts_per_tok is 9; it must be between 1 and the 8 experts"):
        SoftmaxTopKRouter(HIDDEN, 8, 9)
