"""Matplotlib, which comes with an extra and is imported when something is drawn."""

__all__ = ["import_pyplot"]


def import_pyplot(caller: str):
    """Return `matplotlib.pyplot`; the error says for what and how to install it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"{caller} needs matplotlib. Install it with: pip install 'sknode[plot]'."
        ) from error
    return plt
