"""The HTML representation of estimators links to their pages in the reference."""

import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_html_repr

import sknode
from sknode._base import DOC_PAGE, BaseODEEstimator

NAMES = [
    name
    for name in sknode.__all__
    if isinstance(getattr(sknode, name), type)
    and issubclass(getattr(sknode, name), BaseODEEstimator)
]


@pytest.mark.parametrize("name", NAMES)
def test_links_to_the_page_of_the_public_name(name):
    page = DOC_PAGE.format(estimator_name=name)
    assert page.startswith("https://") and page.endswith(f"/sknode.{name}.html")
    html = estimator_html_repr(getattr(sknode, name)())
    assert f'href="{page}"' in html
    assert "https://scikit-learn.org" not in html


def test_links_inside_of_a_pipeline():
    html = estimator_html_repr(
        make_pipeline(StandardScaler(), sknode.ODENetClassifier())
    )
    assert f'href="{DOC_PAGE.format(estimator_name="ODENetClassifier")}"' in html
    assert "sklearn.preprocessing.StandardScaler.html" in html


def test_estimators_of_others_have_no_page_here():
    class Mine(sknode.ODENetClassifier):
        pass

    assert DOC_PAGE.split("{")[0] not in estimator_html_repr(Mine())
