"""What is built from the source: all of it, and something without a compiler, too."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA = {path.relative_to(ROOT) for path in (ROOT / "sknode/data").iterdir()}
SOURCES = {path.name for path in (ROOT / "sknode/ode/kernels/src").iterdir()}


@pytest.fixture
def source(tmp_path):
    """A copy of the source, for builds leave their traces."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "_native*")
    shutil.copytree(ROOT / "sknode", tmp_path / "sknode", ignore=ignored)
    return tmp_path


def build(source, *command, **environment):
    out = subprocess.run(
        [sys.executable, *command],
        cwd=source,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert out.returncode == 0, out.stdout
    return out.stdout


def test_source_distribution_has_all_sources(source):
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    log = build(source, "-c", code)
    assert "experimental" not in log
    (archive,) = (source / "dist").iterdir()
    with tarfile.open(archive) as tar:
        names = [Path(name) for name in tar.getnames()]
    kept = {p.name for p in names if p.match("*/sknode/ode/kernels/src/*")}
    assert kept == SOURCES
    assert {p.suffix for p in map(Path, SOURCES)} == {".h", ".cpp"}
    modules = {p.relative_to(ROOT) for p in (ROOT / "sknode").rglob("*.py")}
    assert modules | DATA <= {Path(*name.parts[1:]) for name in names}


@pytest.mark.skipif(os.name != "posix", reason="hides the compiler as POSIX does")
def test_builds_without_a_compiler(source):
    command = ("setup.py", "build", "--build-base", "out")
    log = build(source, *command, CC="/bin/false", CXX="/bin/false")
    assert 'building extension "sknode.ode.kernels._native" failed' in log
    built = {p.name for p in (source / "out").rglob("*")}
    assert {path.name for path in DATA} <= built
    assert "solve.py" in built and not any(n.startswith("_native") for n in built)
    assert not SOURCES & built


@pytest.mark.parametrize("kernels", [pytest.param("1", marks=pytest.mark.slow), "0"])
def test_a_wheel_serves_all_versions_of_python(source, kernels):
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    build(source, "-c", code, SKNODE_KERNELS=kernels)
    (wheel,) = (source / "dist").iterdir()
    python, abi, platform = wheel.stem.split("-")[2:]
    with zipfile.ZipFile(wheel) as archive:
        compiled = [name for name in archive.namelist() if "_native" in name]
    if kernels == "0":
        # what Windows gets
        assert (python, abi, platform) == ("py3", "none", "any")
        assert not compiled
    else:
        assert (python, abi) == ("cp311", "abi3") and platform != "any"
        assert len(compiled) == 1


def test_wheels_are_configured_for_platforms_with_torch():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheels = config["tool"]["cibuildwheel"]
    assert wheels["build"].startswith("cp311")  # as the limited API of setup.py
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert '"py_limited_api": "cp311"' in setup and "march" not in setup
    jobs = (ROOT / ".github/workflows/wheels.yml").read_text(encoding="utf-8")
    for system in ("ubuntu", "macos", "windows"):
        assert f"{system}-" in jobs
