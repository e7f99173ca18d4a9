"""A convolutional network as vector field on images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sknode.fields.activations import get_activation

__all__ = ["ConvField", "group_norm"]


class ConvField(nn.Module):
    """Vector field ``f(t, y)`` on images: normalised, time-conditioned convolutions.

    Every layer is a group normalisation, the activation and a convolution that keeps
    the size of the image; a last normalisation bounds the slopes. With time as input,
    it is one more channel of every convolution, as in the network for MNIST of [1]_.

    Parameters
    ----------
    channels : int
        Channels of the state.
    hidden_channels : sequence of int, optional
        Channels between the convolutions; by default one hidden layer as wide as the
        state.
    activation : {"tanh", "softplus", "silu", "elu", "sigmoid", "relu"}, default="silu"
        Activation before every convolution.
    kernel_size : int, default=3
        Height and width of the kernels, an odd number.
    time_dependent : bool, default=True
        Whether time is a further input.

    See Also
    --------
    sknode.fields.MLPField : The field for states without spatial structure.

    Notes
    -----
    Normalisation is per image: a slope depends on its own image only. A channel of
    constant value ``t`` adds ``t`` times a map that is the same for all images; this is
    how it is computed.

    References
    ----------
    .. [1] Chen, Rubanova, Bettencourt & Duvenaud, "Neural Ordinary Differential
       Equations", NeurIPS 2018, section 3.

    Examples
    --------
    >>> import torch
    >>> from sknode.fields import ConvField
    >>> field = ConvField(8)
    >>> field(torch.tensor(0.0), torch.zeros(5, 8, 6, 6)).shape
    torch.Size([5, 8, 6, 6])
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: Sequence[int] | None = None,
        activation: str = "silu",
        kernel_size: int = 3,
        time_dependent: bool = True,
    ):
        super().__init__()
        hidden = (channels,) if hidden_channels is None else tuple(hidden_channels)
        for size in (channels, *hidden, kernel_size):
            if not isinstance(size, Integral) or size < 1:
                raise ValueError(
                    "channels, hidden_channels and kernel_size must be positive "
                    f"integers. Got {channels!r}, {hidden!r} and {kernel_size!r}."
                )
        if kernel_size % 2 == 0:
            raise ValueError(
                "kernel_size must be odd, so that the image keeps its size. "
                f"Got {kernel_size}."
            )
        get_activation(activation)
        self.activation = activation
        self.time_dependent = bool(time_dependent)
        widths = (channels, *hidden, channels)
        self.norms = nn.ModuleList(group_norm(width) for width in widths)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(n_in + self.time_dependent, n_out, kernel_size, padding="same")
            for n_in, n_out in itertools.pairwise(widths)
        )

    def extra_repr(self) -> str:
        """Describe the field in its repr."""
        return f"activation={self.activation!r}, time_dependent={self.time_dependent}"

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate the field.

        Parameters
        ----------
        t : Tensor
            Times: a scalar or of shape (n, 1, 1, 1).
        y : Tensor of shape (n, channels, height, width)
            States.

        Returns
        -------
        Tensor of shape (n, channels, height, width)
            Slopes.
        """
        function = get_activation(self.activation).function
        *norms, last_norm = self.norms
        for norm, convolution in zip(norms, self.convolutions, strict=True):
            y = self._convolve(convolution, t, function(norm(y)))
        return last_norm(y)

    def _convolve(self, convolution: nn.Conv2d, t: Tensor, y: Tensor) -> Tensor:
        """Convolve; time is the last input channel."""
        if not self.time_dependent:
            return convolution(y)
        weight = convolution.weight
        plane = torch.ones(1, 1, *y.shape[-2:], dtype=y.dtype, device=y.device)
        by_time = F.conv2d(plane, weight[:, -1:], padding="same")
        y = F.conv2d(y, weight[:, :-1], convolution.bias, padding="same")
        return y + t * by_time


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a normalisation in up to 32 groups of two channels or more.

    A group of one channel would take out what the bias of a convolution, and time, add
    to it.
    """
    most = max(1, min(32, channels // 2))
    return nn.GroupNorm(
        next(n for n in range(most, 0, -1) if channels % n == 0), channels
    )
