"""The fused recurrence: that of torch, sample by sample, with exact gradients."""

import itertools

import pytest
import torch
from torch import nn

from sknode._series.recurrent import last_state
from sknode.ode import kernels
from sknode.ode.kernels import recurrent as kernel

NAMES = "weight_ih", "weight_hh", "bias_ih", "bias_hh"


def make_problem(n_inputs, size, length, batch, dtype=torch.float64, seed=0):
    """Make a unit, rows, and lengths of which some are zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    cell = nn.GRUCell(n_inputs, size, dtype=dtype)
    with torch.no_grad():
        for p in cell.parameters():
            p.copy_(normal(*p.shape) / max(1, p.shape[-1]) ** 0.5)
    lengths = torch.randint(length + 1, (batch,), generator=generator)
    lengths[: batch // 4 + 1] = length
    return cell, normal(batch, length, n_inputs), lengths


def differentiate(cell, inputs, lengths, read=last_state):
    """Return last states, the gradients of a function of them, and whether they were
    fused.
    """
    last = read(cell, inputs, lengths)
    weight = torch.cos(torch.arange(last.numel(), dtype=last.dtype)).view_as(last)
    grads = torch.autograd.grad((weight * last).sum(), list(cell.parameters()))
    fused = "Fused" in type(last.grad_fn).__name__
    return last.detach(), dict(zip(NAMES, grads, strict=True)), fused


def torch_gru(cell, inputs, lengths):
    """Read series by `torch.nn.GRU`, one by one."""
    gru = nn.GRU(*cell.weight_ih.shape[1:], cell.hidden_size, dtype=inputs.dtype)
    weights = {f"{name}_l0": p for name, p in cell.named_parameters()}
    states = [
        torch.func.functional_call(gru, weights, (x[:n].flip(0),))[1][0]
        if n
        else x.new_zeros(cell.hidden_size)
        for x, n in zip(inputs, lengths.tolist(), strict=True)
    ]
    return torch.stack(states)


SIZES = [(1, 1, 1, 1), (9, 40, 50, 70), (6, 25, 20, 33)] + [
    tuple(int(torch.randint(1, high, (), generator=g)) for high in (10, 41, 51, 71))
    for g in [torch.Generator().manual_seed(1)]
    for _ in range(9)
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float64, 1e-13), (torch.float32, 5e-6)]
)
def test_it_is_the_gru_of_torch(sizes, dtype, within, instruction_set):
    cell, inputs, lengths = make_problem(*sizes, dtype)
    expected, grads, fused = differentiate(cell, inputs, lengths, torch_gru)
    assert not fused
    got, found, fused = differentiate(cell, inputs, lengths)
    assert fused
    torch.testing.assert_close(got, expected, rtol=0, atol=within)
    scale = max(1.0, *(float(g.abs().max()) for g in grads.values()))
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=within * scale)
    with torch.no_grad():
        assert torch.equal(last_state(cell, inputs, lengths), got)
    with kernels.reference():
        plain, found, fused = differentiate(cell, inputs, lengths)
    assert not fused
    torch.testing.assert_close(plain, expected, rtol=0, atol=within)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=within * scale)


def test_large_units(instruction_set):
    # whose gradients are summed up in another way
    cell, inputs, lengths = make_problem(70, 130, 12, 40)
    got, found, _ = differentiate(cell, inputs, lengths)
    with kernels.reference():
        expected, grads, _ = differentiate(cell, inputs, lengths)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-11)


def test_gradcheck(instruction_set):
    cell, inputs, lengths = make_problem(3, 5, 6, 7)

    def read(*parameters):
        replaced = nn.GRUCell(3, 5, dtype=torch.float64)
        for name, p in zip(NAMES, parameters, strict=True):
            delattr(replaced, name)
            setattr(replaced, name, p)
        return last_state(replaced, inputs, lengths)

    parameters = tuple(cell.parameters())
    assert torch.autograd.gradcheck(
        read, [p.detach().requires_grad_() for p in parameters]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_series_do_not_depend_on_the_batch(dtype, instruction_set):
    cell, inputs, lengths = make_problem(4, 9, 13, 67, dtype)
    everyone = last_state(cell, inputs, lengths)
    generator = torch.Generator().manual_seed(0)
    choices = [torch.randperm(67, generator=generator), torch.arange(67).repeat(2)]
    choices += [torch.arange(n) for n in (1, 15, 16, 17, 33)]
    choices += [torch.tensor([i]) for i in range(67)]
    for index in choices:
        some = last_state(cell, inputs[index], lengths[index])
        assert torch.equal(some, everyone[index])
    # nor on padding
    end = int(lengths[20:].max())
    padded = torch.cat([inputs, torch.full_like(inputs, torch.nan)], 1)
    assert torch.equal(last_state(cell, padded, lengths), everyone)
    cut = last_state(cell, inputs[20:, :end], lengths[20:])
    assert torch.equal(cut, everyone[20:])


def test_padding_gives_no_gradient(instruction_set):
    cell, inputs, lengths = make_problem(4, 9, 13, 67)
    padded = torch.cat([inputs, torch.full_like(inputs, torch.nan)], 1)
    _, expected, _ = differentiate(cell, inputs, lengths)
    _, found, _ = differentiate(cell, padded, lengths)
    for name in NAMES:
        assert torch.equal(found[name], expected[name])
    empty = torch.zeros_like(lengths)
    _, found, fused = differentiate(cell, padded, empty)
    assert fused and all((found[name] == 0).all() for name in NAMES)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none_stay_with_their_series(value, instruction_set):
    cell, inputs, lengths = make_problem(3, 7, 11, 40)
    expected = last_state(cell, inputs, lengths)
    bad = inputs.clone()
    bad[::3, 0] = value
    got = last_state(cell, bad, lengths)
    hit = torch.zeros(40, dtype=torch.bool)
    hit[::3] = True
    hit &= lengths > 0
    assert torch.equal(got[~hit], expected[~hit])
    with kernels.reference():
        plain = last_state(cell, bad, lengths)
    torch.testing.assert_close(got, plain, rtol=0, atol=1e-13, equal_nan=True)
    if value is torch.nan:
        assert got[hit].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [1, 70, 700])
def test_threads_change_no_bit(dtype, batch, instruction_set, monkeypatch):
    monkeypatch.setattr(kernel, "THREAD_WORK", 0)
    problem = make_problem(5, 19, 9, batch, dtype)
    expected, grads, _ = differentiate(*problem)
    # more than there are processors, so that they do take turns
    for threads in (2, 7):
        torch.set_num_threads(threads)
        got, found, _ = differentiate(*problem)
        assert torch.equal(got, expected)
        assert all(torch.equal(found[name], grads[name]) for name in NAMES)


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3)])
def test_nothing_to_read(shape):
    cell = nn.GRUCell(3, 6)
    lengths = torch.zeros(shape[0], dtype=torch.int64)
    last = last_state(cell, torch.zeros(shape), lengths)
    assert torch.equal(last, torch.zeros(shape[0], 6))


def test_rows_and_parameters_may_lie_anywhere(instruction_set):
    cell, inputs, lengths = make_problem(4, 9, 13, 20)
    expected, grads, _ = differentiate(cell, inputs, lengths)
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh"):
            transposed = getattr(cell, name).t().contiguous().t()
            setattr(cell, name, nn.Parameter(transposed))
    spread = torch.zeros(13, 20, 8, dtype=torch.float64)[..., ::2].transpose(0, 1)
    spread.copy_(inputs)
    pairs = torch.stack([lengths, lengths], 1)[:, 0]
    got, found, fused = differentiate(cell, spread, pairs)
    assert fused and torch.equal(got, expected)
    assert all(torch.equal(found[name], grads[name]) for name in NAMES)


@pytest.mark.parametrize("offset", [1, 2, 5])
def test_what_is_kept_may_be_moved(offset, instruction_set):
    problem = make_problem(3, 9, 12, 40)
    expected, grads, _ = differentiate(*problem)

    def move(x):  # as a hook that keeps numbers elsewhere does
        memory = x.new_empty(x.numel() + offset)
        memory[offset:] = x.reshape(-1)
        return memory[offset:].view(x.shape)

    with torch.autograd.graph.saved_tensors_hooks(move, lambda x: x):
        got, found, fused = differentiate(*problem)
    assert fused and torch.equal(got, expected)
    for name in NAMES:
        assert torch.equal(found[name], grads[name])


def test_frozen_parameters_get_no_gradient(instruction_set):
    cell, inputs, lengths = make_problem(4, 9, 13, 20)
    _, grads, _ = differentiate(cell, inputs, lengths)
    cell.weight_ih.requires_grad_(False)
    cell.bias_hh.requires_grad_(False)
    last = last_state(cell, inputs, lengths)
    weight = torch.cos(torch.arange(last.numel(), dtype=last.dtype)).view_as(last)
    (weight * last).sum().backward()
    assert cell.weight_ih.grad is None and cell.bias_hh.grad is None
    assert torch.equal(cell.weight_hh.grad, grads["weight_hh"])
    assert torch.equal(cell.bias_ih.grad, grads["bias_ih"])
    cell.requires_grad_(False)
    assert not last_state(cell, inputs, lengths).requires_grad


def test_inputs_that_need_a_gradient_get_it_from_torch():
    cell, inputs, lengths = make_problem(4, 9, 13, 20)
    expected = last_state(cell, inputs, lengths)
    inputs.requires_grad_()
    got = last_state(cell, inputs, lengths)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    (grad,) = torch.autograd.grad(got.sum(), inputs)
    assert (grad.abs().sum((1, 2)) > 0).tolist() == (lengths > 0).tolist()
    with torch.no_grad():
        parameters = tuple(cell.parameters())
        assert kernel.serves(parameters, inputs, lengths)


class Subclass(torch.Tensor):
    """A tensor whose values may be anywhere."""


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p, x, n: (p, x.float(), n),
        lambda p, x, n: (p, x.to(torch.float16), n),
        lambda p, x, n: (p, x[..., :3], n),
        lambda p, x, n: (p, x, n.int()),
        lambda p, x, n: (p, x.to("meta"), n),
        lambda p, x, n: (p, x.as_subclass(Subclass), n),
        lambda p, x, n: ((p[0].float(), *p[1:]), x, n),
        lambda p, x, n: ((p[0], p[1][:-3], *p[2:]), x, n),
        lambda p, x, n: ((*p[:3], None), x, n),
        lambda p, x, n: ((*p[:2], p[2][1:], p[3]), x, n),
        lambda p, x, n: ((p[0], p[1].to("meta"), *p[2:]), x, n),
    ],
)
def test_what_does_not_fit_is_left_to_torch(spoil):
    cell, inputs, lengths = make_problem(4, 9, 13, 20)
    problem = tuple(cell.parameters()), inputs, lengths
    assert kernel.serves(*problem)
    with torch.no_grad():
        assert not kernel.serves(*spoil(*problem))


def test_without_kernels_torch_serves(monkeypatch):
    problem = make_problem(4, 9, 13, 20)
    expected, _, fused = differentiate(*problem)
    assert fused
    monkeypatch.setattr(kernels, "_native", None)
    got, _, fused = differentiate(*problem)
    assert not fused
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_a_backward_uses_the_instructions_of_its_forward(instruction_set):
    problem = make_problem(4, 9, 13, 20)
    _, expected, _ = differentiate(*problem)
    last = last_state(*problem)
    weight = torch.cos(torch.arange(last.numel(), dtype=last.dtype)).view_as(last)
    for choice in ("reference", kernels.instruction_sets()[-1]):
        with kernels.use(choice):
            found = torch.autograd.grad(
                (weight * last).sum(), list(problem[0].parameters()), retain_graph=True
            )
        assert all(map(torch.equal, found, expected.values()))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("choice", ["reference", *kernels.instruction_sets()[:1]])
def test_gradients_have_no_gradient(choice, power):
    cell, inputs, lengths = make_problem(4, 9, 13, 20)
    with kernels.use(choice):
        last = last_state(cell, inputs, lengths)
        loss = (last**power).sum()
        (grad,) = torch.autograd.grad(loss, cell.weight_hh, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_parameters_changed_in_between_are_refused(name):
    cell, inputs, lengths = make_problem(4, 9, 13, 20)
    last = last_state(cell, inputs, lengths)
    with torch.no_grad():
        getattr(cell, name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        last.sum().backward()


def test_parameters_resized_in_between_are_refused():
    # changing the memory under a tensor escapes torch's own notice
    cell, inputs, lengths = make_problem(4, 9, 13, 20)
    last = last_state(cell, inputs, lengths)
    cell.weight_hh.data = torch.zeros(3, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"size|shape"):
        last.sum().backward()


@pytest.mark.parametrize("n", [17, 31])
def test_series_resized_in_between_are_refused(n):
    # as many tiles as before
    cell, inputs, lengths = make_problem(4, 9, 13, 20)
    last = last_state(cell, inputs, lengths)
    inputs.data = torch.zeros(n, 13, 4, dtype=torch.float64)
    lengths.data = torch.full((n,), 13)
    with pytest.raises(RuntimeError, match=r"size|shape"):
        last.sum().backward()


def test_states_are_kept_for_gradients_only():
    cell, inputs, lengths = make_problem(4, 9, 13, 20)
    parameters = tuple(cell.parameters())
    kept = kernel.read(parameters, inputs, lengths, record=True)
    assert kept.states.numel() == 2 * 16 * 13 * 9
    assert kernel.read(parameters, inputs, lengths, record=False).states is None


@pytest.mark.parametrize("threads", [1, 2])
def test_signals_end_a_call(threads, monkeypatch, interrupted_after):
    monkeypatch.setattr(kernel, "THREAD_WORK", 0)
    torch.set_num_threads(threads)
    cell = nn.GRUCell(1, 64)
    inputs = torch.zeros(1, 1).expand(64, 10**6)[..., None]
    lengths = torch.full((64,), 10**6)
    parameters = [p.detach() for p in cell.parameters()]
    with interrupted_after(0.5):
        for _ in itertools.repeat(None):
            kernel.read(parameters, inputs, lengths, record=False)


def test_bad_arguments_of_the_compiled_module_raise():
    for function in (kernels._native.recur, kernels._native.recur_back):
        for arguments in ((), (0, True), (0, True, (), ())):
            with pytest.raises((IndexError, TypeError)):
                function(*arguments)
        with pytest.raises(ValueError, match="instruction set not available"):
            function(99, True, *[0] * 22)
