"""ODE-Nets: networks whose hidden layers are the flow of an ODE."""

from __future__ import annotations

import copy
import warnings
from numbers import Integral, Real
from typing import ClassVar

import numpy as np
import torch
from sklearn.base import ClassifierMixin, _fit_context
from sklearn.model_selection import train_test_split
from sklearn.utils import compute_class_weight
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_is_fitted,
    column_or_1d,
)
from torch.nn import functional as F

from sknode._base import CHUNK, SHARED_CONSTRAINTS, BaseODEEstimator
from sknode._network import ODENetwork
from sknode._training import History, make_optimizer, train
from sknode.ode import SolverWarning
from sknode.ode.integrate import ROW_BLOCK

__all__ = ["ODENetClassifier"]


class ODENetClassifier(ClassifierMixin, BaseODEEstimator):
    r"""Classifier whose hidden layers are the flow of a learned ODE.

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
    augment_dim : int, default=0
        State dimensions beyond the features. Flows cannot cross: with a few dimensions
        more they can pass by each other [2]_.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes. "balanced" is inversely proportional to their
        frequencies.
    label_smoothing : float, default=0.1
        Share of every label that is spread over all classes. Training then ends at
        finite margins instead of pushing them up for ever, which generalises better;
        probabilities stay about ``label_smoothing / n_classes`` away from 0. Use 0 for
        the plain log-loss.
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
    optimizer : {"adam"}, default="adam"
        Training algorithm.
    alpha : float, default=1e-4
        Strength of the L2 penalty on the weights, divided by the weight of a batch as
        in `sklearn.neural_network.MLPClassifier`.
    batch_size : int or "auto", default="auto"
        Rows of a minibatch; "auto" is an eighth of them, but from 32 to 200.
    learning_rate_init : float, default=1e-2
        Step size of the training algorithm.
    max_iter : int, default=200
        Largest number of epochs.
    tol : float, default=5e-3
        What the loss (or the validation score) has to gain to count as progress.
    n_iter_no_change : int, default=10
        After so many epochs without progress training ends, with as many epochs more
        in which the learning rate falls to zero.
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
        Precision. "auto" is that of X, and float32 on an accelerator.
    verbose : bool, default=False
        Whether to print a line an epoch.
    random_state : int, RandomState instance or None, default=None
        Draws initial weights, batches and held out data.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The classes.
    n_features_in_ : int
        Number of features seen in ``fit``.
    feature_names_in_ : ndarray of shape (n_features_in_,)
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
        **SHARED_CONSTRAINTS,
        "augment_dim": [Interval(Integral, 0, None, closed="left")],
        "class_weight": [dict, StrOptions({"balanced"}), None],
        "label_smoothing": [Interval(Real, 0, 1, closed="left")],
    }

    def __init__(
        self,
        hidden_layer_sizes=(64,),
        activation="silu",
        *,
        augment_dim=0,
        class_weight=None,
        label_smoothing=0.1,
        solver="dopri5",
        rtol=1e-2,
        atol=1e-2,
        max_steps=1000,
        step_size=0.1,
        gradient="discrete",
        optimizer="adam",
        alpha=1e-4,
        batch_size="auto",
        learning_rate_init=1e-2,
        max_iter=200,
        tol=5e-3,
        n_iter_no_change=10,
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
        self.augment_dim = augment_dim
        self.class_weight = class_weight
        self.label_smoothing = label_smoothing
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
        going_on = self.warm_start and hasattr(self, "module_")
        X, y = self._validate(X, y, reset=not going_on)
        y, weight = self._check_targets(X, y, sample_weight)
        classes = np.unique(y[weight > 0])
        if going_on:
            self._check_known(classes, "y")
        else:
            self.classes_ = classes
        if len(self.classes_) < 2:
            raise ValueError(
                f"{type(self).__name__} needs samples of at least 2 classes in y, but "
                f"the data contains only one class: {self.classes_[0]!r}."
            )
        validation = self._validation_data(X_val, y_val, sample_weight_val)
        rng_seed = self._seed()
        kept = weight > 0
        X, y, weight = X[kept], y[kept], weight[kept]
        if self.early_stopping and validation is None:
            X, y, weight, *validation = self._hold_out(X, y, weight, rng_seed)
        if not going_on:
            self._start(X, weight, rng_seed)
        self._train(X, y, weight, validation, self.max_iter, rng_seed)
        return self

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
        if self.early_stopping:
            raise ValueError("partial_fit does not support early_stopping=True.")
        if isinstance(self.class_weight, str):
            raise ValueError(
                "class_weight='balanced' is not supported by partial_fit: it depends "
                "on all data. Pass a dict of weights instead."
            )
        first = not hasattr(self, "module_")
        if first and classes is None:
            raise ValueError("classes must be passed in the first call of partial_fit.")
        X, y = self._validate(X, y, reset=first)
        y, weight = self._check_targets(X, y, sample_weight, classes)
        if first:
            self.classes_ = np.unique(classes)
            if len(self.classes_) < 2:
                raise ValueError("classes must contain at least 2 classes.")
        elif classes is not None and not np.array_equal(
            self.classes_, np.unique(classes)
        ):
            raise ValueError(
                f"classes={classes!r} differs from the classes of the first call, "
                f"{self.classes_!r}."
            )
        self._check_known(np.unique(y), "y")
        kept = weight > 0
        X, y, weight = X[kept], y[kept], weight[kept]
        seed = self._seed()
        if first:
            self._start(X, weight, seed)
        else:
            # another order of the rows in every call
            seed = (seed + self._n_epochs) % (2**31 - 1)
        self._train(X, y, weight, None, 1, seed, keep_history=True)
        return self

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
        return F.softmax(self._logits(X), dim=1).numpy()

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
        return F.log_softmax(self._logits(X), dim=1).numpy()

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
        logits = self._logits(X)
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
        winner = self._logits(X).argmax(1).numpy()
        return self.classes_[winner]

    def trajectory(self, X, n_times=50):
        """Follow the hidden state of samples from t = 0 to t = 1.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.
        n_times : int, default=50
            Number of equally spaced times, both ends included.

        Returns
        -------
        ndarray of shape (n_samples, n_times, n_features + augment_dim)
            States.
        """
        if not isinstance(n_times, Integral) or n_times < 2:
            raise ValueError(f"n_times must be an integer >= 2. Got {n_times!r}.")
        t = torch.linspace(0.0, 1.0, int(n_times), dtype=torch.float64)
        return self._flow(X, t).numpy()

    def _check_targets(self, X, y, sample_weight, classes=None):
        """Return labels and the product of sample and class weights."""
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        weight = _check_sample_weight(
            sample_weight, X, dtype=np.float64, ensure_non_negative=True
        )
        if not (weight > 0).any():
            raise ValueError("sample_weight must have at least one positive weight.")
        if self.class_weight is not None:
            present = np.unique(y[weight > 0]) if classes is None else classes
            present = np.unique(present)
            factor = self._class_factors(present, y, weight)
            weight = weight * factor[np.searchsorted(present, y) % len(present)]
        return y, weight

    def _class_factors(self, present, y, weight):
        """Return the weight of every class."""
        if self.class_weight == "balanced":
            # by weight: a weight of 2 counts as a row twice
            kept = weight > 0
            totals = np.array([weight[kept & (y == c)].sum() for c in present])
            return totals.sum() / (len(present) * totals)
        unknown = set(self.class_weight) - set(present.tolist())
        if unknown and not set(present.tolist()) & set(self.class_weight):
            raise ValueError(
                f"class_weight has keys {sorted(map(str, unknown))} that are no "
                f"classes; the classes are {present.tolist()}."
            )
        return compute_class_weight(
            {k: v for k, v in self.class_weight.items() if k not in unknown},
            classes=present,
            y=present,
        )

    def _check_known(self, classes, name):
        unknown = np.setdiff1d(classes, self.classes_)
        if len(unknown):
            raise ValueError(
                f"{name} contains classes that were not seen before: "
                f"{unknown.tolist()}; known are {self.classes_.tolist()}."
            )

    def _validation_data(self, X_val, y_val, sample_weight_val):
        """Check data passed for validation."""
        if X_val is None:
            if y_val is not None or sample_weight_val is not None:
                raise ValueError("y_val and sample_weight_val need X_val.")
            return None
        if y_val is None:
            raise ValueError("X_val needs y_val.")
        X_val, y_val = self._validate(X_val, y_val)
        y_val = column_or_1d(y_val, warn=True)
        self._check_known(np.unique(y_val), "y_val")
        weight = _check_sample_weight(sample_weight_val, X_val, dtype=np.float64)
        return X_val, y_val, weight

    def _hold_out(self, X, y, weight, seed):
        """Split off a part for validation, by class."""
        counts = np.unique(y, return_counts=True)[1]
        X, X_val, y, y_val, weight, weight_val = train_test_split(
            X,
            y,
            weight,
            test_size=self.validation_fraction,
            random_state=seed,
            stratify=y if counts.min() > 1 else None,
        )
        if len(np.unique(y)) < len(self.classes_):
            raise ValueError(
                "early_stopping left no training samples of some classes. Use a "
                "smaller validation_fraction, or pass X_val."
            )
        return X, y, weight, X_val, y_val, weight_val

    def _start(self, X, weight, seed):
        """Build the module for this data."""
        device = self._device()
        self._module_config = {
            "n_features": X.shape[1],
            "n_outputs": len(self.classes_),
            "hidden_layer_sizes": self._hidden_layer_sizes(),
            "activation": self.activation,
            "augment_dim": int(self.augment_dim),
        }
        dtype = self._dtype(X, device)
        module = self._new_module(self._module_config, dtype, device, seed)
        mean = np.average(X, axis=0, weights=weight)
        scale = np.sqrt(np.average((X - mean) ** 2, axis=0, weights=weight))
        # what is constant up to rounding stays as it is
        constant = scale <= 10 * np.finfo(X.dtype).eps * np.abs(mean)
        scale = np.where(constant, 1.0, scale)
        module.mean.copy_(torch.from_numpy(mean))
        module.scale.copy_(torch.from_numpy(scale))
        self.module_ = module
        self._optimizer_state = None
        self._n_epochs = 0

    def _make_module(self, **config):
        return ODENetwork(**config)

    def _train(
        self, X, y, weight, validation, max_iter, seed, keep_history=False
    ) -> None:
        """Run the training loop and set the fitted attributes."""
        module, device = self.module_.train(), self._device()
        module.to(device)
        dtype = next(module.parameters()).dtype
        settings = self._solver_settings(dtype)
        recipe = self._recipe(len(X), max_iter)
        optimizer = make_optimizer(module, recipe, self._optimizer_state)
        codes = np.searchsorted(self.classes_, y)
        data = (
            torch.from_numpy(np.array(X)).to(device, dtype),
            torch.from_numpy(codes).to(device),
        )

        def objective(x, target):
            logits, nfe = module(x, settings)
            smoothing = float(self.label_smoothing)
            losses = F.cross_entropy(
                logits, target, reduction="none", label_smoothing=smoothing
            )
            return losses, nfe

        validate = None
        if validation is not None:
            X_val, y_val, weight_val = validation

            def validate():
                right = self._predict_checked(X_val, settings) == y_val
                return float(np.average(right, weights=weight_val))

        context = self._init_callback_context(max_subtasks=max_iter)
        context.call_on_fit_task_begin(estimator=self, X=X, y=y)
        history = History()
        generator = torch.Generator().manual_seed(seed)
        try:
            n_iter = train(
                module,
                data,
                torch.from_numpy(weight).to(device, dtype),
                objective,
                optimizer,
                recipe,
                generator,
                history,
                validate=validate,
                on_epoch=self._epoch_callback(context, history, X, y),
            )
        except KeyboardInterrupt:
            warnings.warn("Training interrupted by user.", stacklevel=3)
            n_iter = len(history.loss)
        module.eval()
        self._optimizer_state = optimizer.state_dict()
        self._finish(history, n_iter, validation is not None, keep_history)
        context.call_on_fit_task_end(
            estimator=self, X=X, y=y, reconstruction_attributes={}
        )

    def _epoch_callback(self, context, history, X, y):
        """Return a function that tells scikit-learn's callbacks of an epoch."""

        def on_epoch(epoch):
            task = context.subcontext(task_name="epoch")
            task.call_on_fit_task_begin(estimator=self, X=X, y=y)
            return task.call_on_fit_task_end(
                estimator=self,
                X=X,
                y=y,
                metadata={"loss": history.loss[-1], "nfe": history.nfe[-1]},
                reconstruction_attributes=lambda: {
                    "module_": copy.deepcopy(self.module_).eval(),
                    "n_iter_": epoch + 1,
                },
            )

        return on_epoch

    def _finish(self, history, n_iter, validated, keep_history):
        """Set the fitted attributes of a training."""
        self._n_epochs += n_iter
        before = keep_history and hasattr(self, "loss_curve_")
        self.loss_curve_ = (self.loss_curve_ if before else []) + history.loss
        self.nfe_curve_ = (self.nfe_curve_ if before else []) + history.nfe
        self.n_iter_ = (self.n_iter_ if before else 0) + n_iter
        self.loss_ = self.loss_curve_[-1] if self.loss_curve_ else None
        self.validation_scores_ = history.validation if validated else None
        self.best_validation_score_ = max(history.validation) if validated else None

    def _chunks(self, X, module, dtype):
        """Yield blocks of rows on the device, filled up to what the solver likes."""
        device = next(module.parameters()).device
        for start in range(0, len(X), CHUNK):
            rows = X[start : start + CHUNK]
            block = np.zeros((-(-len(rows) // ROW_BLOCK) * ROW_BLOCK, X.shape[1]))
            block[: len(rows)] = rows
            block[len(rows) :] = rows[-1]
            yield len(rows), torch.from_numpy(block).to(device, dtype)

    def _solve(self, X, read, settings=None, t=None):
        """Solve for checked rows and return ``read(module, solution)`` for them.

        A full block has the same bits in whatever company a row comes.
        """
        module = self._module_for_prediction()
        dtype = next(module.parameters()).dtype
        settings = settings or self._solver_settings(dtype)
        results, failures = [], []
        with torch.no_grad():
            for n, block in self._chunks(X, module, dtype):
                solution = module.flow(block, settings, t)
                if solution.status[:n].any():
                    failures.append(solution.failure_report())
                results.append(read(module, solution)[:n].cpu())
        if failures:
            warnings.warn(
                "The solver did not reach the end for some rows of X, whose results "
                f"are those of the last state it reached. {' '.join(failures)}",
                SolverWarning,
                stacklevel=4,
            )
        return torch.cat(results)

    def _logits(self, X):
        check_is_fitted(self)
        return self._solve(
            self._validate(X), lambda module, s: module.output_map(s.y[:, -1])
        )

    def _flow(self, X, t):
        check_is_fitted(self)
        return self._solve(self._validate(X), lambda module, s: s.y, t=t)

    def _predict_checked(self, X, settings):
        logits = self._solve(
            X, lambda module, s: module.output_map(s.y[:, -1]), settings
        )
        return self.classes_[logits.argmax(1).numpy()]

    def __sklearn_is_fitted__(self):
        return hasattr(self, "module_")
