"""What training on images adds: shifting them at random."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["shift_at_random"]


def shift_at_random(
    rows: Tensor, image_shape, furthest: int, generator: torch.Generator
) -> Tensor:
    """Shift every image by whole pixels, up to ``furthest`` along each axis.

    Pixels at the border are repeated for what comes in from outside.

    Parameters
    ----------
    rows : Tensor of shape (n, channels * height * width)
        Images.
    image_shape : tuple of int
        Channels, height and width.
    furthest : int
        Largest shift in pixels.
    generator : torch.Generator
        Draws the shifts, on the CPU.

    Returns
    -------
    Tensor of shape (n, channels * height * width)
        Shifted images.
    """
    images = rows.unflatten(1, image_shape)
    shifts = torch.randint(-furthest, furthest + 1, (2, len(rows)), generator=generator)
    for axis, shift in zip((2, 3), shifts.to(rows.device), strict=True):
        size = images.shape[axis]
        source = torch.arange(size, device=rows.device) + shift[:, None]
        source = source.clamp(0, size - 1)
        shape = [len(rows), 1, 1, 1]
        shape[axis] = size
        images = images.gather(axis, source.view(shape).expand_as(images))
    return images.flatten(1)
