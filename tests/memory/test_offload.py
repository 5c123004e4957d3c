"""Layer inputs that leave and come back, with copies that happen as late as they may."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.memory.streams import LateCopies
from xtuner_hf.device import CopyStream
from xtuner_hf.memory.offload import ActivationOffload

LAYERS = 5


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return torch.nn.ModuleList(torch.nn.Linear(8, 8, dtype=torch.float64) for _ in range(LAYERS))


@pytest.fixture
def x():
    return torch.randn(3, 8, dtype=torch.float64, requires_grad=True)


def run(layers, x, offload=None):
    for layer in layers:
        if offload is None:
            x = torch.tanh(layer(x))
        else:
            with offload.hooks():
                x = checkpoint(lambda x, layer=layer: torch.tanh(layer(x)), x, use_reentrant=False)
    return x.square().sum()


def grads_of(loss, layers, x, **options):
    return torch.autograd.grad(loss, [x, *layers.parameters()], **options)


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_gradients_are_the_same_to_the_last_bit(layers, x):
    expected = grads_of(run(layers, x), layers, x)
    assert_equal(grads_of(run(layers, x, ActivationOffload(LateCopies(), LateCopies())), layers, x), expected)
    plain = ActivationOffload(CopyStream(x.device), CopyStream(x.device))
    assert_equal(grads_of(run(layers, x, plain), layers, x), expected)


def test_an_input_that_is_read_before_it_is_back_is_noticed(layers, x):
    class Hasty(LateCopies):
        def wait(self, done):
            pass

    found = grads_of(run(layers, x, ActivationOffload(LateCopies(), Hasty())), layers, x)
    assert any(grad.isnan().any() for grad in found), "this test cannot fail"


def test_the_layer_before_comes_back_while_one_is_recomputed(layers, x):
    to_host, to_device = LateCopies(), LateCopies()
    loss = run(layers, x, ActivationOffload(to_host, to_device))
    assert to_host.log[:4] == [("copy", 1), ("wait", 1), ("copy", 2), ("wait", 2)], "inputs queue on the device"
    assert to_device.log == []
    seen = []
    layers[2].weight.register_hook(lambda _: seen.append((to_device.under_way, list(to_device.log))))
    loss.backward()
    # In the backward of layer 3 of 5 the copies for 4, 3 and 2 have begun (5's never left); that for 2 is under way.
    assert seen == [(1, [("copy", 1), ("wait", 1), ("copy", 2), ("wait", 2), ("copy", 3)])]
    assert [entry for entry in to_device.log if entry[0] == "copy"] == [("copy", i) for i in range(1, LAYERS)]


def test_two_forwards_before_their_backwards_in_either_order(layers, x):
    for order in ([0, 1], [1, 0]):
        offload = ActivationOffload(LateCopies(), LateCopies())
        inputs = [x, (x * 2).detach().requires_grad_()]
        losses = [run(layers, value, offload) for value in inputs]
        for i in order:
            expected = grads_of(run(layers, inputs[i]), layers, inputs[i])
            assert_equal(grads_of(losses[i], layers, inputs[i]), expected)


def test_a_forward_without_backward_leaves_nothing_behind(layers, x):
    offload = ActivationOffload(LateCopies(), LateCopies())
    run(layers, x, offload)
    expected = grads_of(run(layers, x), layers, x)
    assert_equal(grads_of(run(layers, x, offload), layers, x), expected)
    assert offload.to_host.under_way == offload.to_device.under_way == 0


def test_a_second_backward_through_the_same_graph(layers, x):
    loss = run(layers, x, ActivationOffload(LateCopies(), LateCopies()))
    first = grads_of(loss, layers, x, retain_graph=True)
    assert_equal(grads_of(loss, layers, x), first)


def test_tensors_of_another_device_stay(x):
    offload = ActivationOffload(LateCopies(), LateCopies())
    tensor = torch.empty(2, device="meta")
    assert offload._unpack(offload._pack(tensor)) is tensor
