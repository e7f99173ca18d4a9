"""`show_versions`: what to paste into a bug report."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from sknode._version import __version__

__all__ = ["show_versions"]

DEPENDENCIES = (
    *("torch", "scikit-learn", "numpy", "scipy", "pandas", "joblib"),
    *("matplotlib", "torchdiffeq", "setuptools", "pip"),
)


def show_versions() -> None:
    """Print what a bug report should say: system, versions, kernels, threads.

    The kernels are an optional, compiled part of the package; without them torch does
    the same work more slowly.

    Examples
    --------
    >>> import sknode
    >>> sknode.show_versions()
    <BLANKLINE>
    System:
        python: ...
    """
    sections = {
        "System": _system(),
        "Python dependencies": _dependencies(),
        "Kernels": _kernels(),
    }
    for title, entries in sections.items():
        print(f"\n{title}:")
        width = max(len(name) for name in entries)
        for name, value in entries.items():
            print(f"    {name:>{width}}: {value}")


def _system() -> dict[str, str]:
    return {
        "python": sys.version.replace("\n", " "),
        "executable": sys.executable,
        "machine": platform.platform(),
    }


def _dependencies() -> dict[str, str | None]:
    found = {"sknode": __version__}
    for name in DEPENDENCIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _kernels() -> dict[str, str]:
    # imported here, as everything of the package that takes time
    import torch

    from sknode.ode import kernels

    without = f"no ({kernels.why_not}): torch does their work"
    return {
        "available": "yes" if kernels.available() else without,
        "usable instruction sets": ", ".join(kernels.instruction_sets()) or "none",
        "in use": kernels.chosen(),
        "torch threads": str(torch.get_num_threads()),
    }
