"""The examples of the gallery run without warnings, make figures and have titles."""

import ast
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sknode

EXAMPLES = Path(__file__).parent.parent / "examples"
GALLERY = sorted(EXAMPLES.glob("plot_*.py"))

# Counts figures as sphinx-gallery does, which shows those that are open at the end of a
# cell: here at `plt.show` and at the end. Warnings are errors.
RUN = """
import runpy, sys, warnings
import torch
import matplotlib.pyplot as plt

torch.set_num_threads(1)
warnings.simplefilter("error")
runpy.run_path(sys.argv[1], run_name="__main__")
figures = [plt.figure(number) for number in plt.get_fignums()]
for figure in figures:
    figure.canvas.draw()
empty = [i for i, figure in enumerate(figures) if not any(
    axes.has_data() for axes in figure.axes
)]
print(f"figures: {len(figures)}, empty: {empty}")
"""


def test_there_is_a_gallery():
    assert len(GALLERY) >= 12
    assert (EXAMPLES / "GALLERY_HEADER.rst").read_text().startswith("Examples\n====")


@pytest.mark.slow
@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_example_runs_without_warnings_and_draws(path, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(path)],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert not result.stderr
    found = re.search(r"^figures: (\d+), empty: (\[.*\])$", result.stdout, re.M)
    assert int(found[1]) > 0
    assert found[2] == "[]"
    # all leave nothing behind where they run
    assert not list(tmp_path.iterdir())
    # and print figures, not only pictures
    assert re.search(r"\d", result.stdout[: found.start()])


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_example_has_a_title_and_cells_with_text(path):
    source = path.read_text(encoding="utf-8")
    lines = ast.get_docstring(ast.parse(source)).splitlines()
    assert lines[0]
    assert lines[1] == "=" * len(lines[0])
    assert lines[3], "what it is about should follow the title"
    cells = source.split("\n# %%\n")[1:]
    assert cells
    assert all(cell.startswith("# ") for cell in cells)


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_underlines_are_as_long_as_titles(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    for title, line in itertools.pairwise(lines):
        if re.fullmatch(r"# -+", line):
            assert len(line) == len(title), title


@pytest.mark.parametrize(
    "name",
    [
        *(n for n in sknode.__all__ if n[0].isupper()),
        *sknode.datasets.__all__,
        *sknode.model_selection.__all__,
        *sknode.plotting.__all__,
    ],
)
def test_public_name_is_in_an_example_of_the_gallery(name):
    used = set()
    for path in GALLERY:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name):
                used.add(node.id)
    assert name in used
