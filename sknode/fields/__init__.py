"""Vector fields ``f(t, y)``: torch modules, with closed forms where known."""

from sknode.fields.activations import ACTIVATIONS
from sknode.fields.conditional import (
    ClassMixtureField,
    GivenField,
    JointMixtureField,
)
from sknode.fields.conv import ConvField
from sknode.fields.divergence import DivergenceField, LogDensityField, SumField
from sknode.fields.energy import EnergyField
from sknode.fields.mixture import MixtureField
from sknode.fields.mlp import MLPField
from sknode.fields.planar import PlanarField
from sknode.fields.squash import ConcatSquashField

__all__ = [
    "ACTIVATIONS",
    "ClassMixtureField",
    "ConcatSquashField",
    "ConvField",
    "DivergenceField",
    "EnergyField",
    "GivenField",
    "JointMixtureField",
    "LogDensityField",
    "MLPField",
    "MixtureField",
    "PlanarField",
    "SumField",
]
