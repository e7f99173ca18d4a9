"""`odeint` and its relatives do what torchdiffeq's do, called in the same way."""

import math

import numpy as np
import pytest
import torch
import torchdiffeq

import sknode.ode
from sknode.fields import MLPField
from sknode.ode import (
    OdeintError,
    SolverError,
    odeint,
    odeint_adjoint,
    odeint_dense,
    odeint_event,
)

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "tsit5")
GRID = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
TIMES = (0.0, 0.3, 0.7, 1.5, 2.0)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


class Field(torch.nn.Module):
    """A nonlinear, non-autonomous field with a parameter."""

    def __init__(self):
        super().__init__()
        weight = torch.tensor([[0.4, -0.9, 0.2], [0.7, 0.1, -0.5], [-0.3, 0.6, 0.8]])
        self.weight = torch.nn.Parameter(weight.double())
        self.calls, self.times = 0, []

    def forward(self, t, y):
        assert t.ndim == 0
        self.calls += 1
        self.times.append(t.item())
        return torch.tanh(y @ self.weight) * torch.cos(t) - 0.1 * y * t


def solve(solver, reverse=False, **settings):
    """Return states and gradients by y0, t and the parameter."""
    f, t = Field(), doubles(*TIMES)
    t = (t.flip(0) if reverse else t).requires_grad_()
    y0 = doubles(0.5, -1.0, 0.2, 1.5, 0.3, -0.4).view(2, 3).requires_grad_()
    y = solver(f, y0, t, **settings)
    weights = torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()
    grads = torch.autograd.grad((y * weights).sum(), [y0, t, f.weight])
    return [y.detach(), *grads]


def assert_all_close(found, expected, tol):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("reverse", [False, True])
class TestAgreement:
    """Side by side with torchdiffeq."""

    @pytest.mark.parametrize("gradient", ["discrete", "backprop"])
    @pytest.mark.parametrize("method", ["dopri5", "dopri8"])
    def test_adaptive_methods(self, method, gradient, reverse):
        tight = {"rtol": 1e-11, "atol": 1e-11}
        found = solve(odeint, reverse, method=method, gradient=gradient, **tight)
        # its dopri8 has a dense output of low order: dopri5 is the better reference
        assert_all_close(found, solve(torchdiffeq.odeint, reverse, **tight), 3e-7)

    @pytest.mark.parametrize("gradient", ["discrete", "backprop"])
    @pytest.mark.parametrize("method", GRID)
    def test_grid_methods_to_rounding(self, method, gradient, reverse):
        found = solve(odeint, reverse, method=method, gradient=gradient)
        expected = solve(torchdiffeq.odeint, reverse, method=method)
        assert_all_close(found, expected, 1e-14)

    @pytest.mark.parametrize("perturb", [False, True])
    @pytest.mark.parametrize("method", ["midpoint", "rk4", "heun3"])
    def test_step_size_and_cubic_interpolation_to_rounding(
        self, method, perturb, reverse
    ):
        options = {"step_size": 0.13, "interp": "cubic", "perturb": perturb}
        found = solve(odeint, reverse, method=method, options=options)
        expected = solve(torchdiffeq.odeint, reverse, method=method, options=options)
        assert_all_close(found, expected, 3e-14)

    @pytest.mark.parametrize("method", ["euler", "rk4"])
    def test_linear_interpolation_to_rounding(self, method, reverse):
        # no output time on a grid point, where the slope of the line is not unique
        options = {"step_size": 0.17}
        found = solve(odeint, reverse, method=method, options=options)
        expected = solve(torchdiffeq.odeint, reverse, method=method, options=options)
        assert_all_close(found, expected, 1e-14)

    def test_grid_constructors_that_depend_on_the_times(self, reverse):
        def constructor(f, y0, t):
            return t[0] + (t[-1] - t[0]) * torch.linspace(0, 1, 18, dtype=t.dtype) ** 2

        options = {"grid_constructor": constructor}
        found = solve(odeint, reverse, method="rk4", options=options)
        expected = solve(torchdiffeq.odeint, reverse, method="rk4", options=options)
        assert_all_close(found, expected, 1e-13)

    @pytest.mark.parametrize("options", [{"step_t": doubles(0.4, 0.9)}])
    def test_step_t(self, options, reverse):
        tight = {"rtol": 1e-11, "atol": 1e-11, "options": options}
        found = solve(odeint, reverse, method="dopri5", **tight)
        expected = solve(torchdiffeq.odeint, reverse, method="dopri5", **tight)
        assert_all_close(found, expected, 3e-7)

    @pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
    def test_adams_on_a_uniform_grid(self, method, reverse):
        settings = {
            "method": method,
            "rtol": 1e-12,
            "options": {"step_size": 0.01, "max_order": 5, "interp": "cubic"},
        }
        found = solve(odeint, reverse, **settings)
        expected = solve(torchdiffeq.odeint, reverse, **settings)
        # gradients by t differ: there, the weights do not move with the grid
        found, expected = ([x[0], x[1], x[3]] for x in (found, expected))
        assert_all_close(found, expected, 1e-10)

    @pytest.mark.parametrize("norm", [None, "seminorm"])
    def test_adjoint_of_an_adaptive_method(self, norm, reverse):
        settings = {"rtol": 1e-10, "atol": 1e-10}
        if norm is not None:
            settings["adjoint_options"] = {"norm": norm}
        found = solve(odeint_adjoint, reverse, **settings)
        expected = solve(torchdiffeq.odeint_adjoint, reverse, **settings)
        assert_all_close(found, expected, 1e-7)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"step_size": 0.1},
            {"step_size": 0.1, "perturb": True},
            {
                "grid_constructor": lambda f, y0, t: torch.linspace(
                    t[0].item(), t[-1].item(), 9, dtype=t.dtype
                )
            },
        ],
    )
    def test_adjoint_on_a_grid_to_rounding(self, options, reverse):
        settings = {"method": "rk4", "options": options}
        found = solve(odeint_adjoint, reverse, **settings)
        expected = solve(torchdiffeq.odeint_adjoint, reverse, **settings)
        assert_all_close(found, expected, 1e-13)

    @pytest.mark.parametrize("method", ["implicit_adams", "scipy_solver"])
    def test_adjoint_of_methods_without_a_sweep(self, method, reverse):
        options = {"step_size": 0.05} if method == "implicit_adams" else {}
        settings = {"method": method, "rtol": 1e-9, "atol": 1e-9, "options": options}
        found = solve(odeint_adjoint, reverse, **settings)
        expected = solve(torchdiffeq.odeint_adjoint, reverse, **settings)
        assert_all_close(found, expected, 1e-6)

    @pytest.mark.parametrize("as_tuple", [False, True])
    @pytest.mark.parametrize(
        ("settings", "tol"),
        [
            ({"rtol": 1e-11, "atol": 1e-11}, 1e-7),
            (
                {"method": "rk4", "options": {"step_size": 0.02, "interp": "cubic"}},
                1e-6,
            ),
            (
                {
                    "method": "implicit_adams",
                    "options": {"step_size": 0.02, "interp": "cubic"},
                },
                1e-6,
            ),
            ({"rtol": 1e-11, "atol": 1e-11, "adjoint": True}, 1e-7),
        ],
    )
    def test_events_and_their_gradients(self, settings, tol, as_tuple, reverse):
        settings = dict(settings)
        adjoint = settings.pop("adjoint", False)

        def run(module, interface):
            y0, t0 = doubles(1.0, 0.0).requires_grad_(), doubles(0.2).requires_grad_()
            state = (y0[0], y0[1]) if as_tuple else y0
            f = Pendulum(as_tuple)
            event_t, y = module.odeint_event(
                f,
                state,
                t0,
                event_fn=lambda t, y: torch.stack([y[0] - 0.1 * t.squeeze(), y[1] + 5]),
                reverse_time=reverse,
                odeint_interface=interface,
                **settings,
            )
            y = torch.stack(y, -1) if as_tuple else y
            loss = 2 * event_t + 3 * y[-1, 0] + y[-1, 1]
            grads = torch.autograd.grad(loss, [y0, t0, f.length])
            return [event_t.detach(), y.detach(), *grads]

        name = "odeint_adjoint" if adjoint else "odeint"
        found = run(sknode.ode, getattr(sknode.ode, name))
        expected = run(torchdiffeq, getattr(torchdiffeq, name))
        assert_all_close(found, expected, tol)


class Pendulum(torch.nn.Module):
    def __init__(self, as_tuple):
        super().__init__()
        self.length = torch.nn.Parameter(doubles(1.3)[0])
        self.as_tuple = as_tuple

    def forward(self, t, y):
        force = -torch.sin(y[0]) * self.length - 0.1 * y[1] + t.cos() * 0.1
        return (y[1], force) if self.as_tuple else torch.stack([y[1], force])


class TestStates:
    @pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (2, 1, 3)])
    @pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_adams"])
    @pytest.mark.parametrize("solver", [odeint, odeint_adjoint])
    def test_of_any_shape(self, solver, method, shape):
        def f(t, y):
            assert y.shape == shape and t.shape == ()
            return -y

        t = torch.linspace(0, 1, 6, dtype=torch.float64)
        y0 = torch.full(shape, 2.0, dtype=torch.float64, requires_grad=True)
        extra = {} if solver is odeint else {"adjoint_params": ()}
        settings = {"method": method, "rtol": 1e-5, "atol": 1e-5}
        y = solver(f, y0, t, **settings, **extra)
        assert y.shape == (6, *shape)
        exact = 2 * torch.exp(-t).reshape(-1, *(1 for _ in shape)).expand_as(y)
        assert (y - exact).abs().max() < 1e-4
        y[-1].sum().backward()
        torch.testing.assert_close(
            y0.grad, torch.full(shape, math.exp(-1)).double(), rtol=1e-4, atol=0
        )

    def test_tuples_keep_their_parts_and_share_the_steps(self):
        def f(t, y):
            a, b = y
            assert a.shape == () and b.shape == (2, 2)
            return -b.sum(), a * torch.ones_like(b).reshape(-1)  # any shape will do

        y0 = (torch.tensor(1.0), torch.zeros(2, 2))
        a, b = odeint(f, y0, torch.tensor([0.0, 0.5, 1.0]))
        assert a.shape == (3,) and b.shape == (3, 2, 2)
        torch.testing.assert_close(a, torch.cos(2 * torch.tensor([0.0, 0.5, 1.0])))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dtype_of_field_and_result(self, dtype):
        def f(t, y):
            assert t.dtype == y.dtype == dtype
            return (-y).double()  # is brought back to the dtype of the state

        y = odeint(f, torch.ones(2, dtype=dtype), torch.tensor([0.0, 1.0]))
        assert y.dtype == dtype

    @pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_adams"])
    @pytest.mark.parametrize("solver", [odeint, odeint_adjoint])
    def test_complex(self, solver, method):
        rate = torch.tensor(-0.3 + 2j, dtype=torch.complex128, requires_grad=True)
        t = torch.linspace(0, 1, 41, dtype=torch.float64, requires_grad=True)
        y0 = torch.tensor([1 + 1j], dtype=torch.complex128, requires_grad=True)
        extra = {} if solver is odeint else {"adjoint_params": (rate,)}
        y = solver(lambda t, y: rate * y, y0, t, method=method, **extra)
        exact = y0 * torch.exp(rate * (t - t[0])[:, None])
        torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)
        inputs = (y0, t, rate)
        found = torch.autograd.grad((y.real + 2 * y.imag).sum(), inputs)
        expected = torch.autograd.grad((exact.real + 2 * exact.imag).sum(), inputs)
        assert_all_close(found, expected, 2e-4)

    @pytest.mark.parametrize("method", [*ADAPTIVE, *GRID, *ADAMS, "scipy_solver"])
    def test_a_single_time_returns_the_start(self, method):
        y = odeint(lambda t, y: -y, torch.ones(2), torch.tensor([1.0]), method=method)
        torch.testing.assert_close(y, torch.ones(1, 2))

    def test_closed_forms_are_used(self, monkeypatch):
        field = MLPField(2, (8,))
        y0, t = torch.randn(5, 2), torch.linspace(0, 1, 4)
        fast = odeint(field, y0, t)
        with monkeypatch.context() as patch:
            patch.delattr(torch.autograd, "grad")  # not needed on the way back
            fast.sum().backward()
        slow = odeint(lambda t, y: field(t, y), y0, t)
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


class TestGradients:
    @pytest.mark.parametrize(
        "method",
        [
            pytest.param(x, marks=pytest.mark.slow if x == "bosh3" else ())
            for x in (*ADAPTIVE[:3], *GRID, *ADAMS[:2])
        ],
    )
    def test_exact(self, method):
        f = Field()
        y0 = doubles(0.5, -1.0, 0.2).requires_grad_()
        t = doubles(0.0, 0.25, 0.4, 0.6, 0.75, 1.0).requires_grad_()
        settings = {"method": method, "rtol": 1e-12, "atol": 1e-12}
        if method in ADAMS:
            settings |= {"options": {"max_iters": 30}}

        def run(y0, t, weight):
            def field(t, y):
                return torch.tanh(y @ weight) * torch.cos(t) - 0.1 * y * t

            return odeint(field, y0, t, **settings)

        assert torch.autograd.gradcheck(run, (y0, t, f.weight))

    def test_can_be_differentiated_twice_by_backprop(self):
        y0 = doubles(0.5).requires_grad_()

        def run(y0):
            t = doubles(0.0, 1.0)
            return odeint(lambda t, y: -(y**2), y0, t, gradient="backprop")[-1]

        assert torch.autograd.gradgradcheck(run, (y0,))

    @pytest.mark.parametrize("interp", ["linear", "cubic"])
    def test_large_grids_are_reversed_from_their_states(self, interp, monkeypatch):
        # the same gradient, whether the steps are on autograd's tape or taken again
        from sknode.ode.torchdiffeq import forward

        options = {"step_size": 0.13, "interp": interp}
        results = []
        for limit in (0, 10**9):
            monkeypatch.setattr(forward, "TAPE_NUMBERS", limit)
            results.append(solve(odeint, method="rk4", options=options))
        assert_all_close(*results, 1e-13)

    def test_a_jump_stays_where_it_is_when_the_start_moves(self):
        def f(t, y):
            return torch.where(t < 0.5, torch.ones_like(y), 10 * y)

        t = doubles(0.0, 1.0).requires_grad_()
        options = {"jump_t": doubles(0.5)}
        y = odeint(f, doubles(1.0), t, options=options)
        # y(1) = (1 + 1/2 - t0) e^5 and its slope there
        (grad,) = torch.autograd.grad(y[-1, 0], t)
        expected = doubles(-math.exp(5), 15 * math.exp(5))
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)

    def test_unused_and_frozen_parameters(self):
        f = Field()
        f.unused = torch.nn.Linear(2, 2)
        f.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        y = odeint_adjoint(f, doubles(1.0, 2.0, 3.0), doubles(0.0, 1.0))
        y.sum().backward()
        assert f.unused.weight.grad.abs().max() == 0
        assert f.frozen.grad is None
        assert f.weight.grad.abs().max() > 0

    def test_adjoint_needs_parameters_of_functions(self):
        with pytest.raises(ValueError, match="adjoint_params must be given"):
            odeint_adjoint(lambda t, y: -y, doubles(1.0), doubles(0.0, 1.0))
        with pytest.raises(ValueError, match="adjoint_options must be given"):
            odeint_adjoint(
                Field(),
                doubles(1.0, 2.0, 3.0),
                doubles(0.0, 1.0),
                method="dopri5",
                options={"first_step": 0.1},
                adjoint_method="rk4",
            )

    def test_parameters_of_a_replica_are_its_attributes(self):
        from sknode.ode.torchdiffeq.adjoint import find_parameters

        layer = torch.nn.Linear(2, 2)
        replica = layer._replicate_for_data_parallel()
        replica.weight, replica.bias = layer.weight * 1, layer.bias * 1
        found = find_parameters(replica)
        assert [id(p) for p in found] == [id(replica.weight), id(replica.bias)]

    def test_step_size_is_carried_over_output_times(self):
        def calls(n_times):
            f = Field()
            t = torch.linspace(0, 2, n_times, dtype=torch.float64)
            y = odeint_adjoint(f, doubles(1.0, 2.0, 3.0), t, rtol=1e-3, atol=1e-3)
            f.calls = 0
            y[-1].sum().backward()
            return f.calls

        # one step of dopri5 to every output time, and the slope after the jump there
        assert calls(51) <= calls(2) + 50 * 7

    def test_several_tolerances(self):
        y0, t = (doubles(1.0), doubles(2.0, 3.0)), doubles(0.0, 0.5, 1.0)

        def f(t, y):
            return -y[0], -2 * y[1]

        exact = torch.exp(-t)
        for rtol in (1e-9, (1e-9, 1e-8), (1e-9, doubles(1e-9, 1e-8))):
            settings = {"rtol": rtol, "atol": 1e-10, "adjoint_params": ()}
            a = odeint_adjoint(f, (y0[0].requires_grad_(), y0[1]), t, **settings)[0]
            torch.testing.assert_close(a[:, 0], exact, rtol=1e-7, atol=0)
            (grad,) = torch.autograd.grad(a[-1].sum(), y0[0])
            torch.testing.assert_close(grad, doubles(math.exp(-1)), rtol=1e-6, atol=0)


class TestNorms:
    def test_gets_the_state_as_the_user_knows_it(self):
        seen = []

        def norm(state):
            seen.append([part.shape for part in state])
            return state[0].abs().max()

        y0 = (torch.ones(()), torch.ones(2, 2))
        odeint(lambda t, y: y, y0, torch.tensor([0.0, 1.0]), options={"norm": norm})
        assert seen and all(shapes == [(), (2, 2)] for shapes in seen)

    def test_the_default_for_tuples_is_the_largest_of_the_parts(self):
        # a part of many zeros does not water down the error of the other
        def calls(n):
            f = Field()

            def field(t, y):
                return f(t, y[0]), torch.zeros_like(y[1])

            y0 = (doubles(1.0, 2.0, 3.0), torch.zeros(n, dtype=torch.float64))
            odeint(field, y0, doubles(0.0, 2.0), rtol=1e-6, atol=1e-6)
            return f.calls

        assert calls(1) == calls(1000)

    @pytest.mark.parametrize("kind", ["tensor", "tuple"])
    def test_adjoint_norm_can_be_replaced_before_the_backward_pass(self, kind):
        params = (torch.rand(7, requires_grad=True), torch.rand((), requires_grad=True))
        y0 = torch.ones(2, 2) if kind == "tensor" else (torch.ones(()), torch.ones(4))
        t = torch.tensor([0.0, 1.0])
        y = odeint_adjoint(lambda t, y: y, y0, t, adjoint_params=params)
        if kind == "tensor":
            node = y.grad_fn
        else:
            node = y[0].grad_fn.next_functions[0][0].next_functions[0][0]
        default, seen = node.adjoint_options["norm"], []

        def spy(state):
            seen.append([part.shape for part in state])
            return default(state)

        node.adjoint_options["norm"] = spy
        (y if kind == "tensor" else y[0]).sum().backward()
        shape = (2, 2) if kind == "tensor" else (5,)
        assert seen and all(s == [(), shape, shape, (7,), ()] for s in seen)

    def test_custom_adjoint_norm_sees_the_parts_of_a_tuple(self):
        seen = []

        def norm(state):
            seen.append([part.shape for part in state])
            return max(part.abs().max() for part in state)

        y0 = (torch.ones(()), torch.ones(2, 2))
        t, weight = torch.tensor([0.0, 1.0]), torch.ones(3, requires_grad=True)
        y = odeint_adjoint(
            lambda t, y: (y[0] * weight.sum(), y[1]),
            y0,
            t,
            adjoint_params=(weight,),
            adjoint_options={"norm": norm},
        )
        y[0].sum().backward()
        shapes = [(), (), (2, 2), (), (2, 2), (3,)]
        assert seen and all(s == shapes for s in seen)

    def test_seminorm_needs_fewer_evaluations(self):
        calls = []
        for options in ({}, {"norm": "seminorm"}):
            f = Field()
            y0, t = torch.ones(50, 3, dtype=torch.float64), doubles(0.0, 5.0)
            y = odeint_adjoint(f, y0, t, rtol=1e-7, adjoint_options=options)
            f.calls = 0
            y.square().sum().backward()
            calls.append(f.calls)
        assert calls[1] < calls[0]


class TestOptions:
    def test_min_step_is_accepted_whatever_its_error(self):
        f = Field()
        options = {"min_step": 0.5}
        odeint(f, doubles(1.0, 2.0, 3.0), doubles(0.0, 2.0), options=options)
        assert f.calls <= 2 + 6 * 5

    @pytest.mark.parametrize("min_step", [0.1, 0.05, 1 / 30, 0.01])
    @pytest.mark.parametrize("method", ["bosh3", "dopri5"])
    def test_min_step_is_accepted_however_its_end_rounds(self, method, min_step):
        def f(t, y):
            return torch.cos(20 * t) * torch.ones_like(y)

        settings = {"rtol": 1e-10, "atol": 1e-10, "method": method}
        t = doubles(0.0, 1.0)
        y = odeint(f, doubles(1.0), t, **settings, options={"min_step": min_step})
        assert y[-1].item() == pytest.approx(1 + np.sin(20) / 20, abs=0.05)

    def test_max_and_first_step(self):
        f, steps = Field(), []
        f.callback_step = lambda t, y, dt: steps.append(dt.item())
        options = {"max_step": 0.25, "first_step": 0.125}
        t = doubles(0.0, 2.0)
        odeint(f, doubles(1.0, 2.0, 3.0), t, rtol=1e-2, atol=1e-2, options=options)
        assert steps[0] == 0.125
        # 1.875 are left after the first step: eight equal ones
        assert steps[1:] == [1.875 / 8] * 8

    def test_jump_t_saves_evaluations_and_keeps_the_sides_apart(self):
        class Jump:
            calls, inside = 0, True

            def __call__(self, t, y):
                self.calls += 1
                self.inside &= t.item() != 0.5
                return -0.5 * y if t < 0.5 else y**2

        counts = []
        for options in ({}, {"jump_t": doubles(0.5)}):
            f = Jump()
            y = odeint(f, doubles(1.0, 0.7), doubles(0.0, 1.0), options=options)
            counts.append(f.calls)
        start = doubles(1.0, 0.7) * math.exp(-0.25)
        torch.testing.assert_close(y[-1], start / (1 - start / 2), rtol=1e-6, atol=0)
        assert f.inside
        assert counts[1] < counts[0]

    @pytest.mark.parametrize("method", [*GRID, *ADAMS])
    @pytest.mark.parametrize("solver", [odeint, odeint_adjoint])
    @pytest.mark.parametrize("perturb", [False, True])
    def test_perturb_avoids_the_grid_points(self, perturb, solver, method):
        times = []

        def f(t, y):
            times.append(t.item())
            return -y

        y0 = torch.ones(2, requires_grad=True)
        extra = {} if solver is odeint else {"adjoint_params": ()}
        options = {"step_size": 0.5, "perturb": perturb}
        t = torch.tensor([0.0, 1.0])
        y = solver(f, y0, t, method=method, options=options, **extra)
        assert all((point in times) != perturb for point in (0.0, 0.5))
        assert all(0 <= time <= 1 for time in times)
        if solver is odeint_adjoint:
            times.clear()
            y.sum().backward()
            assert all((point in times) != perturb for point in (1.0, 0.5))

    @pytest.mark.parametrize("limit", [0, 10**9])
    def test_grid_methods_do_not_look_ahead(self, limit, monkeypatch):
        monkeypatch.setattr("sknode.ode.torchdiffeq.forward.TAPE_NUMBERS", limit)
        f = Field()
        with torch.no_grad():
            odeint(f, doubles(1.0, 2.0, 3.0), doubles(*TIMES), method="euler")
        assert f.times == list(TIMES[:-1])

    def test_max_num_steps_counts_between_output_times(self):
        f, y0 = Field(), doubles(1.0, 2.0, 3.0)
        options = {"max_num_steps": 6}
        t = torch.linspace(0, 2, 9, dtype=torch.float64)
        odeint(f, y0, t, rtol=1e-9, options=options)
        with pytest.raises(AssertionError, match="max_num_steps") as error:
            odeint(f, y0, t[[0, -1]], rtol=1e-9, options=options)
        assert isinstance(error.value, SolverError)

    def test_safety_and_bounds_of_the_step_change(self):
        calls = []
        for options in ({}, {"safety": 0.3}, {"ifactor": 1.01}):
            f = Field()
            t = doubles(0.0, 2.0)
            odeint(f, doubles(1.0, 2.0, 3.0), t, rtol=1e-6, atol=1e-6, options=options)
            calls.append(f.calls)
        assert calls[0] < min(calls[1:])

    def test_unknown_ones_are_named(self):
        arguments = (lambda t, y: -y, doubles(1.0), doubles(0.0, 1.0))
        with pytest.warns(UserWarning, match=r"'dopri5'.*step_szie"):
            odeint(*arguments, options={"step_szie": 0.1})
        with pytest.warns(UserWarning, match=r"'rk4'.*first_step"):
            odeint(*arguments, method="rk4", options={"first_step": 0.1})


class TestCallbacks:
    @pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_adams"])
    def test_are_told_of_every_step(self, method):
        f, log = Field(), {}
        for suffix in ("", "_adjoint"):
            for name in (
                "callback_step",
                "callback_accept_step",
                "callback_reject_step",
            ):
                if method == "dopri5" or name == "callback_step":
                    log[name + suffix] = []
                    setattr(f, name + suffix, recorder(log[name + suffix]))
        options = {} if method == "dopri5" else {"step_size": 0.1}
        t = doubles(2.0, 1.0)
        y = odeint_adjoint(f, doubles(1.0, 2.0, 3.0), t, method=method, options=options)
        y.sum().backward()
        for suffix in ("", "_adjoint"):
            steps = log["callback_step" + suffix]
            assert all(dt > 0 for _, _, dt in steps)
            if method == "dopri5":
                accepted = log["callback_accept_step" + suffix]
                assert len(steps) == len(accepted) + len(
                    log["callback_reject_step" + suffix]
                )
            else:
                assert len(steps) == 10
        # in the user's time and the user's states
        assert log["callback_step"][0][0] == 2.0
        assert log["callback_step"][0][1].shape == (3,)
        assert log["callback_step_adjoint"][0][0] == 1.0
        assert len(log["callback_step_adjoint"][0][1]) == 4

    @pytest.mark.parametrize("method", ["rk4", "explicit_adams", "scipy_solver"])
    def test_that_are_never_called_are_named(self, method):
        f = Field()
        f.callback_accept_step = print
        with pytest.warns(UserWarning, match="does not call callback_accept_step"):
            odeint(f, doubles(1.0, 2.0, 3.0), doubles(0.0, 1.0), method=method)


def recorder(log):
    return lambda t, y, dt: log.append((t.item(), y, dt.item()))


class TestAdams:
    @pytest.mark.parametrize(
        ("method", "order"), [("explicit_adams", 3), ("implicit_adams", 4)]
    )
    def test_order_on_a_grid_of_uneven_steps(self, method, order, swirl):
        errors, counts = [], (80, 120, 180)
        for n in counts:
            spread = torch.linspace(0, 1, n + 1, dtype=torch.float64)
            t = 2 * (spread + 0.05 * torch.sin(6 * math.pi * spread))
            options = {"max_order": 4, "max_iters": 20}
            with torch.no_grad():
                y = odeint(
                    swirl.f, swirl.exact(t[:1, None])[0, 0], t, method=method,
                    rtol=1e-13, atol=1e-13, options=options,
                )  # fmt: skip
            reference = odeint(
                swirl.f, swirl.exact(t[:1, None])[0, 0], t[[0, -1]], rtol=1e-12
            )
            errors.append((y[-1] - reference[-1]).norm().item())
        slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
        assert -slope == pytest.approx(order, abs=0.4)

    def test_uneven_steps_do_not_cost_accuracy(self):
        spread = torch.linspace(0, 1, 101, dtype=torch.float64)
        t = 2 * (spread + 0.1 * torch.sin(2 * math.pi * spread) / math.pi)
        f, y0 = Field(), doubles(1.0, 2.0, 3.0)
        reference = odeint(f, y0, t, rtol=1e-12, atol=1e-12)
        settings = {"method": "implicit_adams", "rtol": 1e-10, "atol": 1e-10}
        ours = (odeint(f, y0, t, **settings) - reference).abs().max()
        theirs = (torchdiffeq.odeint(f, y0, t, **settings) - reference).abs().max()
        assert ours < 1e-7 < theirs

    def test_says_when_the_implicit_equation_is_not_solved(self):
        t = torch.linspace(0, 2, 9)
        with pytest.warns(UserWarning, match="max_iters=1"):
            odeint(
                lambda t, y: -3 * y,
                torch.ones(1),
                t,
                method="implicit_adams",
                options={"max_iters": 1},
            )


class TestEvents:
    @pytest.mark.parametrize(
        "settings",
        [
            {"method": "dopri5"},
            {"method": "dopri8"},
            {"method": "rk4", "options": {"step_size": 0.01, "interp": "cubic"}},
            {
                "method": "explicit_adams",
                "options": {"step_size": 0.01, "interp": "cubic"},
            },
        ],
    )
    @pytest.mark.parametrize("grad", [False, True])
    def test_the_first_of_several_ends_the_solve(self, settings, grad):
        def event_fn(t, y):
            return torch.stack([y[0] - 0.5, 0.2 - y[0]])

        y0 = doubles(1.0).requires_grad_(grad)
        t, y = odeint(
            lambda t, y: -y, y0, doubles(0.0, 1.0), event_fn=event_fn, **settings
        )
        assert y.shape == (2, 1)
        assert t.item() == pytest.approx(math.log(2), abs=1e-5)
        assert y[1].item() == pytest.approx(0.5, abs=1e-5)

    def test_may_lie_far_beyond_the_second_time(self):
        t, _ = odeint(
            lambda t, y: torch.ones_like(y),
            doubles(0.0),
            doubles(0.0, 1.0),
            event_fn=lambda t, y: y - 3e5,
        )
        assert t.item() == pytest.approx(3e5, rel=1e-9)

    def test_time_is_differentiable_by_what_the_event_depends_on(self):
        level = doubles(0.5).requires_grad_()
        t, _ = odeint_event(
            lambda t, y: -y,
            doubles(1.0),
            doubles(0.0)[0],
            event_fn=lambda t, y: y - level,
        )
        (grad,) = torch.autograd.grad(t.sum(), level)
        assert grad.item() == pytest.approx(-2.0, rel=1e-6)

    def test_that_hold_at_the_start_end_at_once(self):
        y0 = doubles(1.0).requires_grad_()
        t, y = odeint(
            lambda t, y: -y, y0, doubles(3.0, 4.0), event_fn=lambda t, y: y - 1
        )
        assert t.item() == 3.0
        torch.testing.assert_close(y, torch.ones(2, 1, dtype=torch.float64))

    def test_bad_arguments(self):
        arguments = (lambda t, y: -y, doubles(1.0))
        event_fn = {"event_fn": lambda t, y: y - 0.5}
        with pytest.raises(ValueError, match="t must be of length 2"):
            odeint(*arguments, doubles(0.0, 1.0, 2.0), **event_fn)
        with pytest.raises(ValueError, match="step_size"):
            odeint(*arguments, doubles(0.0, 1.0), method="rk4", **event_fn)
        with pytest.raises(ValueError, match="method must be one that supports"):
            odeint(*arguments, doubles(0.0, 1.0), method="scipy_solver", **event_fn)
        with pytest.raises(OdeintError, match="did not cross zero"):
            odeint(
                *arguments,
                doubles(0.0, 1.0),
                method="euler",
                options={"step_size": 0.1},
                event_fn=lambda t, y: y + 1,
            )


class TestDense:
    @pytest.mark.parametrize("end", [3.0, -2.0])
    def test_is_the_solution_as_a_function(self, end):
        f, y0 = Field(), doubles(1.0, 2.0, 3.0)
        t = torch.linspace(0, end, 30, dtype=torch.float64)
        solution = odeint_dense(f, y0, t[0], t[-1])
        torch.testing.assert_close(
            solution(t), odeint(f, y0, t), rtol=1e-12, atol=1e-12
        )
        assert solution(t[3]).shape == (3,)
        with pytest.raises(ValueError, match="interval"):
            solution(doubles(2 * end))

    def test_gradients(self):
        y0 = doubles(1.0).requires_grad_()
        at = doubles(0.3, 0.7).requires_grad_()

        def run(y0, at):
            return odeint_dense(lambda t, y: -(y**2), y0, 0.0, 1.0)(at)

        assert torch.autograd.gradcheck(run, (y0, at))


class TestScipy:
    @pytest.mark.parametrize("solver", ["RK45", "DOP853", "BDF", "LSODA"])
    @pytest.mark.parametrize("reverse", [False, True])
    def test_solves(self, solver, reverse):
        f, y0, t = Field(), doubles(1.0, 2.0, 3.0), doubles(*TIMES)
        t = t.flip(0) if reverse else t
        settings = {"method": "scipy_solver", "options": {"solver": solver}}
        y = odeint(f, y0, t, **settings)
        assert not y.requires_grad
        torch.testing.assert_close(y, odeint(f, y0, t).detach(), rtol=1e-4, atol=1e-5)

    def test_complex_states_where_scipy_has_them(self):
        y0, t = torch.ones(1, dtype=torch.complex128), doubles(0.0, 1.0)
        settings = {"method": "scipy_solver"}
        y = odeint(lambda t, y: 1j * y, y0, t, options={"solver": "RK45"}, **settings)
        expected = torch.exp(torch.tensor([1j]))
        torch.testing.assert_close(y[-1], expected.to(y.dtype), rtol=1e-5, atol=0)
        with pytest.raises(ValueError, match="complex"):
            odeint(lambda t, y: 1j * y, y0, t, options={"solver": "LSODA"}, **settings)


class TestErrors:
    @pytest.mark.parametrize("argument", ["func", "y0", "t", "method", "gradient"])
    def test_of_wrong_kind(self, argument):
        arguments = {
            "func": lambda t, y: -y,
            "y0": doubles(1.0),
            "t": doubles(0.0, 1.0),
        }
        with pytest.raises((TypeError, ValueError), match=f"{argument} must be"):
            odeint(**(arguments | {argument: "wrong"}))

    @pytest.mark.parametrize(
        "t", [doubles(0.0, 0.0, 1.0), doubles(0.0, 2.0, 1.0), doubles()]
    )
    def test_of_times_out_of_order_are_assertions_too(self, t):
        with pytest.raises(ValueError, match="t must be") as error:
            odeint(lambda t, y: -y, doubles(1.0), t)
        assert isinstance(error.value, AssertionError)

    def test_of_integer_times(self):
        with pytest.raises(TypeError, match="t must be of a floating dtype"):
            odeint(lambda t, y: -y, doubles(1.0), torch.tensor([0, 1]))

    def test_of_slopes_in_another_shape(self):
        with pytest.raises(ValueError, match="func must return slopes of shape"):
            odeint(lambda t, y: y[:1], doubles(1.0, 2.0), doubles(0.0, 1.0))
        with pytest.raises(TypeError, match="func must return a tuple of 2"):
            odeint(lambda t, y: y[0], (doubles(1.0), doubles(2.0)), doubles(0.0, 1.0))

    def test_of_tolerances(self):
        arguments = (lambda t, y: (-y[0],), (doubles(1.0),), doubles(0.0, 1.0))
        with pytest.raises(ValueError, match="rtol must be"):
            odeint(*arguments, rtol=(1e-3, 1e-3))
        with pytest.raises(ValueError, match="atol must be"):
            odeint(*arguments, atol=-1.0)

    def test_of_grids(self):
        arguments = (lambda t, y: -y, doubles(1.0), doubles(0.0, 1.0))
        options = {"grid_constructor": lambda f, y0, t: doubles(0.0, 2.0)}
        with pytest.raises(ValueError, match="grid_constructor must be"):
            odeint(*arguments, method="rk4", options=options)
        with pytest.raises(ValueError, match="interp must be"):
            odeint(*arguments, method="rk4", options={"interp": "spline"})
        with pytest.raises(ValueError, match="must not repeat"):
            options = {"step_t": doubles(0.5), "jump_t": doubles(0.5)}
            odeint(*arguments, options=options)

    def test_of_solves_that_blow_up_say_where(self):
        t = doubles(0.0, 2.0)
        with pytest.raises(AssertionError, match=r"stopped at t = 1:") as error:
            odeint(lambda t, y: y**2, doubles(1.0), t)
        assert isinstance(error.value, SolverError)
