"""ODE-Nets: networks whose hidden layers are the flow of an ODE."""

from __future__ import annotations

from numbers import Real
from typing import ClassVar

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin, _fit_context
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d
from torch.nn import functional as F

from sknode._base import near_one
from sknode._odenet_base import BaseODENet, usable_scale
from sknode._warp import check_spread

__all__ = ["ODENetClassifier", "ODENetRegressor"]


class ODENetClassifier(ClassifierMixin, BaseODENet):
    """Classifier whose hidden layers are the flow of a learned ODE.

    The standardised features are mapped linearly into a state ``z(0)``, which follows
    ``dz/dt = f(t, z)`` to ``t = 1``, with a multilayer perceptron ``f``; a linear map
    and a softmax turn ``z(1)`` into probabilities. The solver adapts its steps to every
    sample, so that a prediction depends on its own row only.

    Parameters
    ----------
    hidden_layer_sizes : tuple of int or int, default=(64,)
        Sizes of the hidden layers of the vector field.
    activation : {"tanh", "softplus", "silu", "elu", "sigmoid", "relu"}, default="silu"
        Activation of the vector field. Smooth ones need fewer evaluations; "tanh"
        bounds the slopes.
    image_shape : tuple of (channels, height, width), optional
        Shape of an image, if the rows of X are images: channels first, the last axis
        fastest, as ``images.reshape(n_samples, -1)`` makes them. The network is then
        convolutional, as that for MNIST in [1]_, and of single precision by default.
    n_channels : int, default=64
        With ``image_shape``, the channels of the convolutions and of the state;
        ``hidden_layer_sizes`` are the channels inside the vector field.
    n_downsamplings : int, optional
        With ``image_shape``, how often the image is halved before the ODE; by default
        until its shorter side is at most 8 pixels.
    random_shift : int or "auto", default="auto"
        With ``image_shape``, up to how many pixels images are shifted at random along
        both axes, anew in every epoch of training. Predictions then depend less on
        where in the image something is; use 0 where that matters. "auto" is a
        sixteenth of the shorter side, rounded down.
    augment_dim : int or "auto", default="auto"
        State dimensions (channels, for images) beyond the features. Flows cannot
        cross: with a few dimensions more they can pass by each other [2]_. The flow of
        a single feature is even monotone. "auto" is 2, and 0 for images
        and where there are more than 16 features.
    vector_field : callable, optional
        Makes another vector field than the built-in one: called with the shape of a
        state, a tuple, it returns a `torch.nn.Module` whose ``forward(t, y)`` maps
        times (n, 1, ...) and states (n, \\*shape) to slopes in the shape of the states,
        row by row. A class will do. It is called again when an estimator is unpickled,
        so it has to be importable; ``hidden_layer_sizes`` and ``activation`` do not
        reach it.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes, not negative, 1 where there is none. "balanced" is
        inversely proportional to their frequencies.
    label_smoothing : float, default=0.05
        Share of every label that is spread over all classes. Training then ends at
        finite margins instead of pushing them up for ever, which generalises better;
        probabilities stay about ``label_smoothing / n_classes`` away from 0. Use 0 for
        the plain log-loss.
    kinetic_penalty : float, default=0
        Strength of a penalty on the kinetic energy of the flow, the mean of ``f^2``
        over state and time [3]_. Flows become straighter and need fewer evaluations.
        Training takes longer: the compiled kernels do not serve it. At a tolerance as
        loose as 1e-2 use it with ``jacobian_penalty``, or else ``rtol=1e-3``: a field
        may spend its energy between the stages of the solver.
    jacobian_penalty : float, default=0
        Strength of a penalty on the mean square of ``e^T df/dz`` over state and time,
        with random signs ``e`` drawn for every batch [3]_. Flows become smoother.
    solver : {"dopri5", "tsit5", "bosh3", "dopri8", "heun", "rk4", "midpoint", \
            "euler", "adams", "rodas5p", "scipy_rk45", "scipy_rk23", "scipy_dop853", \
            "scipy_radau", "scipy_bdf", "scipy_lsoda"}, default="dopri5"
        ODE solver, as in `sknode.ode.solve_ode`. "rk4", "midpoint" and "euler" take
        constant steps of length ``step_size``, the others adapt them to the tolerance.
        "adams" and those of scipy train with ``gradient="continuous"`` only.
    rtol, atol : float, default=1e-2
        Relative and absolute tolerance of the solver. Read again at prediction:
        ``clf.set_params(rtol=1e-6).predict(X)`` solves more accurately with the same
        weights.
    max_steps : int, default=1000
        Steps that the solver may attempt for a sample.
    step_size : float, default=0.1
        Length of the steps of the solvers without error estimate; the interval is 1.
    gradient : {"discrete", "continuous", "backprop"}, default="discrete"
        How to differentiate the solver: the exact reverse of its steps, in the memory
        of the states; a second solve backwards in time, in memory that does not grow
        with the steps; or torch's autograd through all operations.
    optimizer : {"adam", "muon"}, default="adam"
        Training algorithm. "muon" orthogonalises the updates of matrices and leaves
        other weights to Adam.
    alpha : float, default=0.3
        Strength of the L2 penalty on the weight matrices: ``alpha / 2`` times the sum
        of their squares is added to the sum of the losses of all rows, as in
        `sklearn.linear_model.LogisticRegression`, with ``C = 1 / alpha``. All rows are
        those of all calls, with ``partial_fit``.
    batch_size : int or "auto", default="auto"
        Rows of a minibatch; "auto" is an eighth of them, but from 32 to 200,
        or to 64 for images.
    learning_rate_init : float, default=1e-2
        Step size of the training algorithm.
    max_iter : int, default=200
        Largest number of epochs.
    tol : float, default=5e-3
        What the loss (or the validation score) has to gain to count as progress, since
        the last epoch that counted.
    n_iter_no_change : int, default=5
        After more than so many epochs without progress training ends, with as many
        epochs in which the learning rate falls to zero. It also falls before
        ``max_iter``, unless ``warm_start`` says that training will go on.
    early_stopping : bool, default=False
        Whether to hold out ``validation_fraction`` of the data, stop by the score on it
        and restore the best weights. Implied by passing ``X_val`` to ``fit``.
    validation_fraction : float, default=0.1
        Share of the data held out, by class.
    warm_start : bool, default=False
        Whether ``fit`` goes on from the last one, with the training algorithm's state.
    device : str, default="cpu"
        Torch device; "auto" is an accelerator if there is one.
    dtype : {"auto", "float32", "float64"}, default="auto"
        Precision. "auto" is that of X, and float32 on an accelerator and for images.
    verbose : bool, default=False
        Whether to print a line an epoch: loss, evaluations, validation score, and the
        time that is left if training goes on to ``max_iter``.
    random_state : int, RandomState instance or None, default=None
        Draws initial weights, batches and held out data.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The classes.
    n_features_in_ : int
        Number of features seen in ``fit``.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the features, if X had string column names.
    n_iter_ : int
        Number of epochs of the last ``fit``.
    loss_ : float
        Training loss (log-loss of the smoothed labels) of the last epoch.
    loss_curve_ : list of float
        Training loss, an entry an epoch.
    validation_scores_ : list of float or None
        Accuracy on the held out data, an entry an epoch; None without.
    best_validation_score_ : float or None
        The best of them; its weights were kept.
    nfe_curve_ : list of float
        Mean number of function evaluations a sample, an entry an epoch.
    module_ : torch.nn.Module
        The trained network.

    See Also
    --------
    ODENetRegressor : The same for numbers.
    sklearn.neural_network.MLPClassifier : Multilayer perceptron.
    sknode.ode.solve_ode : The solver.

    Notes
    -----
    Rows with weight zero are left out. In a batch the loss is the weighted mean, so a
    weight of 2 equals a row twice as long as all fit into one batch.

    References
    ----------
    .. [1] Chen, Rubanova, Bettencourt & Duvenaud, "Neural Ordinary Differential
       Equations", NeurIPS 2018.
    .. [2] Dupont, Doucet & Teh, "Augmented Neural ODEs", NeurIPS 2019.
    .. [3] Finlay, Jacobsen, Nurbekyan & Oberman, "How to train your neural ODE: the
       world of Jacobian and kinetic regularization", ICML 2020.

    Examples
    --------
    >>> from sklearn.datasets import make_moons
    >>> from sknode import ODENetClassifier
    >>> X, y = make_moons(200, noise=0.1, random_state=0)
    >>> clf = ODENetClassifier(random_state=0).fit(X, y)
    >>> clf.score(X, y) > 0.95
    True
    >>> clf.predict_proba(X[:3]).shape
    (3, 2)
    """

    _parameter_constraints: ClassVar[dict] = {
        **BaseODENet._parameter_constraints,
        "class_weight": [dict, StrOptions({"balanced"}), None],
        "label_smoothing": [Interval(Real, 0, 1, closed="left")],
    }

    def __init__(
        self,
        hidden_layer_sizes=(64,),
        activation="silu",
        *,
        image_shape=None,
        n_channels=64,
        n_downsamplings=None,
        random_shift="auto",
        augment_dim="auto",
        vector_field=None,
        class_weight=None,
        label_smoothing=0.05,
        kinetic_penalty=0.0,
        jacobian_penalty=0.0,
        solver="dopri5",
        rtol=1e-2,
        atol=1e-2,
        max_steps=1000,
        step_size=0.1,
        gradient="discrete",
        optimizer="adam",
        alpha=0.3,
        batch_size="auto",
        learning_rate_init=1e-2,
        max_iter=200,
        tol=5e-3,
        n_iter_no_change=5,
        early_stopping=False,
        validation_fraction=0.1,
        warm_start=False,
        device="cpu",
        dtype="auto",
        verbose=False,
        random_state=None,
    ):
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.image_shape = image_shape
        self.n_channels = n_channels
        self.n_downsamplings = n_downsamplings
        self.random_shift = random_shift
        self.augment_dim = augment_dim
        self.vector_field = vector_field
        self.class_weight = class_weight
        self.label_smoothing = label_smoothing
        self.kinetic_penalty = kinetic_penalty
        self.jacobian_penalty = jacobian_penalty
        self.solver = solver
        self.rtol = rtol
        self.atol = atol
        self.max_steps = max_steps
        self.step_size = step_size
        self.gradient = gradient
        self.optimizer = optimizer
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.warm_start = warm_start
        self.device = device
        self.dtype = dtype
        self.verbose = verbose
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self,
        X,
        y,
        sample_weight=None,
        *,
        X_val=None,
        y_val=None,
        sample_weight_val=None,
    ):
        """Fit the network.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Training data.
        y : array-like of shape (n_samples,)
            Class labels.
        sample_weight : array-like of shape (n_samples,), optional
            Sample weights.
        X_val : array-like of shape (n_val, n_features), optional
            Validation data for early stopping, instead of a part of X.
        y_val : array-like of shape (n_val,), optional
            Its labels.
        sample_weight_val : array-like of shape (n_val,), optional
            Its weights.

        Returns
        -------
        self : object
            The fitted estimator.
        """
        return self._fit(X, y, sample_weight, X_val, y_val, sample_weight_val)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y, sample_weight=None, classes=None):
        """Go over the data once, continuing from what was learned before.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Training data. The first call also decides the standardisation.
        y : array-like of shape (n_samples,)
            Class labels.
        sample_weight : array-like of shape (n_samples,), optional
            Sample weights.
        classes : array-like of shape (n_classes,), optional
            All classes that will ever occur; needed in the first call.

        Returns
        -------
        self : object
            The estimator.
        """
        if isinstance(self.class_weight, str):
            raise ValueError(
                "class_weight='balanced' is not supported by partial_fit: it depends "
                "on all data. Pass a dict of weights instead."
            )
        if hasattr(self, "module_"):
            if classes is not None and set(classes) != set(self.classes_):
                raise ValueError(
                    f"classes={classes!r} differs from the classes of the first call, "
                    f"{self.classes_!r}."
                )
        elif classes is None:
            raise ValueError("classes must be passed in the first call of partial_fit.")
        return self._partial_fit(X, y, sample_weight, classes)

    def predict_proba(self, X):
        """Predict class probabilities.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            Probabilities, in the order of ``classes_``.
        """
        return F.softmax(self._outputs(X), dim=1).numpy()

    def predict_log_proba(self, X):
        """Predict logarithms of class probabilities.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            Log-probabilities, in the order of ``classes_``.
        """
        return F.log_softmax(self._outputs(X), dim=1).numpy()

    def decision_function(self, X):
        """Return the network's outputs before the softmax.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.

        Returns
        -------
        ndarray of shape (n_samples,) or (n_samples, n_classes)
            Scores; for two classes the log-odds of the second.
        """
        logits = self._outputs(X)
        if len(self.classes_) == 2:
            return (logits[:, 1] - logits[:, 0]).numpy()
        return logits.numpy()

    def predict(self, X):
        """Predict classes.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.

        Returns
        -------
        ndarray of shape (n_samples,)
            Class labels.
        """
        winner = self._outputs(X).argmax(1).numpy()
        return self.classes_[winner]

    def _check_targets(self, X, y, sample_weight, going_on, classes=None):
        """Return labels and the product of sample and class weights."""
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        weight = self._check_weights(sample_weight, X)
        if self.class_weight is None:
            return y, weight
        if self.class_weight == "balanced":
            known = np.unique(y[weight > 0])
            factor = self._balanced_factors(known, y, near_one(weight)[0])
        else:
            # a batch, or a warm start, may lack some classes
            if classes is None:
                classes = self.classes_ if going_on else y
            known = np.unique(classes)
            factor = self._class_factors(known)
        with np.errstate(over="ignore"):
            weight = weight * factor[np.searchsorted(known, y) % len(known)]
        if not np.isfinite(weight).all():
            raise ValueError(
                "class_weight times sample_weight is infinite for some samples. Use "
                "smaller weights."
            )
        if not (weight > 0).any():
            raise ValueError(
                "class_weight must leave a sample with positive weight. Got "
                f"{self.class_weight!r}, which is 0 for all of them."
            )
        return y, weight

    def _balanced_factors(self, known, y, weight):
        """Return the weight of every class, inversely proportional to what it has."""
        # by weight: a weight of 2 counts as a row twice
        kept = weight > 0
        totals = np.array([weight[kept & (y == c)].sum() for c in known])
        return totals.sum() / (len(known) * totals)

    def _class_factors(self, known):
        """Return the weight of every class, 1 where there is none given."""
        for key, value in self.class_weight.items():
            if not isinstance(value, Real) or not 0 <= value < np.inf:
                raise ValueError(
                    "class_weight must have finite weights that are not negative. Got "
                    f"{value!r} for class {key!r}."
                )
        classes = known.tolist()
        unknown = [key for key in self.class_weight if key not in classes]
        # a part of the data may lack classes, but not classes and weights
        if unknown and not set(classes) <= set(self.class_weight):
            raise ValueError(
                f"class_weight has keys {unknown} that are no classes; the classes are "
                f"{classes}."
            )
        return np.array([float(self.class_weight.get(c, 1.0)) for c in classes])

    def _check_known(self, classes, name):
        unknown = np.setdiff1d(classes, self.classes_)
        if len(unknown):
            raise ValueError(
                f"{name} contains classes that were not seen before: "
                f"{unknown.tolist()}; known are {self.classes_.tolist()}."
            )

    def _see_targets(self, y, going_on):
        """Learn the classes, or make sure that they are known."""
        classes = np.unique(y)
        if going_on:
            self._check_known(classes, "y")
        else:
            self.classes_ = classes
        if len(self.classes_) < 2:
            raise ValueError(
                f"{type(self).__name__} needs samples of at least 2 classes in y, but "
                f"the data contains only one class: {self.classes_[0]!r}."
            )

    def _check_validation_targets(self, y_val):
        y_val = column_or_1d(y_val, warn=True)
        self._check_known(np.unique(y_val), "y_val")
        return y_val

    def _strata(self, y):
        counts = np.unique(y, return_counts=True)[1]
        return y if counts.min() > 1 else None

    def _check_rest(self, y):
        if len(np.unique(y)) < len(self.classes_):
            raise ValueError(
                "early_stopping left no training samples of some classes. Use a "
                "smaller validation_fraction, or pass X_val."
            )

    def _scale_targets(self, y, weight):
        return len(self.classes_)

    def _encode(self, y, dtype):
        return torch.from_numpy(np.searchsorted(self.classes_, y))

    def _losses(self, outputs, targets):
        return F.cross_entropy(
            outputs,
            targets,
            reduction="none",
            label_smoothing=float(self.label_smoothing),
        )

    def _score_outputs(self, outputs, y, weight):
        predicted = self.classes_[outputs.argmax(1).numpy()]
        return float(accuracy_score(y, predicted, sample_weight=weight))


class ODENetRegressor(RegressorMixin, BaseODENet):
    """Regressor whose hidden layers are the flow of a learned ODE.

    The standardised features are mapped linearly into a state ``z(0)``, which follows
    ``dz/dt = f(t, z)`` to ``t = 1``, with a multilayer perceptron ``f``; a linear map
    turns ``z(1)`` into predictions of one or more targets, by least squares on the
    standardised targets. The solver adapts its steps to every sample, so that a
    prediction depends on its own row only.

    Parameters
    ----------
    hidden_layer_sizes : tuple of int or int, default=(64,)
        Sizes of the hidden layers of the vector field.
    activation : {"tanh", "softplus", "silu", "elu", "sigmoid", "relu"}, default="silu"
        Activation of the vector field. Smooth ones need fewer evaluations; "tanh"
        bounds the slopes.
    image_shape : tuple of (channels, height, width), optional
        Shape of an image, if the rows of X are images: channels first, the last axis
        fastest, as ``images.reshape(n_samples, -1)`` makes them. The network is then
        convolutional, as that for MNIST in [1]_, and of single precision by default.
    n_channels : int, default=64
        With ``image_shape``, the channels of the convolutions and of the state;
        ``hidden_layer_sizes`` are the channels inside the vector field.
    n_downsamplings : int, optional
        With ``image_shape``, how often the image is halved before the ODE; by default
        until its shorter side is at most 8 pixels.
    random_shift : int or "auto", default="auto"
        With ``image_shape``, up to how many pixels images are shifted at random along
        both axes, anew in every epoch of training. Predictions then depend less on
        where in the image something is; use 0 where that matters. "auto" is a
        sixteenth of the shorter side, rounded down.
    augment_dim : int or "auto", default="auto"
        State dimensions (channels, for images) beyond the features. Flows cannot
        cross: with a few dimensions more they can pass by each other [2]_. The flow of
        a single feature is even monotone. "auto" is 2, and 0 for images
        and where there are more than 16 features.
    vector_field : callable, optional
        Makes another vector field than the built-in one: called with the shape of a
        state, a tuple, it returns a `torch.nn.Module` whose ``forward(t, y)`` maps
        times (n, 1, ...) and states (n, \\*shape) to slopes in the shape of the states,
        row by row. A class will do. It is called again when an estimator is unpickled,
        so it has to be importable; ``hidden_layer_sizes`` and ``activation`` do not
        reach it.
    kinetic_penalty : float, default=0
        Strength of a penalty on the kinetic energy of the flow, the mean of ``f^2``
        over state and time [3]_. Flows become straighter and need fewer evaluations.
        Training takes longer: the compiled kernels do not serve it. At a tolerance as
        loose as 1e-2 use it with ``jacobian_penalty``, or else ``rtol=1e-3``: a field
        may spend its energy between the stages of the solver.
    jacobian_penalty : float, default=0
        Strength of a penalty on the mean square of ``e^T df/dz`` over state and time,
        with random signs ``e`` drawn for every batch [3]_. Flows become smoother.
    solver : {"dopri5", "tsit5", "bosh3", "dopri8", "heun", "rk4", "midpoint", \
            "euler", "adams", "rodas5p", "scipy_rk45", "scipy_rk23", "scipy_dop853", \
            "scipy_radau", "scipy_bdf", "scipy_lsoda"}, default="dopri5"
        ODE solver, as in `sknode.ode.solve_ode`. "rk4", "midpoint" and "euler" take
        constant steps of length ``step_size``, the others adapt them to the tolerance.
        "adams" and those of scipy train with ``gradient="continuous"`` only.
    rtol, atol : float, default=1e-2
        Relative and absolute tolerance of the solver. Read again at prediction:
        ``reg.set_params(rtol=1e-6).predict(X)`` solves more accurately with the same
        weights.
    max_steps : int, default=1000
        Steps that the solver may attempt for a sample.
    step_size : float, default=0.1
        Length of the steps of the solvers without error estimate; the interval is 1.
    gradient : {"discrete", "continuous", "backprop"}, default="discrete"
        How to differentiate the solver: the exact reverse of its steps, in the memory
        of the states; a second solve backwards in time, in memory that does not grow
        with the steps; or torch's autograd through all operations.
    optimizer : {"adam", "muon"}, default="adam"
        Training algorithm. "muon" orthogonalises the updates of matrices and leaves
        other weights to Adam.
    alpha : float, default=0.3
        Strength of the L2 penalty on the weight matrices: ``alpha / 2`` times the sum
        of their squares is added to the sum of the losses of all rows, as in
        `sklearn.linear_model.Ridge`. All rows are those of all calls, with
        ``partial_fit``.
    batch_size : int or "auto", default="auto"
        Rows of a minibatch; "auto" is an eighth of them, but from 32 to 200,
        or to 64 for images.
    learning_rate_init : float, default=1e-2
        Step size of the training algorithm.
    max_iter : int, default=200
        Largest number of epochs.
    tol : float, default=5e-3
        What the loss (or the validation score) has to gain to count as progress, since
        the last epoch that counted.
    n_iter_no_change : int, default=5
        After more than so many epochs without progress training ends, with as many
        epochs in which the learning rate falls to zero. It also falls before
        ``max_iter``, unless ``warm_start`` says that training will go on.
    early_stopping : bool, default=False
        Whether to hold out ``validation_fraction`` of the data, stop by the score on it
        and restore the best weights. Implied by passing ``X_val`` to ``fit``.
    validation_fraction : float, default=0.1
        Share of the data held out.
    warm_start : bool, default=False
        Whether ``fit`` goes on from the last one, with the training algorithm's state.
    device : str, default="cpu"
        Torch device; "auto" is an accelerator if there is one.
    dtype : {"auto", "float32", "float64"}, default="auto"
        Precision. "auto" is that of X, and float32 on an accelerator and for images.
    verbose : bool, default=False
        Whether to print a line an epoch: loss, evaluations, validation score, and the
        time that is left if training goes on to ``max_iter``.
    random_state : int, RandomState instance or None, default=None
        Draws initial weights, batches and held out data.

    Attributes
    ----------
    y_mean_ : ndarray of shape () or (n_outputs,)
        Weighted mean of the targets.
    y_scale_ : ndarray of shape () or (n_outputs,)
        Their weighted standard deviation; 1 where a target is constant.
    n_features_in_ : int
        Number of features seen in ``fit``.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the features, if X had string column names.
    n_iter_ : int
        Number of epochs of the last ``fit``.
    loss_ : float
        Training loss (half the mean squared error of the standardised targets) of the
        last epoch.
    loss_curve_ : list of float
        Training loss, an entry an epoch.
    validation_scores_ : list of float or None
        R2 on the held out data, an entry an epoch; None without.
    best_validation_score_ : float or None
        The best of them; its weights were kept.
    nfe_curve_ : list of float
        Mean number of function evaluations a sample, an entry an epoch.
    module_ : torch.nn.Module
        The trained network; it predicts standardised targets.

    See Also
    --------
    ODENetClassifier : The same for classes.
    sklearn.neural_network.MLPRegressor : Multilayer perceptron.
    sknode.ode.solve_ode : The solver.

    Notes
    -----
    Rows with weight zero are left out. In a batch the loss is the weighted mean, so a
    weight of 2 equals a row twice as long as all fit into one batch.

    References
    ----------
    .. [1] Chen, Rubanova, Bettencourt & Duvenaud, "Neural Ordinary Differential
       Equations", NeurIPS 2018.
    .. [2] Dupont, Doucet & Teh, "Augmented Neural ODEs", NeurIPS 2019.
    .. [3] Finlay, Jacobsen, Nurbekyan & Oberman, "How to train your neural ODE: the
       world of Jacobian and kinetic regularization", ICML 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from sknode import ODENetRegressor
    >>> X = np.linspace(-3, 3, 200)[:, None]
    >>> y = np.c_[np.sin(X[:, 0]), np.abs(X[:, 0])]
    >>> reg = ODENetRegressor(random_state=0).fit(X, y)
    >>> reg.score(X, y) > 0.95
    True
    >>> reg.predict(X[:3]).shape
    (3, 2)
    """

    _y_checks: ClassVar[dict] = {"multi_output": True, "y_numeric": True}

    def __init__(
        self,
        hidden_layer_sizes=(64,),
        activation="silu",
        *,
        image_shape=None,
        n_channels=64,
        n_downsamplings=None,
        random_shift="auto",
        augment_dim="auto",
        vector_field=None,
        kinetic_penalty=0.0,
        jacobian_penalty=0.0,
        solver="dopri5",
        rtol=1e-2,
        atol=1e-2,
        max_steps=1000,
        step_size=0.1,
        gradient="discrete",
        optimizer="adam",
        alpha=0.3,
        batch_size="auto",
        learning_rate_init=1e-2,
        max_iter=200,
        tol=5e-3,
        n_iter_no_change=5,
        early_stopping=False,
        validation_fraction=0.1,
        warm_start=False,
        device="cpu",
        dtype="auto",
        verbose=False,
        random_state=None,
    ):
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.image_shape = image_shape
        self.n_channels = n_channels
        self.n_downsamplings = n_downsamplings
        self.random_shift = random_shift
        self.augment_dim = augment_dim
        self.vector_field = vector_field
        self.kinetic_penalty = kinetic_penalty
        self.jacobian_penalty = jacobian_penalty
        self.solver = solver
        self.rtol = rtol
        self.atol = atol
        self.max_steps = max_steps
        self.step_size = step_size
        self.gradient = gradient
        self.optimizer = optimizer
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.warm_start = warm_start
        self.device = device
        self.dtype = dtype
        self.verbose = verbose
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self,
        X,
        y,
        sample_weight=None,
        *,
        X_val=None,
        y_val=None,
        sample_weight_val=None,
    ):
        """Fit the network.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Training data.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Targets.
        sample_weight : array-like of shape (n_samples,), optional
            Sample weights.
        X_val : array-like of shape (n_val, n_features), optional
            Validation data for early stopping, instead of a part of X.
        y_val : array-like of shape (n_val,) or (n_val, n_outputs), optional
            Its targets.
        sample_weight_val : array-like of shape (n_val,), optional
            Its weights.

        Returns
        -------
        self : object
            The fitted estimator.
        """
        return self._fit(X, y, sample_weight, X_val, y_val, sample_weight_val)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y, sample_weight=None):
        """Go over the data once, continuing from what was learned before.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Training data. The first call also decides the standardisation.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Targets. The first call also decides their standardisation.
        sample_weight : array-like of shape (n_samples,), optional
            Sample weights.

        Returns
        -------
        self : object
            The estimator.
        """
        return self._partial_fit(X, y, sample_weight)

    def predict(self, X):
        """Predict targets.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.

        Returns
        -------
        ndarray of shape (n_samples,) or (n_samples, n_outputs)
            Predictions, in the shape that y had in ``fit``, and in double precision
            if y or the network was.
        """
        return self._in_units(self._outputs(X))

    def _in_units(self, outputs):
        """Return outputs of the network as targets."""
        values = outputs.numpy().reshape(len(outputs), *self.y_mean_.shape)
        dtype = getattr(self, "_target_dtype", values.dtype)  # not in old pickles
        dtype = np.result_type(values.dtype, dtype)
        return (values * self.y_scale_ + self.y_mean_).astype(dtype)

    def _check_validation(self, y_val):
        if len(y_val) < 2:
            raise ValueError(
                "R2 on validation data needs two samples or more. Raise "
                "validation_fraction, or pass more rows as X_val."
            )

    def _check_targets(self, X, y, sample_weight, going_on, classes=None):
        if not going_on:
            # single precision would lose targets that are far from zero
            self._target_dtype = y.dtype.name if y.dtype.kind == "f" else "float32"
        return y.astype(np.float64), self._check_weights(sample_weight, X)

    def _see_targets(self, y, going_on):
        """Learn the shape of a target, or make sure that it is as before."""
        if going_on:
            self._check_shape(y, "y")
        self._target_shape = y.shape[1:]

    def _check_shape(self, y, name):
        if y.shape[1:] != self._target_shape:
            expected = ", ".join(("n_samples", *map(str, self._target_shape)))
            raise ValueError(
                f"{name} must have shape ({expected}{'' if self._target_shape else ','}"
                "), as the targets before. "
                f"Got {y.shape} instead."
            )

    def _check_validation_targets(self, y_val):
        self._check_shape(y_val, "y_val")
        return y_val.astype(np.float64)

    def _scale_targets(self, y, weight):
        """Learn mean and scale of the targets."""
        columns = y.reshape(len(y), -1)
        check_spread(columns, weight, np.arange(columns.shape[1]), "y")
        mean = np.average(y, axis=0, weights=weight)
        scale = np.sqrt(np.average((y - mean) ** 2, axis=0, weights=weight))
        self.y_scale_ = usable_scale(mean, scale, y)
        # a constant is its own mean, to the last digit: Adam would take the rounding
        # error for something to learn
        self.y_mean_ = np.where(self.y_scale_ == scale, mean, y[0])
        return 1 if y.ndim == 1 else y.shape[1]

    def _encode(self, y, dtype):
        scaled = (y - self.y_mean_) / self.y_scale_
        return torch.from_numpy(scaled).to(dtype).reshape(len(y), -1)

    def _losses(self, outputs, targets):
        return 0.5 * (outputs - targets).square().mean(1)

    def _score_outputs(self, outputs, y, weight):
        return float(r2_score(y, self._in_units(outputs), sample_weight=weight))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
