"""Derivatives of a field by autograd."""

import pytest
import torch

from sknode.ode.vector_field import AutogradField, bind


class Doubled(torch.autograd.Function):
    """Twice the input, with a backward pass that cannot be batched."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        assert grad.sum().item() is not None
        return 2 * grad


@pytest.fixture
def inputs(random):
    return random(5, 1), random(5, 3, seed=1)


def product(t, y):
    return t * y * y.roll(1, -1) + torch.sin(t)


def test_jacobian_row_by_row(inputs):
    t, y = inputs
    by_state, by_time = AutogradField(product).jacobian(t, y)
    assert by_state.shape == (5, 3, 3)
    for i in range(5):
        expected = torch.autograd.functional.jacobian(product, (t[i], y[i]))
        torch.testing.assert_close(by_state[i], expected[1])
        torch.testing.assert_close(by_time[i], expected[0][:, 0])


def test_jacobian_of_a_whole_batch(inputs):
    def f(t, y):
        return t * y * y.roll(1, 0)

    t, y = inputs[0][0, 0], inputs[1]
    field = bind(f, 5, y.shape[1:], shared=True)
    by_state, by_time = field.jacobian(t.view(1, 1), y.view(1, -1))
    expected = torch.autograd.functional.jacobian(f, (t, y))
    torch.testing.assert_close(by_state, expected[1].reshape(1, 15, 15))
    torch.testing.assert_close(by_time, expected[0].reshape(1, 15))


def test_jacobian_where_products_cannot_be_batched(inputs):
    t, y = inputs
    one = AutogradField(lambda t, y: Doubled.apply(product(t, y))).jacobian(t, y)
    two = AutogradField(lambda t, y: 2 * product(t, y)).jacobian(t, y)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("constant", [True, False])
def test_jacobian_of_what_does_not_depend_on_state_or_time(constant, inputs):
    t, y = inputs
    field = AutogradField(lambda t, y: torch.ones_like(y) if constant else 2 * y)
    by_state, by_time = field.jacobian(t, y)
    expected = torch.eye(3, dtype=torch.float64) * (0 if constant else 2)
    torch.testing.assert_close(by_state, expected.expand(5, 3, 3))
    torch.testing.assert_close(by_time, torch.zeros_like(y))


def test_jacobian_is_differentiable_where_autograd_is_on(inputs):
    t, y = (x[:2].clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(AutogradField(product).jacobian, (t, y))
    with torch.no_grad():
        by_state, _ = AutogradField(product).jacobian(t, y)
    assert not by_state.requires_grad
