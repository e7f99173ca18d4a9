"""Output times: grids, rows, directions, and agreement with other solvers."""

import numpy as np
import pytest
import torch
import torchdiffeq
from scipy.integrate import solve_ivp

from sknode.ode import METHODS, solve_ode

FIXED = ("euler", "midpoint", "rk4")
ADAPTIVE = [m for m in METHODS if m not in FIXED]


def f(t, y):
    return torch.cos(3 * t) * y - torch.sin(2 * y) + torch.sin(t)


@pytest.fixture
def y0():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, generator=generator, dtype=torch.float64)


def exact(y0, t):
    return solve_ode(f, y0, t, method="dopri8", rtol=1e-13, atol=1e-13).y


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5", "dopri8", "adams"])
@pytest.mark.parametrize("step_control", ["per_sample", "shared"])
@pytest.mark.parametrize("ends", [(0.0, 3.0), (3.0, -1.0)])
def test_dense_output_is_as_accurate_as_the_steps(method, step_control, ends, y0):
    t = torch.linspace(*ends, 57, dtype=torch.float64)
    solution = solve_ode(
        f, y0, t, method=method, step_control=step_control, rtol=1e-7, atol=1e-7
    )
    assert (solution.y - exact(y0, t)).abs().max() < 2e-5


def test_agrees_with_scipy(y0):
    times = np.linspace(0, 2, 9)
    for row, start in zip(exact(y0, torch.from_numpy(times)), y0, strict=True):
        reference = solve_ivp(
            lambda t, y: f(torch.tensor(t), torch.from_numpy(y)).numpy(),
            (0, 2),
            start.numpy(),
            "DOP853",
            times,
            rtol=1e-12,
            atol=1e-12,
        )
        np.testing.assert_allclose(row.numpy(), reference.y.T, atol=1e-9)


def test_agrees_with_torchdiffeq(y0):
    t = torch.linspace(0, 2, 5, dtype=torch.float64)
    ours = solve_ode(f, y0, t, step_control="shared", rtol=1e-9, atol=1e-9).y
    theirs = torchdiffeq.odeint(f, y0, t, rtol=1e-9, atol=1e-9).transpose(0, 1)
    assert (ours - theirs).abs().max() < 1e-7


@pytest.mark.parametrize("method", ADAPTIVE)
def test_output_times_change_no_step(method, y0):
    ends = solve_ode(f, y0, [0.0, 3.0], method=method)
    many = solve_ode(f, y0, torch.linspace(0, 3, 40), method=method)
    assert torch.equal(many.y[:, -1], ends.y[:, -1])
    assert torch.equal(many.stats["n_steps"], ends.stats["n_steps"])


@pytest.mark.parametrize("method", ["dopri5", "adams"])
def test_a_row_of_times_for_every_sample(method, y0):
    def solve(y0, t):
        return solve_ode(f, y0, t, method=method)

    grid = torch.linspace(0, 2, 5, dtype=torch.float64)
    rows = grid.expand(6, -1)
    assert torch.equal(solve(y0, rows).y, solve(y0, grid).y)
    # other lengths, directions, none at all
    factor = torch.tensor([1.0, -1.0, 0.1, 0.0, 2.0, -0.3], dtype=torch.float64)
    ragged = rows * factor[:, None]
    solution = solve(y0, ragged)
    for i in range(6):
        alone = solve(y0[i : i + 1], ragged[i])
        assert torch.equal(solution.y[i], alone.y[0])
    assert torch.equal(solution.y[3], y0[3].expand(5, 3))
    assert solution.stats["n_f_evals"][3] == 0


def test_repeated_times_repeat_the_state(y0):
    t = torch.tensor([0.0, 0.0, 0.7, 0.7, 1.0, 1.0], dtype=torch.float64)
    y = solve_ode(f, y0, t).y
    assert torch.equal(y[:, 0], y[:, 1])
    assert torch.equal(y[:, 2], y[:, 3])
    torch.testing.assert_close(y[:, 4], y[:, 5], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("method", ["dopri5", "adams"])
@pytest.mark.parametrize("t", [[1.5], [2, 2], torch.tensor([3])])
def test_intervals_without_length_return_y0(t, method, y0):
    solution = solve_ode(f, y0, t, method=method)
    assert solution.success
    assert torch.equal(solution.y, y0[:, None].expand(-1, len(t), -1))


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 2, 3)])
@pytest.mark.parametrize("step_control", ["per_sample", "shared"])
def test_states_have_any_shape(shape, step_control):
    y0 = torch.linspace(0.1, 1, int(np.prod(shape)), dtype=torch.float64)
    y0 = y0.reshape(shape)

    def decay(t, y):
        assert y.shape == shape
        return -y * (1 + 0 * t)

    y = solve_ode(decay, y0, [0.0, 0.5, 1.0], step_control=step_control).y
    assert y.shape == (shape[0], 3, *shape[1:])
    torch.testing.assert_close(y[:, 2], y0 * np.exp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["dopri5", "adams"])
def test_interpolate_gives_what_output_times_would(method, y0):
    def solve(t):
        return solve_ode(f, y0, t, method=method)

    solution = solve([0.0, 2.0])
    t = torch.tensor([1.7, 0.2, 0.9], dtype=torch.float64)
    ordered = solve([0.0, 0.2, 0.9, 1.7, 2.0]).y
    assert torch.equal(solution.interpolate(t), ordered[:, [3, 1, 2]])
    back = solve([2.0, 0.0]).interpolate(t)
    assert torch.equal(back, solve([2.0, 1.7, 0.9, 0.2, 0.0]).y[:, [1, 3, 2]])
    with pytest.raises(ValueError, match="between the first and the last"):
        solution.interpolate(torch.tensor([2.1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": [0.0, 2.0, 1.0]}, "monotonic"),
        ({"t": [0.0, float("nan")]}, "finite"),
        ({"t": torch.zeros(2, 3)}, "shape"),
        ({"t": []}, "shape"),
        ({"method": "rk5"}, "method"),
        ({"method": "rk4"}, "step_size"),
        ({"rtol": -1.0}, "rtol"),
        ({"atol": float("nan")}, "atol"),
        ({"rtol": 0.0, "atol": 0.0}, "both be zero"),
        ({"max_steps": 0}, "max_steps"),
        ({"first_step": 0.0}, "first_step"),
        ({"step_control": "each"}, "step_control"),
        ({"gradient": "none"}, "gradient"),
        ({"controller": "PD"}, "controller"),
        ({"f": lambda t, y: y[:, :1]}, "shape of y"),
        ({"y0": torch.tensor(1.0)}, "batch dimension"),
    ],
)
def test_bad_arguments_are_named(change, message, y0):
    arguments = {"f": f, "y0": y0, "t": [0.0, 1.0], **change}
    with pytest.raises(ValueError, match=message):
        solve_ode(arguments.pop("f"), arguments.pop("y0"), **arguments)


def test_wrong_types_are_named(y0):
    with pytest.raises(TypeError, match="y0 must be a torch tensor"):
        solve_ode(f, [1.0], [0.0, 1.0])
    with pytest.raises(TypeError, match="float32 or float64"):
        solve_ode(f, torch.ones(2, 2, dtype=torch.int64), [0.0, 1.0])
    with pytest.raises(TypeError, match="f must return a tensor"):
        solve_ode(lambda t, y: 0.0, y0, [0.0, 1.0])
    with pytest.raises(TypeError, match="f must be callable"):
        solve_ode(None, y0, [0.0, 1.0])
