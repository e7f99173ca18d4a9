"""Where a warning points to."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import joblib
import sklearn

__all__ = ["stacklevel_of_caller"]

# scikit-learn wraps fit, and calls it from pipelines and, by joblib, from searches
INSIDE = tuple(
    f"{Path(path).parent}{os.sep}"
    for path in (__file__, sklearn.__file__, joblib.__file__)
)


def stacklevel_of_caller() -> int:
    """Return the ``stacklevel`` of the line that called into sknode.

    To pass to `warnings.warn` by the function that calls this one. The way to a
    warning has different lengths: `predict` and `score`, alone or within a pipeline.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        frame, level = frame.f_back, level + 1
    return level
