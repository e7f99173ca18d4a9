"""What `show_versions` says is true."""

import sys
from importlib.metadata import version

import torch

import sknode
from sknode.ode import kernels


def sections(capsys):
    """Return what is printed as {section: {name: value}}."""
    sknode.show_versions()
    found, entries = {}, None
    for line in capsys.readouterr().out.splitlines():
        if line and not line.startswith(" "):
            entries = found[line.rstrip(":")] = {}
        elif line:
            name, value = line.split(": ", 1)
            entries[name.strip()] = value
    return found


def test_system_and_dependencies(capsys):
    found = sections(capsys)
    assert list(found) == ["System", "Python dependencies", "Kernels"]
    assert found["System"]["python"].startswith(sys.version.split()[0])
    dependencies = found["Python dependencies"]
    assert dependencies["sknode"] == sknode.__version__
    for name in ("torch", "scikit-learn", "numpy"):
        assert dependencies[name] == version(name)


def test_kernels(capsys):
    found = sections(capsys)["Kernels"]
    assert found["available"].startswith("yes" if kernels.available() else "no (")
    assert found["in use"] == kernels.chosen()
    assert found["torch threads"] == str(torch.get_num_threads())
    expected = ", ".join(kernels.instruction_sets()) or "none"
    assert found["usable instruction sets"] == expected
    with kernels.reference():
        assert sections(capsys)["Kernels"]["in use"] == "reference"


def test_kernels_that_were_not_built(capsys, monkeypatch):
    monkeypatch.setattr(kernels, "_native", None)
    kernels._sets.cache_clear()
    try:
        found = sections(capsys)["Kernels"]
    finally:
        kernels._sets.cache_clear()
    assert found["available"].startswith("no (they were not built")
    assert found["usable instruction sets"] == "none"
    assert found["in use"] == "reference"
