"""When the kernels serve, when torch does, and that nobody is misled by memory."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from sknode.fields import MLPField
from sknode.ode import kernels, solve_ode
from sknode.ode.solve import _make_options

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)


def test_the_fastest_set_is_chosen(monkeypatch):
    sets = kernels.instruction_sets()
    assert sets[-1] == "baseline" and kernels.chosen() == sets[0]
    with kernels.use("baseline"):
        assert kernels.chosen() == "baseline"
        with kernels.reference():
            assert kernels.chosen() == "reference"
        assert kernels.chosen() == "baseline"
    assert kernels.chosen() == sets[0]


def test_sets_that_the_processor_lacks_are_not_chosen(
    monkeypatch, make_field, make_states, run
):
    known = kernels._native.instruction_sets()
    without = tuple((name, name == "baseline") for name, _ in known)
    monkeypatch.setattr(kernels, "_native", Native(without))
    kernels._sets.cache_clear()
    try:
        assert kernels.instruction_sets() == ("baseline",)
        assert kernels.chosen() == "baseline"
        with (
            pytest.raises(ValueError, match="instruction_set must be"),
            kernels.use(known[0][0] if len(known) > 1 else "other"),
        ):
            pass
        assert run(make_field(2, (3,)), make_states(3, 2), T).fused
    finally:
        kernels._sets.cache_clear()


class Native:
    """The compiled module on another processor."""

    def __init__(self, sets):
        self._sets, self._module = sets, kernels._native

    def instruction_sets(self):
        return self._sets

    def __getattr__(self, name):
        return getattr(self._module, name)


@pytest.mark.parametrize("name", ["sse9", "", None])
def test_unknown_sets_are_refused(name):
    with pytest.raises(ValueError, match="instruction_set must be 'reference' or one"):
        with kernels.use(name):
            pass


def test_an_environment_variable_switches_them_off():
    code = "from sknode.ode import kernels; print(kernels.chosen())"
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SKNODE_KERNELS": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "reference"


def test_without_kernels_torch_serves_and_says_so_once(
    monkeypatch, caplog, make_field, make_states, run
):
    field, y0 = make_field(2, (5,)), make_states(3, 2)
    expected = run(field, y0, T)
    monkeypatch.setattr(kernels, "_native", None)
    kernels._sets.cache_clear()
    kernels._say_that_there_are_none.cache_clear()
    try:
        assert not kernels.available() and kernels.instruction_sets() == ()
        assert kernels.chosen() == "reference"
        with caplog.at_level(logging.INFO, logger="sknode"):
            run(lambda_module(), y0, T)  # no kernel could have solved this
            assert not caplog.records
            got = run(field, y0, T)
            run(field, y0, T)
    finally:
        kernels._sets.cache_clear()
    assert not got.fused
    torch.testing.assert_close(got.solution.y, expected.solution.y)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and record.name == "sknode"
    assert "without its compiled kernels" in record.getMessage()


def lambda_module():
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, t, y):
            return -self.rate * y

    return Field()


def test_gradients_of_times_come_from_torch(make_field, make_states, fused):
    field, y0 = make_field(2, (5,), time=True), make_states(4, 2)
    t = T.clone().requires_grad_()
    y = solve_ode(field, y0, t).y
    assert not fused(y)
    (grad,) = torch.autograd.grad(y[:, -1].sum(), t)
    slope = field(t[-1], y[:, -1]).sum()
    torch.testing.assert_close(grad[-1], slope, rtol=1e-3, atol=1e-4)
    assert fused(solve_ode(field, y0, t.detach()).y)


def test_frozen_parameters_get_no_gradient(instruction_set, make_field, make_states):
    field, y0 = make_field(3, (6, 5)), make_states(5, 3)
    solve_ode(field, y0, T).y.sum().backward()
    everything = [p.grad.clone() for p in field.parameters()]
    field.zero_grad()
    frozen = (field.layers[1].weight, field.layers[2].bias)
    for p in frozen:
        p.requires_grad_(False)
    solve_ode(field, y0, T).y.sum().backward()
    for p, expected in zip(field.parameters(), everything, strict=True):
        if p.requires_grad:
            assert torch.equal(p.grad, expected)
        else:
            assert p.grad is None
    field.requires_grad_(False)
    assert not solve_ode(field, y0, T).y.requires_grad
    start = y0.clone().requires_grad_()
    solve_ode(field, start, T).y.sum().backward()
    assert start.grad.abs().min() > 0


def test_a_layer_may_be_used_twice(make_states, compare):
    torch.manual_seed(0)
    first, shared, last = (
        nn.Linear(a, b).double() for a, b in ((3, 6), (6, 6), (6, 3))
    )
    field = MLPField.from_linears([first, shared, shared, last])
    compare(field, make_states(9, 3), T)


def test_parameters_may_lie_anywhere(make_states, compare):
    torch.manual_seed(0)
    field = MLPField(3, (6, 5)).double()
    plain = [p.detach().clone() for p in field.parameters()]
    for layer in field.layers:
        weight, bias = layer.weight.detach(), layer.bias.detach()
        strided = torch.zeros(2 * len(bias), dtype=bias.dtype)[::2].copy_(bias)
        layer.weight = nn.Parameter(weight.t().contiguous().t())
        layer.bias = nn.Parameter(strided)
        assert not layer.weight.is_contiguous() and not layer.bias.is_contiguous()
    y0 = make_states(9, 3)
    got = compare(field, y0, T)
    with torch.no_grad():
        for p, value in zip(field.parameters(), plain, strict=True):
            p.set_(value)
        torch.testing.assert_close(
            solve_ode(field, y0, T).y, got.y, rtol=1e-12, atol=1e-12
        )


def test_signs_that_are_still_to_be_applied(make_field, make_states, run):
    # the imaginary part of a conjugate is memory with the other sign
    field, values = make_field(2, (5,)), make_states(4, 2)
    lazy = torch.complex(values, -values).conj().imag
    assert lazy.is_neg() and torch.equal(lazy, values)
    with torch.no_grad():
        assert torch.equal(solve_ode(field, lazy, T).y, solve_ode(field, values, T).y)
    start = values.clone().requires_grad_()
    y = solve_ode(field, start, T).y
    (expected,) = torch.autograd.grad(y, start, torch.ones_like(y), retain_graph=True)
    ones = torch.ones_like(y)
    (got,) = torch.autograd.grad(y, start, torch.complex(ones, -ones).conj().imag)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32")])
def test_dtypes_that_differ_are_named(dtypes, make_field, make_states):
    field = make_field(2, (5,), dtype=getattr(torch, dtypes[0]))
    y0 = make_states(4, 2, dtype=getattr(torch, dtypes[1]))
    for start in (y0, y0.clone().requires_grad_()):
        with pytest.raises(
            TypeError, match=rf"y0 is torch.{dtypes[1]}, .* torch.{dtypes[0]}"
        ):
            solve_ode(field, start, T)


def spoil_dtype(field):
    field.layers[1].float()


def spoil_shape(field):
    field.layers[1] = nn.Linear(6, 3).double()


def spoil_dim(field):
    field.layers[1] = nn.Linear(5, 2).double()


def spoil_device(field):
    field.layers[1].to("meta")


def spoil_bias_shape(field):
    field.layers[0].bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize(
    "spoil",
    [
        *(spoil_dtype, spoil_shape, spoil_dim),
        *(spoil_device, spoil_bias_shape),
    ],
)
def test_layers_that_do_not_fit_are_left_to_torch(spoil, make_field, make_states):
    # which refuses them, where the kernels would read wherever
    field, y0 = make_field(3, (5,)), make_states(4, 3)
    spoil(field)
    bound, options = field.closed_form(y0.shape[1:]), _make_options(y0.dtype)
    assert not kernels.serves(bound, y0, T, options)
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)):
        solve_ode(field, y0, T)


def test_biases_of_another_dtype_are_left_to_torch(make_field, make_states, run):
    # which promotes them
    field, y0 = make_field(3, (5,)), make_states(4, 3)
    expected = run(field, y0, T).solution.y
    field.layers[1].bias = nn.Parameter(field.layers[1].bias.float())
    got = run(field, y0, T)
    assert not got.fused
    torch.testing.assert_close(got.solution.y, expected, rtol=1e-6, atol=1e-6)


def test_subclasses_and_hooks_are_left_to_torch(make_field, make_states, run):
    class Twice(MLPField):
        def forward(self, t, y):
            return 2 * super().forward(t, y)

    field = make_field(3, (5,))
    hooked, watched = make_field(3, (5,)), make_field(3, (5,))
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    watched.layers[0].register_forward_pre_hook(lambda module, args: None)
    twice = Twice.from_linears(list(field.layers))
    y0 = make_states(4, 3)
    assert run(field, y0, T).fused
    outcomes = [run(f, y0, T) for f in (twice, hooked, watched)]
    assert not any(outcome.fused for outcome in outcomes)
    assert torch.equal(outcomes[0].solution.y, outcomes[1].solution.y)


@pytest.mark.parametrize("settings", [{"step_control": "shared"}])
def test_coupled_samples_are_left_to_torch(settings, make_field, make_states, run):
    assert not run(make_field(3, (5,)), make_states(4, 3), T, **settings).fused


def test_parameters_resized_in_between_are_refused(make_field, make_states):
    # changing the memory under a tensor escapes torch's own notice
    field = make_field(3, (5,))
    y = solve_ode(field, make_states(4, 3), T).y
    field.layers[0].weight.data = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"size|shape"):
        y.sum().backward()


def test_bad_arguments_of_the_compiled_module_raise():
    native = kernels._native
    for arguments in ((), (0,), (0, True, (), (), ()), (0, True, 1, 2, 3)):
        with pytest.raises((IndexError, TypeError)):
            native.solve(*arguments)
    with pytest.raises((IndexError, TypeError, ValueError)):
        native.reverse(None, 0, 0, (), 1)
    with pytest.raises(ValueError):
        native.recorded_bytes("steps")
