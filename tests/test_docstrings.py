"""Docstrings are numpydoc's, and every public name is in the documentation."""

import dataclasses
import enum
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
from numpydoc.validate import validate

ROOT = Path(__file__).parent.parent
MODULES = [
    "sknode",
    *(
        f"sknode.{part}"
        for part in "datasets fields model_selection ode plotting".split()
    ),
]
NAMES = [
    f"{module}.{name}"
    for module in MODULES
    for name in import_module(module).__all__
    if not inspect.ismodule(getattr(import_module(module), name))
]
# the rest of it is for the solver
NAMES += [f"sknode.ode.kernels.{name}" for name in ("chosen", "reference", "use")]

# What numpydoc finds and is left as it is, as in scikit-learn.
IGNORED = {
    "GL01": "text may begin in the line of the quotes",
    "RT02": "results have names where these say something",
    "ES01": "a summary may be enough",
    "SA01": "not everything has relatives",
    "EX01": "methods have the example of their class",
}


def find(name):
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def members(name):
    """Names of the methods and properties that the package itself documents."""
    thing = find(name)
    if not inspect.isclass(thing):
        return
    for member in dir(thing):
        home = next((c for c in thing.__mro__ if member in vars(c)), type)
        if member.startswith("_") or not home.__module__.startswith("sknode"):
            continue
        # torch's hook for the repr; scikit-learn makes those for metadata
        if member == "extra_repr" or re.fullmatch(r"set_\w+_request", member):
            continue
        found = inspect.getattr_static(thing, member)
        if isinstance(found, property) or callable(getattr(thing, member)):
            yield f"{name}.{member}"


def errors(name):
    """What numpydoc has to say of a name but for what is left as it is."""
    ignored = set(IGNORED)
    if name in NAMES:
        thing = find(name)
        plain = dataclasses.is_dataclass(thing) or isinstance(thing, enum.EnumMeta)
        if plain:
            ignored.add("PR01")  # the attributes are documented
        elif not (inspect.isclass(thing) and issubclass(thing, Exception)):
            ignored.remove("EX01")
    return [text for text in validate(name)["errors"] if text[0] not in ignored]


@pytest.mark.parametrize("name", NAMES)
def test_docstring_is_valid(name):
    thing = find(name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return  # a constant: the reference says what it is
    problems = {n: errors(n) for n in (name, *members(name))}
    assert not {n: found for n, found in problems.items() if found}


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_in_the_reference(name):
    module, _, short = name.rpartition(".")
    reference = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    parts = re.split(r"^\.\. currentmodule:: (\S+)$", reference, flags=re.MULTILINE)
    lists = zip(parts[1::2], parts[2::2], strict=True)
    listed = "".join(text for where, text in lists if where == module)
    in_list = re.search(rf"^   {re.escape(short)}$", listed, flags=re.MULTILINE)
    assert in_list or f"``{name}``" in reference


def test_the_reference_has_nothing_else():
    reference = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    parts = re.split(r"^\.\. currentmodule:: (\S+)$", reference, flags=re.MULTILINE)
    for module, text in zip(parts[1::2], parts[2::2], strict=True):
        for short in re.findall(r"^   (\w+)$", text, flags=re.MULTILINE):
            assert f"{module}.{short}" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_used_in_a_page_or_an_example(name):
    short = name.rpartition(".")[2]
    if short == "__version__":
        short = "sknode.__version__"
    # these list everything, which does not tell how to use it
    lists = {"changelog.md", "contributing.md", "layout.md"}
    pages = [p for p in (ROOT / "docs").glob("*.md") if p.name not in lists]
    pages += [ROOT / "README.md", *(ROOT / "examples").glob("*.py")]
    texts = (page.read_text(encoding="utf-8") for page in pages)
    assert any(re.search(rf"\b{re.escape(short)}\b", text) for text in texts)
