"""ConvField: the field of Chen et al. (2018) for images."""

import pytest
import torch

from sknode.fields import ACTIVATIONS, ConvField
from sknode.fields.conv import group_norm
from sknode.ode import solve_ode


def make_field(*args, **kwargs):
    torch.manual_seed(0)
    field = ConvField(*args, **kwargs).double()
    with torch.no_grad():
        for p in field.parameters():  # norms start as ones and zeros
            p.add_(0.3 * torch.randn_like(p))
    return field


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 6, 7, 4, generator=generator, dtype=torch.float64)


def with_concatenated_time(field, t, y):
    """Evaluate with time as a further channel, as it is usually written."""
    function = ACTIVATIONS[field.activation].function
    plane = torch.ones_like(y[:, :1]) * t
    for norm, convolution in zip(field.norms[:-1], field.convolutions, strict=True):
        y = convolution(torch.cat([function(norm(y)), plane], 1))
    return field.norms[-1](y)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("hidden", [None, (8,), (3, 5)])
def test_time_is_a_further_channel(images, kernel_size, hidden):
    field = make_field(6, hidden, kernel_size=kernel_size)
    scalar = torch.tensor(0.7, dtype=torch.float64)
    for t in (scalar, torch.linspace(0, 1, 5, dtype=torch.float64).view(5, 1, 1, 1)):
        expected = with_concatenated_time(field, t, images)
        torch.testing.assert_close(field(t, images), expected, rtol=1e-10, atol=1e-12)
    if kernel_size > 1:  # else one shift for all pixels, which the norm takes out
        change = field(scalar, images) - field(scalar + 1, images)
        assert change.abs().max() > 1e-3


def test_without_time_it_is_autonomous(images):
    field = make_field(6, time_dependent=False)
    zero = torch.zeros((), dtype=torch.float64)
    assert torch.equal(field(zero, images), field(zero + 1, images))
    assert field.convolutions[0].weight.shape == (6, 6, 3, 3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_is_used(images, activation):
    field = make_field(6, activation=activation)
    t = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(
        field(t, images), with_concatenated_time(field, t, images)
    )
    assert activation in repr(field)


@pytest.mark.parametrize("time_dependent", [False, True])
def test_the_discrete_adjoint_is_backpropagation(images, time_dependent):
    field = make_field(6, (4,), time_dependent=time_dependent)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)

    def gradients(gradient):
        field.zero_grad()
        y0 = images.clone().requires_grad_()
        y = solve_ode(field, y0, t, rtol=1e-4, atol=1e-4, gradient=gradient).y
        weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
        (weights * y).sum().backward()
        return [y0.grad, *(p.grad.clone() for p in field.parameters())]

    one, two = gradients("discrete"), gradients("backprop")
    # the biases of the convolutions, too: no norm takes them out
    assert all(float(g.abs().max()) > 1e-6 for g in one)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_gradients_of_a_slope_are_right():
    field = make_field(2, (3,), activation="tanh")
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t, y, *parameters: field(t, y), (t, y, *field.parameters())
    )


def test_a_slope_depends_on_its_own_image_only(images):
    field = make_field(6)
    t = torch.tensor(0.5, dtype=torch.float64)
    changed = images.clone()
    changed[1:] *= 100
    assert torch.equal(field(t, images)[0], field(t, changed)[0])
    y = images.clone().requires_grad_()
    field(t, y)[2].square().sum().backward()
    reached = y.grad.abs().amax((1, 2, 3)) > 0
    assert reached.tolist() == [False, False, True, False, False]


def test_slopes_are_bounded(images):
    torch.manual_seed(0)
    slopes = ConvField(6).double()(torch.tensor(0.0).double(), 1e6 * images)
    # a normalised group of so many values
    assert slopes.abs().max() <= (7 * 4) ** 0.5


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (6, 3), (32, 16), (64, 32), (65, 13), (37, 1)]
)
def test_groups_are_the_most_up_to_32_of_two_channels_or_more(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_the_field_of_the_paper_has_its_parameters():
    # three norms of 64 gains and shifts, two convolutions from 65 to 64 channels
    expected = 3 * 2 * 64 + 2 * (65 * 64 * 9 + 64)
    assert expected == 75_392
    assert sum(p.numel() for p in ConvField(64).parameters()) == expected


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 2), (8, 8)])
def test_every_size_of_image_is_kept(size):
    torch.manual_seed(0)
    y = torch.randn(3, 4, *size)
    field = ConvField(4, (6,), kernel_size=5)
    assert field(torch.tensor(0.0), y).shape == y.shape
    out = solve_ode(field, y, torch.tensor([0.0, 1.0])).y
    assert out.shape == (3, 2, 4, *size)
    assert out.isfinite().all()


def test_single_precision_agrees_with_double(images):
    field = make_field(6)
    t = torch.tensor(0.5, dtype=torch.float64)
    exact = field(t, images)
    single = field.float()(t.float(), images.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels"),
        ({"channels": 2.0}, "channels"),
        ({"hidden_channels": (0,)}, "hidden_channels"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"activation": "step"}, "activation"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvField(**{"channels": 4, **arguments})


def test_states_with_other_channels_are_refused():
    with pytest.raises(RuntimeError, match="channels"):
        ConvField(4)(torch.tensor(0.0), torch.zeros(2, 5, 3, 3))
