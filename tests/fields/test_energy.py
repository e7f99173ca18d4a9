"""EnergyField: what it integrates is the energy of the flow."""

import itertools

import pytest
import torch
from torch import nn

from sknode.fields import ConvField, EnergyField, MLPField
from sknode.ode import solve_ode

INTERVAL = torch.tensor([0.0, 1.0], dtype=torch.float64)
EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Linear(nn.Module):
    """The field A y."""

    def __init__(self, n=3):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.A = nn.Parameter(torch.randn(n, n, generator=generator).double())

    def forward(self, t, y):
        return y @ self.A.T


@pytest.fixture
def y0():
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture
def probe():
    return torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)


def integrate(field, y0, probe=None, **settings):
    energy = EnergyField(field, y0.shape[1:], probe)
    end = solve_ode(energy, energy.start(y0), INTERVAL, **{**EXACT, **settings}).y
    return energy.split(end[:, -1])


def test_the_kinetic_energy_of_a_linear_flow(y0):
    field = Linear()
    A = field.A.detach()
    y, kinetic, jacobian = integrate(field, y0)
    torch.testing.assert_close(y, y0 @ torch.linalg.matrix_exp(A).T)
    # Gauss-Legendre quadrature of |A exp(t A) y0|^2 / n
    nodes = torch.linspace(0, 1, 2001, dtype=torch.float64)
    slopes = y0 @ torch.linalg.matrix_exp(nodes[:, None, None] * A).mT @ A.T
    expected = torch.trapezoid(slopes.square().mean(-1), nodes, dim=0)
    torch.testing.assert_close(kinetic, expected, rtol=1e-5, atol=1e-8)
    assert jacobian is None


def test_the_kinetic_energy_of_a_rotation_and_of_growth(y0):
    field = Linear(2)
    with torch.no_grad():
        field.A.copy_(torch.tensor([[0.0, -3.0], [3.0, 0.0]]))
    y0 = y0[:, :2]
    squares = y0.square().mean(1)
    _, kinetic, _ = integrate(field, y0)
    torch.testing.assert_close(kinetic, 9 * squares)
    with torch.no_grad():
        field.A.copy_(0.5 * torch.eye(2))
    _, kinetic, _ = integrate(field, y0)
    torch.testing.assert_close(kinetic, 0.25 * torch.expm1(INTERVAL[1]) * squares)


def test_the_jacobian_of_a_linear_flow(y0, probe):
    field = Linear()
    *_, jacobian = integrate(field, y0, probe)
    expected = (probe @ field.A.detach()).square().mean()
    torch.testing.assert_close(jacobian, expected.expand(4))


def test_all_signs_together_give_the_frobenius_norm(y0):
    torch.manual_seed(0)
    field = MLPField(3, (8,)).double()
    t = torch.tensor(0.3, dtype=torch.float64)
    estimates = []
    for signs in itertools.product([-1.0, 1.0], repeat=3):
        probe = torch.tensor(signs, dtype=torch.float64)
        energy = EnergyField(field, (3,), probe)
        estimates.append(energy(t, energy.start(y0))[:, -1].detach())
    jacobian = torch.vmap(torch.func.jacrev(lambda y: field(t, y)))(y0).detach()
    expected = jacobian.square().sum((1, 2)) / 3
    torch.testing.assert_close(torch.stack(estimates).mean(0), expected)
    assert torch.stack(estimates).std(0).min() > 1e-6


@pytest.mark.parametrize("with_probe", [False, True])
def test_the_flow_is_that_of_the_field(y0, probe, with_probe):
    torch.manual_seed(0)
    field = MLPField(3, (8,), time_dependent=True).double()
    expected = solve_ode(field, y0, INTERVAL, **EXACT).y[:, -1]
    y, kinetic, _ = integrate(field, y0, probe if with_probe else None)
    torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-10)
    assert (kinetic > 0).all()


@pytest.mark.parametrize("gradient", ["discrete", "continuous"])
def test_gradients_of_the_energies_are_those_of_autograd(y0, probe, gradient):
    torch.manual_seed(0)
    field = MLPField(3, (6,), "tanh", time_dependent=True).double()

    def gradients(gradient):
        field.zero_grad()
        start = y0.clone().requires_grad_()
        y, kinetic, jacobian = integrate(
            field, start, probe, rtol=1e-8, atol=1e-8, gradient=gradient
        )
        (y.sum() + 2 * kinetic.sum() + 3 * jacobian.sum()).backward()
        return [start.grad, *(p.grad.clone() for p in field.parameters())]

    rtol = 1e-9 if gradient == "discrete" else 1e-5
    for one, two in zip(gradients(gradient), gradients("backprop"), strict=True):
        torch.testing.assert_close(one, two, rtol=rtol, atol=rtol)


def test_gradients_of_a_slope_are_right(y0, probe):
    torch.manual_seed(0)
    field = MLPField(3, (4,), "tanh", time_dependent=True).double()
    energy = EnergyField(field, (3,), probe)
    state = energy.start(y0[:2]).requires_grad_()
    t = torch.tensor([[0.2], [0.7]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t, state, *parameters: energy(t, state),
        (t, state, *field.parameters()),
    )


def test_images_are_states_too():
    torch.manual_seed(0)
    field = ConvField(4).double()
    y0 = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    probe = (2 * torch.randint(2, (4, 5, 2)) - 1).double()
    y, kinetic, jacobian = integrate(field, y0, probe, rtol=1e-6, atol=1e-6)
    assert y.shape == y0.shape
    assert kinetic.shape == jacobian.shape == (3,)
    expected = solve_ode(field, y0, INTERVAL, rtol=1e-6, atol=1e-6).y[:, -1]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_the_energies_of_a_row_do_not_depend_on_the_others(y0, probe):
    field = Linear()
    _, kinetic, jacobian = integrate(field, y0, probe)
    changed = y0.clone()
    changed[1:] *= 10
    _, other, another = integrate(field, changed, probe)
    assert kinetic[0] == other[0]
    assert jacobian[0] == another[0]


def test_without_gradients_nothing_is_recorded(y0, probe):
    energy = EnergyField(Linear(), (3,), probe)
    with torch.no_grad():
        slope = energy(INTERVAL[0], energy.start(y0))
    assert not slope.requires_grad
    expected = energy(INTERVAL[0], energy.start(y0)).detach()
    torch.testing.assert_close(slope, expected)


def test_a_field_that_ignores_the_state_has_no_jacobian(y0, probe):
    class Constant(nn.Module):
        def forward(self, t, y):
            return torch.ones_like(y)

    y, kinetic, jacobian = integrate(Constant(), y0, probe)
    torch.testing.assert_close(y, y0 + 1)
    torch.testing.assert_close(kinetic, torch.ones(4).double())
    torch.testing.assert_close(jacobian, torch.zeros(4).double())
