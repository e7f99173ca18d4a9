"""Vector fields ``f(t, y)``: torch modules, with closed forms where known."""

from sknode.fields.activations import ACTIVATIONS
from sknode.fields.mlp import MLPField

__all__ = ["ACTIVATIONS", "MLPField"]
