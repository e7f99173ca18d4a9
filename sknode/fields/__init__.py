"""Vector fields: torch modules ``f(t, y)``, with closed-form derivatives where known."""

from sknode.fields.activations import ACTIVATIONS
from sknode.fields.mlp import MLPField

__all__ = ["ACTIVATIONS", "MLPField"]
