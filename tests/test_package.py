"""The package as a whole: imports, layers, the quickstart."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sknode

ROOT = Path(sknode.__file__).parent


@pytest.mark.parametrize("folder", ["ode", "fields"])
def test_solver_and_fields_know_nothing_above_them(folder):
    allowed = {"ode": {"ode"}, "fields": {"fields", "ode"}}[folder]
    for path in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                parts = name.split(".")
                assert parts[0] not in ("sklearn", "pandas"), path
                if parts[0] == "sknode":
                    assert parts[1] in allowed, path


def test_import_brings_in_nothing_that_torch_and_scikit_learn_do_not():
    # what an import costs is what it loads: pandas and matplotlib stay out
    code = (
        "import sys, torch, sklearn.base, sklearn.model_selection\n"
        "before = set(sys.modules)\n"
        "import sknode\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(' '.join(sorted(new - {'sknode', 'sklearn'})))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"pandas", "matplotlib", "torchdiffeq"} & set(out.stdout.split())


def test_everything_public_is_there_when_asked_for_and_not_before():
    code = (
        "import sys, sknode\n"
        "parts = 'datasets fields model_selection ode plotting'.split()\n"
        "assert not {f'sknode.{part}' for part in parts} & set(sys.modules)\n"
        "assert sknode.model_selection.PanelBlockKFold().n_splits == 5\n"
        "assert set(parts) <= set(sknode.__all__) == set(dir(sknode))\n"
        "print([getattr(sknode, name) for name in sknode.__all__])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_quickstart_runs_and_ends_in_figures():
    script = ROOT.parent / "examples" / "quickstart.py"
    out = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT.parent)},
    ).stdout
    assert "test accuracy" in out
    assert "MLPClassifier" in out
    assert "best on the test set" in out
