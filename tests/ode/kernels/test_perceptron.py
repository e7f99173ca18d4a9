"""The fused perceptron: that of torch, row by row, with exact gradients."""

import itertools

import pytest
import torch
from torch import nn

from sknode._series.decoder import evaluate
from sknode.fields.activations import ACTIVATIONS, get_activation
from sknode.ode import kernels
from sknode.ode.kernels import perceptron as kernel
from sknode.ode.vector_field import Perceptron


def make_problem(sizes, n, activation="tanh", dtype=torch.float64, seed=0):
    """Make layers of some sizes, and rows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return x.requires_grad_()

    layers = [
        ((normal(m, k) / k**0.5).detach().requires_grad_(), normal(m))
        for k, m in itertools.pairwise(sizes)
    ]
    return Perceptron(layers, activation, uses_time=False), normal(n, sizes[0])


def by_torch(network, x):
    """Evaluate layer by layer."""
    function = get_activation(network.activation).function
    for i, (weight, bias) in enumerate(network.layers):
        x = nn.functional.linear(function(x) if i else x, weight, bias)
    return x


def differentiate(network, x, function=evaluate):
    """Return outputs, the gradients of some function of them, and whether they were
    fused.
    """
    out = function(network, x)
    weight = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    sources = [t for t in (x, *network.parameters) if t.requires_grad]
    grads = torch.autograd.grad((weight * out).sum(), sources)
    return out.detach(), grads, "Fused" in type(out.grad_fn).__name__


SIZES = [((4, 20, 2), 100), ((3, 5), 1), ((1, 1, 1), 700), ((7, 150, 140, 3), 300)] + [
    (
        tuple(int(torch.randint(1, 40, (), generator=g)) for _ in range(2 + i % 3)),
        int(torch.randint(1, 600, (), generator=g)),
    )
    for g in [torch.Generator().manual_seed(1)]
    for i in range(9)
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("sizes", "n"), SIZES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float64, 1e-13), (torch.float32, 1e-5)]
)
def test_it_is_the_perceptron_of_torch(
    sizes, n, activation, dtype, within, instruction_set
):
    problem = make_problem(sizes, n, activation, dtype)
    expected, grads, _ = differentiate(*problem, by_torch)
    got, found, fused = differentiate(*problem)
    assert fused
    size = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(got, expected, rtol=0, atol=within * size)
    scale = max(1.0, *(float(g.abs().max()) for g in grads))
    for one, other in zip(found, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=within * scale)
    with torch.no_grad():
        assert torch.equal(evaluate(*problem), got)
    with kernels.reference():
        plain, found, fused = differentiate(*problem)
    assert not fused
    torch.testing.assert_close(plain, expected, rtol=0, atol=within * size)
    for one, other in zip(found, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=within * scale)


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_layers_without_biases(which, instruction_set):
    network, x = make_problem((4, 9, 3), 70)
    layers = [(w, None if i in which else b) for i, (w, b) in enumerate(network.layers)]
    problem = Perceptron(layers, "tanh", uses_time=False), x
    expected, grads, _ = differentiate(*problem, by_torch)
    got, found, fused = differentiate(*problem)
    assert fused
    with kernels.reference():
        plain, others, fused = differentiate(*problem)
    assert not fused
    for one, other, third in zip(
        (got, *found), (expected, *grads), (plain, *others), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        torch.testing.assert_close(third, other, rtol=0, atol=1e-12)


def test_a_backward_uses_the_instructions_of_its_forward(instruction_set):
    network, x = make_problem((4, 9, 3), 70)
    _, expected, _ = differentiate(network, x)
    out = evaluate(network, x)
    weight = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    for choice in ("reference", kernels.instruction_sets()[-1]):
        with kernels.use(choice):
            found = torch.autograd.grad(
                (weight * out).sum(), (x, *network.parameters), retain_graph=True
            )
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_gradcheck(activation, instruction_set):
    network, x = make_problem((3, 6, 5, 2), 40, activation)

    def function(x, *parameters):
        layers = list(zip(parameters[::2], parameters[1::2], strict=True))
        return evaluate(Perceptron(layers, activation, uses_time=False), x)

    assert torch.autograd.gradcheck(function, (x, *network.parameters))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_do_not_depend_on_each_other(dtype, activation, instruction_set):
    network, x = make_problem((4, 9, 3), 300, activation, dtype)
    everyone, (grad, *_), _ = differentiate(network, x)
    weight = torch.cos(torch.arange(everyone.numel(), dtype=dtype)).view_as(everyone)
    generator = torch.Generator().manual_seed(0)
    choices = [torch.randperm(300, generator=generator), torch.arange(300).repeat(2)]
    choices += [torch.arange(n) for n in (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 257)]
    choices += [torch.tensor([i]) for i in range(290, 300)]
    for index in choices:
        rows = x.detach()[index].requires_grad_()
        some = evaluate(network, rows)
        assert torch.equal(some, everyone[index])
        (found,) = torch.autograd.grad((weight[index] * some).sum(), rows)
        assert torch.equal(found, grad[index])
        with torch.no_grad():
            assert torch.equal(evaluate(network, rows), some)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numbers_that_are_none_stay_in_their_rows(value, activation, instruction_set):
    network, x = make_problem((3, 8, 2), 90, activation)
    expected = evaluate(network, x)
    bad = x.detach().clone()
    bad[::4, 1] = value
    got = evaluate(network, bad)
    hit = torch.zeros(90, dtype=torch.bool)
    hit[::4] = True
    assert torch.equal(got[~hit], expected[~hit])
    if value is torch.nan:
        assert got[hit].isnan().all()
    (clean,) = torch.autograd.grad(expected.sum(), x)
    bad.requires_grad_()
    (grad,) = torch.autograd.grad(evaluate(network, bad).sum(), bad)
    assert torch.equal(grad[~hit], clean[~hit])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [1, 300, 5000])
def test_threads_change_no_bit(dtype, n, instruction_set, monkeypatch):
    monkeypatch.setattr(kernel, "THREAD_WORK", 0)
    problem = make_problem((4, 19, 3), n, "silu", dtype)
    expected, grads, _ = differentiate(*problem)
    # more than there are processors, so that they do take turns
    for threads in (2, 7):
        torch.set_num_threads(threads)
        got, found, _ = differentiate(*problem)
        assert torch.equal(got, expected)
        assert all(map(torch.equal, found, grads))


def test_rows_and_parameters_may_lie_anywhere(instruction_set):
    network, x = make_problem((4, 9, 3), 70)
    expected, grads, _ = differentiate(network, x)
    layers = [
        (weight.detach().t().contiguous().t().requires_grad_(), bias)
        for weight, bias in network.layers
    ]
    spread = torch.zeros(4, 140, dtype=torch.float64).t()[::2]
    spread.copy_(x.detach())
    moved = Perceptron(layers, "tanh", uses_time=False)
    got, found, fused = differentiate(moved, spread.requires_grad_())
    assert fused and torch.equal(got, expected)
    assert all(map(torch.equal, found, grads))
    out = evaluate(network, x)
    (grad,) = torch.autograd.grad(out.sum(), x)  # of a number for all of them
    (full,) = torch.autograd.grad(evaluate(network, x), x, torch.ones_like(out))
    assert torch.equal(grad, full)


def test_what_is_frozen_gets_no_gradient(instruction_set):
    network, x = make_problem((4, 9, 3), 70)
    _, grads, _ = differentiate(network, x)
    x.requires_grad_(False)
    network.layers[0][0].requires_grad_(False)
    network.layers[1][1].requires_grad_(False)
    _, found, fused = differentiate(network, x)
    assert fused and all(map(torch.equal, found, [grads[2], grads[3]]))
    for p in network.parameters:
        p.requires_grad_(False)
    assert not evaluate(network, x).requires_grad


class Subclass(torch.Tensor):
    """A tensor whose values may be anywhere."""


@pytest.mark.parametrize(
    "spoil",
    [
        lambda layers, x: (layers, x.float()),
        lambda layers, x: (layers, x.half()),
        lambda layers, x: (layers, x[:, :3]),
        lambda layers, x: (layers, x[None]),
        lambda layers, x: (layers, x[:0]),
        lambda layers, x: (layers, x.to("meta")),
        lambda layers, x: (layers, x.as_subclass(Subclass)),
        lambda layers, x: ([(layers[0][0].float(), layers[0][1]), layers[1]], x),
        lambda layers, x: ([layers[0], (layers[1][0][:, 1:], layers[1][1])], x),
        lambda layers, x: ([layers[0], (layers[1][0][:0], layers[1][1][:0])], x),
        lambda layers, x: ([layers[0], (layers[1][0], layers[1][1][1:])], x),
        lambda layers, x: ([layers[0], (layers[1][0].to("meta"), layers[1][1])], x),
    ],
)
def test_what_does_not_fit_is_left_to_torch(spoil):
    network, x = make_problem((4, 9, 3), 20)
    assert kernel.serves(network, x)
    with torch.no_grad():
        layers, x = spoil(network.layers, x)
    assert not kernel.serves(Perceptron(layers, "tanh", uses_time=False), x)
    assert not kernel.serves(Perceptron(network.layers, "tanh", uses_time=True), x)


def test_without_kernels_torch_serves(monkeypatch):
    problem = make_problem((4, 9, 3), 20)
    expected, _, fused = differentiate(*problem)
    assert fused
    monkeypatch.setattr(kernels, "_native", None)
    got, _, fused = differentiate(*problem)
    assert not fused
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_no_rows():
    network, x = make_problem((4, 9, 3), 0)
    out, (grad, *_), fused = differentiate(network, x)
    assert not fused and out.shape == (0, 3) and grad.shape == (0, 4)


@pytest.mark.parametrize("power", [1, 2])
def test_gradients_have_no_gradient(power):
    network, x = make_problem((4, 9, 3), 20)
    loss = (evaluate(network, x) ** power).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_parameters_changed_in_between_are_refused():
    network, x = make_problem((4, 9, 3), 20)
    out = evaluate(network, x)
    with torch.no_grad():
        network.layers[1][0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(("layer", "shape"), [(0, (9, 1)), (1, (2, 9))])
def test_parameters_resized_in_between_are_refused(layer, shape):
    # changing the memory under a tensor escapes torch's own notice
    network, x = make_problem((4, 9, 3), 20)
    out = evaluate(network, x)
    network.layers[layer][0].data = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"size|shape"):
        out.sum().backward()


@pytest.mark.parametrize("n", [19, 21, 5000])
def test_rows_resized_in_between_are_refused(n):
    network, x = make_problem((4, 9, 3), 20)
    out = evaluate(network, x)
    x.data = torch.zeros(n, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"size|shape"):
        torch.autograd.grad(out.sum(), network.parameters)


@pytest.mark.parametrize("threads", [1, 2])
def test_signals_end_a_call(threads, interrupted_after):
    torch.set_num_threads(threads)
    network, _ = make_problem((1, 200, 200, 1), 1)
    x = torch.zeros(500_000, 1, dtype=torch.float64)
    with torch.no_grad(), interrupted_after(0.3):
        for _ in itertools.repeat(None):
            kernel.evaluate(network, x)


def test_bad_arguments_of_the_compiled_module_raise():
    for function in (kernels._native.evaluate, kernels._native.evaluate_back):
        for arguments in ((), (0, True), (0, True, (), ())):
            with pytest.raises((IndexError, TypeError)):
                function(*arguments)
    described = (0, False, 1, None, (0, 0, 1, 1))
    with pytest.raises(ValueError, match="instruction set not available"):
        kernels._native.evaluate(99, True, described, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="instruction set not available"):
        kernels._native.evaluate_back(99, True, described, 0, 0, 0, 1, 0, 0, ((0, 0),))
