"""Settings of the documentation: python -m sphinx -W --keep-going -b html docs OUT."""

import os
import re

# the gallery looks names up without running the example that switches this one on
from sklearn.experimental import enable_halving_search_cv  # noqa: F401

from sknode import __version__

os.environ.setdefault("MPLBACKEND", "Agg")
PARTS = ("model_selection", "plotting", "datasets", "ode", "fields")
PUBLIC = ("sknode", *(f"sknode.{part}" for part in PARTS))

project = "sknode"
author = "The sknode developers"
copyright = author
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "myst_parser",
    "numpydoc",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # so that reading the pages needs no network either
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "**/GALLERY_HEADER.rst"]
templates_path = ["_templates"]
default_role = "py:obj"  # `solve_ode` in a docstring is a link

# Links to other projects need the network, which a build must not: they are asked for.
if os.environ.get("SKNODE_DOCS_LINKS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "matplotlib": ("https://matplotlib.org/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/docs/", None),
        "python": ("https://docs.python.org/3/", None),
        "scipy": ("https://docs.scipy.org/doc/scipy/", None),
        "sklearn": ("https://scikit-learn.org/stable/", None),
        "torch": ("https://pytorch.org/docs/stable/", None),
    }

# Pages are Markdown that reads well as it is, too: mathematics between dollars, links
# to headings by their text.
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

# Objects
autosummary_generate = True
autodoc_typehints = "none"  # the docstrings have them
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
numpydoc_show_class_members = False  # the template of classes does

# Examples: scripts that make pictures. -D plot_gallery=0 does not run them.
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"[\\/]plot_",
    "ignore_pattern": r"(?:^|[\\/])(?!plot_)[^\\/]*$",
    "within_subsection_order": "FileNameSortKey",
    "doc_module": ("sknode",),
    "backreferences_dir": "generated/backreferences",
    "write_computation_times": False,
    "show_memory": False,
    "download_all_examples": False,
    "abort_on_example_error": True,
}

# Appearance
html_theme = "pydata_sphinx_theme"
html_title = "sknode"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "sknode"},
    "navbar_align": "left",
    "header_links_before_dropdown": 5,
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


def without_labels(app, what, name, obj, options, lines):
    """Take references to scikit-learn's own pages out of inherited docstrings."""
    for i, line in enumerate(lines):
        lines[i] = re.sub(r":(?:ref|term):`([^<`]+?)(?:\s*<[^>]+>)?`", r"\1", line)


def by_short_name(app, env, node, contnode):
    """Find public names that stand without their module, as in the examples."""
    py, target = env.get_domain("py"), node.get("reftarget", "")
    if node.get("refdomain") != "py" or "." in target.strip("."):
        return None
    for module in PUBLIC:
        name = f"{module}.{target}"
        if name in py.objects:
            where = (env, node["refdoc"], app.builder, "obj", name, node, contnode)
            return py.resolve_xref(*where)
    return None


def setup(app):
    app.connect("autodoc-process-docstring", without_labels)
    app.connect("missing-reference", by_short_name)
