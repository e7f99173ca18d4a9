"""MLPField: the closed form is the module."""

import pytest
import torch
from torch import nn

from sknode.fields import ACTIVATIONS, MLPField
from sknode.ode import solve_ode

T = torch.tensor([0.0, 0.4, 1.2], dtype=torch.float64)


@pytest.fixture
def y0():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(37, 3, generator=generator, dtype=torch.float64)


def solve_and_differentiate(f, field, y0, **kwargs):
    field.zero_grad()
    y0, t = y0.clone().requires_grad_(), T.clone().requires_grad_()
    y = solve_ode(f, y0, t, **kwargs).y
    weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    (weights * y).sum().backward()
    return [y.detach(), y0.grad, t.grad, *(p.grad.clone() for p in field.parameters())]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("time_dependent", [False, True])
@pytest.mark.parametrize("hidden", [(8,), (8, 7), (5, 6, 7)])
@pytest.mark.parametrize("step_control", ["per_sample", "shared"])
def test_closed_form_equals_autograd(
    activation, time_dependent, hidden, step_control, y0
):
    torch.manual_seed(0)
    field = MLPField(3, hidden, activation, time_dependent).double()
    one = solve_and_differentiate(field, field, y0, step_control=step_control)
    two = solve_and_differentiate(
        lambda t, y: field(t, y), field, y0, step_control=step_control
    )
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("time_dependent", [False, True])
def test_single_precision_agrees_with_double(time_dependent, y0):
    torch.manual_seed(0)
    field = MLPField(3, (32, 32), time_dependent=time_dependent).double()
    exact = solve_ode(field, y0, T, rtol=1e-10, atol=1e-10).y
    y = solve_ode(field.float(), y0.float(), T, rtol=1e-5, atol=1e-5).y
    assert (y - exact).abs().max() < 1e-4


def test_many_rows_leave_the_batch_one_by_one():
    torch.manual_seed(0)
    field = MLPField(2, (16,)).double()
    with torch.no_grad():
        field.layers[1].weight.mul_(5)
    y0 = 3 * torch.randn(700, 2, dtype=torch.float64)
    t = torch.linspace(0, 1, 4, dtype=torch.float64) * torch.rand(700, 1).double()
    one = solve_ode(field, y0, t, rtol=1e-8, atol=1e-8).y
    two = solve_ode(lambda t, y: field(t, y), y0, t, rtol=1e-8, atol=1e-8).y
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("extra", [0, 1])
def test_from_linears_shares_the_layers(bias, extra, y0):
    linears = [nn.Linear(3 + extra, 8, bias=bias), nn.Linear(8, 3, bias=bias)]
    linears = [layer.double() for layer in linears]
    field = MLPField.from_linears(linears, activation="silu")
    assert field.layers[0] is linears[0]
    assert field.time_dependent == bool(extra)
    one = solve_and_differentiate(field, field, y0)
    two = solve_and_differentiate(lambda t, y: field(t, y), field, y0)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("time_dependent", [False, True])
@pytest.mark.parametrize("hidden", [(8,), (5, 6, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_jacobian_equals_autograd(activation, time_dependent, hidden, bias, y0):
    torch.manual_seed(0)
    field = MLPField(3, hidden, activation, time_dependent).double()
    if not bias:
        for layer in field.layers:
            layer.bias = None
    t = torch.linspace(0, 1, len(y0), dtype=torch.float64)[:, None]
    by_state, by_time = field.jacobian(t, y0)
    for i in range(0, len(y0), 6):
        expected = torch.autograd.functional.jacobian(field, (t[i], y0[i]))
        torch.testing.assert_close(by_state[i], expected[1], rtol=1e-12, atol=1e-13)
        if time_dependent:
            torch.testing.assert_close(by_time[i], expected[0][:, 0])
    assert (by_time is None) == (not time_dependent)
    with torch.no_grad():
        plain, _ = field.jacobian(t, y0)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, by_state.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("activation", ["tanh", "silu", "softplus"])
def test_jacobian_is_differentiable(activation, y0):
    torch.manual_seed(0)
    field = MLPField(3, (5, 6), activation, time_dependent=True).double()
    t = torch.full((2, 1), 0.3, dtype=torch.float64, requires_grad=True)

    def jacobian(t, y, *parameters):
        return field.jacobian(t, y)

    inputs = (t, y0[:2].clone().requires_grad_(), *field.parameters())
    assert torch.autograd.gradcheck(jacobian, inputs)


def test_another_forward_is_respected(y0):
    class Twice(MLPField):
        def forward(self, t, y):
            return 2 * super().forward(t, y)

    field = Twice(3, (8,)).double()
    expected = solve_ode(lambda t, y: field(t, y), y0, T).y
    assert torch.equal(solve_ode(field, y0, T).y, expected)


def test_hooks_are_respected(y0):
    field = MLPField(3, (8,)).double()
    field.register_forward_hook(lambda module, args, output: output * 0)
    assert torch.equal(solve_ode(field, y0, T).y[:, -1], y0)


def test_precision_of_states_and_weights_must_agree(y0):
    with pytest.raises(TypeError, match=r"float64.*float32"):
        solve_ode(MLPField(3, (8,)), y0, T)


@pytest.mark.parametrize(
    "arguments",
    [
        {"dim": 0},
        {"hidden_layer_sizes": ()},
        {"hidden_layer_sizes": (0,)},
        {"activation": "step"},
    ],
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        MLPField(**{"dim": 2, "hidden_layer_sizes": (4,), **arguments})


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        MLPField.from_linears([nn.Linear(2, 3), nn.Linear(4, 2)])
    with pytest.raises(ValueError, match="at least two"):
        MLPField.from_linears([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="with or without time"):
        MLPField.from_linears([nn.Linear(5, 3), nn.Linear(3, 2)])
