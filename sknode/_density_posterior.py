"""Classification by a density for every class: Bayes' rule."""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

__all__ = ["ClassPosteriorMixin"]


def _may_have_classes(estimator) -> bool:
    """Return whether the density is conditional, and not known to be on values."""
    if not estimator.conditional or estimator.conditional == "values":
        return False
    return hasattr(estimator, "classes_") or not hasattr(estimator, "module_")


class ClassPosteriorMixin:
    """Methods of an estimator whose density depends on classes.

    Its `_log_densities` returns those of rows (n, n_classes) given the classes. The
    methods are there if it is conditional, unless y is values.
    """

    @available_if(_may_have_classes)
    def predict_log_proba(self, X):
        """Return logarithms of the probabilities of the classes, by Bayes' rule.

        Only if the density is conditional, on classes.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            Logarithms of the posteriors, in the order of ``classes_``, for the shares
            of the classes in ``fit``.

        Raises
        ------
        ValueError
            If values are on or beyond ``bounds``, where no class has a density.
        """
        check_is_fitted(self)
        logs = self._log_densities(X)
        posterior = log_softmax(logs + np.log(self.class_prior_), axis=1)
        return posterior.astype(logs.dtype, copy=False)

    @available_if(_may_have_classes)
    def predict_proba(self, X):
        """Return the probabilities of the classes, by Bayes' rule.

        Only if the density is conditional, on classes.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            Posteriors, in the order of ``classes_``, for the shares of the classes in
            ``fit``.
        """
        return np.exp(self.predict_log_proba(X))

    @available_if(_may_have_classes)
    def predict(self, X):
        """Return the most probable classes.

        Only if the density is conditional, on classes.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.

        Returns
        -------
        ndarray of shape (n_samples,)
            Labels.
        """
        # first, so that an estimator without fit says so
        best = self.predict_log_proba(X).argmax(axis=1)
        return self.classes_[best]
