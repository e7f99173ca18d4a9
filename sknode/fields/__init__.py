"""Vector fields ``f(t, y)``: torch modules, with closed forms where known."""

from sknode.fields.activations import ACTIVATIONS
from sknode.fields.conv import ConvField
from sknode.fields.energy import EnergyField
from sknode.fields.mlp import MLPField

__all__ = ["ACTIVATIONS", "ConvField", "EnergyField", "MLPField"]
