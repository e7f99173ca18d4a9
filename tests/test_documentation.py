"""The documentation is built without warnings, and its pages hold together."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ("sphinx", "sphinx_gallery", "myst_parser", "pydata_sphinx_theme")

pytestmark = pytest.mark.slow

# Beside what is written: texts that a page must have come to show.
TEXTS = {
    "index.html": ["Neural ordinary differential equations", "User guide"],
    "api.html": ["ODENetClassifier", "solve_ode", "PanelBlockKFold", "DensityDisplay"],
    "changelog.html": ["Unreleased"],
    "contributing.html": ["Set up"],
    "citation.html": ["cff-version"],
    "generated/sknode.CNFDensity.html": ["score_samples", "References", "Examples"],
    "generated/sknode.ode.solve_ode.html": ["rtol", "Returns"],
    "auto_examples/index.html": ["Examples"],
}


class Page(HTMLParser):
    """What a page is called, says, shows and leads to."""

    def __init__(self, path):
        super().__init__()
        self.title, self.headings, self.text = "", [], []
        self.targets, self.anchors, self.images = set(), set(), set()
        self._open = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag in ("a", "link") and attrs.get("href"):
            self.targets.add(attrs["href"])
        if tag in ("img", "script") and attrs.get("src"):
            self.targets.add(attrs["src"])
        if tag == "img":
            self.images.add((attrs.get("src"), attrs.get("alt")))
        if tag in ("title", "h1", "article", "script", "style"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag in self._open:
            self._open.remove(tag)

    def handle_data(self, data):
        if "script" in self._open or "style" in self._open:
            return
        if "title" in self._open:
            self.title += data
        if "h1" in self._open:
            self.headings.append(data)
        if "article" in self._open:
            self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages: those of SKNODE_SITE, if that is set, or new ones."""
    if os.environ.get("SKNODE_SITE"):
        return Path(os.environ["SKNODE_SITE"])
    if not all(find_spec(name) for name in TOOLS):
        pytest.skip("needs the extra docs: pip install -e .[docs]")
    site = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    build += ["-D", "plot_gallery=0", "-b", "html", "docs", str(site)]
    out = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return site


@pytest.fixture(scope="module")
def pages(site):
    paths = [p for p in site.rglob("*.html") if "_static" not in p.parts]
    return {p: Page(p) for p in paths}


def test_every_source_has_a_page_with_title_and_text(site, pages):
    sources = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.rst")]
    assert len(sources) > 20
    for source in sources:
        page = pages[site / f"{source.stem}.html"]
        assert page.title.strip() and "".join(page.headings).strip(), source
        assert len("".join(page.text)) > 100, source
    gallery = list((ROOT / "examples").glob("plot_*.py"))
    assert gallery
    for example in gallery:
        page = pages[site / "auto_examples" / f"{example.stem}.html"]
        assert len("".join(page.text)) > 500, example


def test_every_class_and_function_has_a_page(site, pages):
    reference = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    module = ""
    for line in reference.splitlines():
        if line.startswith(".. currentmodule::"):
            module = line.split()[-1]
        elif line.startswith("   ") and line.strip().isidentifier():
            name = f"{module}.{line.strip()}"
            page = pages[site / "generated" / f"{name}.html"]
            assert name in page.anchors


@pytest.mark.parametrize("name", TEXTS)
def test_page_shows_what_is_included_or_generated(site, pages, name):
    text = "".join(pages[site / name].text)
    for expected in TEXTS[name]:
        assert expected in text


def test_no_markup_is_left_over(pages):
    for path, page in pages.items():
        text = "".join(page.text)
        for markup in ("{toctree}", "{include}", ":relative-docs:", "problematic"):
            assert markup not in text, path


def test_links_and_images_lead_somewhere(pages):
    broken = []
    for path, page in pages.items():
        for target in page.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            file = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not file.exists():
                broken.append(f"{path.name}: {target}")
            elif url.fragment and file in pages:
                if unquote(url.fragment) not in pages[file].anchors:
                    broken.append(f"{path.name}: {target}")
    assert not broken


def test_pages_load_nothing_from_elsewhere(pages):
    for path, page in pages.items():
        for source, _ in page.images:
            assert not urlsplit(source or "").netloc, path
    scripts = {t for page in pages.values() for t in page.targets if t.endswith(".js")}
    assert not [s for s in scripts if urlsplit(s).netloc]


def test_pictures_have_a_description(site, pages):
    for name in ("index.html", "odenet.html", "density.html", "timeseries.html"):
        images = {alt for src, alt in pages[site / name].images if "_images" in src}
        assert images and all(images), name
