"""The README's examples run as printed, and its commands name files that exist."""

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 4
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in blocks:
            assert len(block.strip().splitlines()) <= 11
            exec(compile(block, "README.md", "exec"), names)
    assert names["search"].best_score_ > 0.93
    assert names["density"].sample(2).shape == (2, 2)
    assert not names["filled"].isna().any().any()
    assert capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_examples_of_the_documentation_run(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            exec(compile(block, page, "exec"), names)


def test_links_and_commands_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)]+)\)", README)
    targets += re.findall(r"(?:tests|examples)/[\w/.]+[\w/]", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
