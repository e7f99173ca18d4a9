"""Density estimation by a continuous normalizing flow."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from typing import ClassVar

import numpy as np
import torch
from sklearn.base import (
    ClassNamePrefixFeaturesOutMixin,
    DensityMixin,
    TransformerMixin,
    _fit_context,
)
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import (
    _check_sample_weight,
    check_array,
    check_is_fitted,
)

from sknode._base import (
    SHARED_CONSTRAINTS,
    BaseODEEstimator,
    all_or_nothing,
    near_one,
    outcome,
    padded_blocks,
    warn_of_failures,
)
from sknode._density_flow import DYNAMICS, DensityFlow
from sknode._density_posterior import ClassPosteriorMixin
from sknode._density_prepare import Maps, prepare_rows
from sknode._density_rows import hold_out
from sknode._density_solve import (
    carry,
    count_evaluations,
    follow,
    log_density,
    slopes,
)
from sknode._density_start import Start, choose_start, is_better
from sknode._density_training import FlowTrainer, check_target_density
from sknode._mixture import GaussianMixtureModel
from sknode._training import History, warn_unless_converged
from sknode._warp import Whitening
from sknode.ode.methods import get_method

__all__ = ["CNFDensity"]

# Solves are made in blocks of so many rows, fewer where the mixture is large.
CHUNK_ROWS, CHUNK_VALUES = 4096, 2**22
# With fewer different rows no network is trained: too few are held out to judge it.
LEAST_ROWS = 200
# Components, at most, that networks start from, unless there is a number given.
FEW_COMPONENTS = 4
# Updates an epoch that are aimed at.
N_UPDATES = 32
# In single precision there is no use in asking for more.
SINGLE_TOLERANCE = 1e-5
# Flows that amplify the errors of their solves are solved more accurately: as this many
# rows, at this tolerance, tell; but no more than so many times. Log-densities and where
# rows are carried are told apart: that of a mixture needs no solve, but its flow does.
JUDGED_ROWS, JUDGED_TOLERANCE, LARGEST_AMPLIFICATION = 200, 1e-5, 1e3
# What derivatives of the maps of columns are differences over, in whitened units.
DIFFERENCE = 1e-4
# Solves inside of training need not be more accurate than this.
TRAINING_TOLERANCE = 1e-3


class CNFDensity(
    ClassPosteriorMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    DensityMixin,
    BaseODEEstimator,
):
    """Density estimation by a continuous normalizing flow.

    A flow ``dy/dt = f(t, y)`` carries a standard normal distribution at ``t = 0`` to
    that of the data at ``t = 1`` [1]_. It starts from the exact flow to a Gaussian
    mixture, or a single Gaussian, and a network learns what is missing, by flow
    matching [2]_; whatever does not raise the likelihood of held-out rows is left out.
    Log-densities are exact: divergences are closed forms, nothing is sampled.

    Parameters
    ----------
    hidden_layer_sizes : tuple of int or int, default=(64, 64)
        Sizes of the hidden layers of the vector field; with ``dynamics="planar"`` their
        sum is the number of planar units.
    activation : {"tanh", "softplus", "silu", "elu", "sigmoid", "relu"}, default="tanh"
        Activation of the vector field; planar units always have "tanh".
    dynamics : {"mlp", "planar"}, default="mlp"
        Vector field: a perceptron with gates of time, or the sum of gated planar units
        of [1]_.
    vector_field : callable, optional
        Makes another vector field than these two: called with the shape of a state,
        ``(n_features,)``, it returns a `torch.nn.Module` whose ``forward(t, y)`` maps
        times (n, 1) and states (n, n_features) to slopes, row by row. A class will do.
        It is called again when an estimator is unpickled, so it has to be importable.
        Every network of the flow is one of its own, times a learned number that starts
        as zero.
    divergence : {"exact", "hutchinson"}, default="exact"
        How training by the likelihood gets the divergence of a field without closed
        form, which are a ``vector_field`` and perceptrons of three layers or more: by
        as many products as there are features, or estimated by one, with random signs
        [3]_. Log-densities of the fitted estimator are always exact.
    objective : {"flow_matching", "likelihood"}, default="flow_matching"
        How the network is trained: by regression on the velocity of straight paths from
        noise to rows, without any solve; or by the likelihood, through the solver as in
        [1]_, which takes far longer.
    kinetic_penalty, jacobian_penalty : float, default=0.0
        With ``objective="likelihood"`` and in `fit_target`, strength of the penalties
        on what the flow until ``t = 1`` spends: the integrals of the mean of ``f^2``
        and of the mean square of the entries of its Jacobian, times their number a row
        [4]_. They favour flows that are cheap to solve.
    n_components : int or "auto", default="auto"
        Components of the mixture that the flow starts from, with full covariances.
        "auto" tries 1, 2, 4, ... up to 64 on held-out rows; 1 is the Gaussian of
        maximum likelihood. There are no more of them than different rows. Of classes it
        is the number each, fewer for one of few rows.
    marginals : bool or "auto", default="auto"
        Whether every column is first mapped to a normal distribution by itself, which
        helps where columns are skewed or have heavy tails. "auto" tries both on
        held-out rows.
    bounds : dict or array-like of shape (n_features, 2), default=None
        Limits of columns: a dict from names or positions of columns to pairs
        ``(low, high)``, or a pair for every column; None or infinite where there is no
        limit. Between its limits a column is mapped to the whole line before all else.
        The density is zero beyond them, and no sample is there.
    dequantize : bool, dict or array-like, default=False
        Columns of rounded or otherwise discrete values. In ``fit`` they get uniform
        noise, as wide as their resolution and centred at the values; `sample` rounds to
        the values. Names, positions or a mask of columns, or a dict from columns to
        widths; without them the resolution is the smallest gap between values. True
        takes the columns in which a value occurs again and again, which are warned of
        otherwise.
    conditional : bool or {"classes", "values"}, default=False
        Whether the density is that of X given y: one column of classes, or one or
        several of values. True lets `sklearn.utils.multiclass.type_of_target` tell,
        for which whole numbers are classes. Methods then need y as well, and with
        classes there are `predict`, `predict_proba` and `predict_log_proba`. Otherwise
        y is ignored.
    refine : bool, default=True
        Whether a second network is trained by maximum likelihood before the first one:
        it continues the flow from the mixture, whose density needs no solve, to the
        data, so that this costs little. Flow matching then has less to do.
    solver : {"dopri5", "tsit5", "bosh3", "dopri8", "heun", "rk4", "midpoint", \
            "euler", "adams", "rodas5p", "scipy_rk45", "scipy_rk23", "scipy_dop853", \
            "scipy_radau", "scipy_bdf", "scipy_lsoda"}, default="dopri5"
        ODE solver, as in `sknode.ode.solve_ode`. "rk4", "midpoint" and "euler" take
        constant steps of length ``step_size``, the others adapt them to the tolerance.
    rtol, atol : float, default=1e-7
        Relative and absolute tolerance of log-densities, at least 1e-5 in single
        precision. The solver has to be more accurate where the flow amplifies its
        errors: by how much, `fit` finds out. Read again by every method:
        ``density.set_params(rtol=1e-9).score_samples(X)`` solves more accurately with
        the same weights.
    max_steps : int, default=1000
        Steps that the solver may attempt for a sample.
    step_size : float, default=0.02
        Length of the steps of the solvers without error estimate; the interval is 1.
    gradient : {"discrete", "continuous", "backprop"}, default="discrete"
        With ``objective="likelihood"``, how to differentiate the solver.
    optimizer : {"adam", "muon"}, default="muon"
        Training algorithm. "muon" orthogonalises the updates of matrices [5]_, and
        leaves other weights to Adam; it takes far fewer updates here.
    alpha : float, default=1e-4
        Strength of the L2 penalty on the weights.
    batch_size : int or "auto", default="auto"
        Rows of a minibatch; "auto" is 1/32 of them, but from 32 to 200.
    learning_rate_init : float, default=1e-2
        Step size of the training algorithm.
    max_iter : int, default=90
        Largest number of epochs of each network. An epoch is a pass over the rows; of
        more than 10,000 it takes so many, drawn anew.
    tol : float, default=2e-3
        What the held-out log-likelihood (the loss, without ``early_stopping``) has to
        gain to count as progress.
    n_iter_no_change : int, default=10
        After so many epochs without progress training ends, with as many epochs more,
        or 0.3 times those before, in which the learning rate falls to zero.
    early_stopping : bool, default=True
        Whether to hold out ``validation_fraction`` of the rows, to stop by their
        likelihood, keep the best weights, and keep the network only if it is better
        than the mixture. Otherwise the network is trained on all rows and kept.
    validation_fraction : float, default=0.1
        Share of the rows held out.
    warm_start : bool, default=False
        Whether ``fit`` goes on from the last one, with its maps, mixture and network.
    device : str, default="cpu"
        Torch device; "auto" is an accelerator if there is one.
    dtype : {"auto", "float32", "float64"}, default="auto"
        Precision of the solves. "auto" is float64 on the CPU and float32 on an
        accelerator. Training is always in single precision; results have that of X.
    verbose : bool, default=False
        Whether to print a line an epoch: loss, evaluations, validation score, and the
        time that is left if training goes on to ``max_iter``. What is trained first,
        by ``refine``, and the flow have lines and times of their own.
    random_state : int, RandomState instance or None, default=None
        Draws initial weights, mixtures, batches and held-out rows.

    Attributes
    ----------
    n_features_in_ : int
        Number of features seen in ``fit``.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the features, if X had string column names.
    n_components_ : int
        Components of the mixture that the flow starts from; those of all classes.
    marginals_ : bool
        Whether columns are mapped to normal distributions first.
    classes_ : ndarray of shape (n_classes,)
        Labels, if the density is conditional on classes.
    class_prior_ : ndarray of shape (n_classes,)
        Shares of the classes, if there are any.
    widths_ : ndarray of shape (`n_features_in_`,)
        Widths of the columns that are dequantized, 0 for others.
    n_iter_ : int
        Number of epochs, also of networks that were left out in the end; where none
        was trained, iterations of the mixture.
    loss_ : float or None
        Training loss of the last epoch, whether its network was kept or not; None if
        there was none.
    loss_curve_ : list of float
        Training loss, an entry an epoch: the mean square of what the network misses of
        a velocity, most of which is noise. The epochs of ``refine`` come first; theirs
        is minus the mean log-density of whitened rows.
    validation_scores_ : list of float or None
        Mean log-density of held-out rows in the units of X, an entry an epoch; None
        without.
    best_validation_score_ : float or None
        That of the result: the best of its last network; where none was kept that of
        the mixture, before it was fitted to the held-out rows, too.
    nfe_curve_ : list of float
        Mean number of evaluations of the network a row, an entry an epoch.
    module_ : torch.nn.Module
        The fitted flow of whitened rows.

    See Also
    --------
    sklearn.neighbors.KernelDensity : Kernel density estimation.
    sklearn.mixture.GaussianMixture : Gaussian mixtures.
    sknode.datasets.make_density : Distributions with known densities.

    Notes
    -----
    Equal rows are merged and their weights added, and all draws depend on the merged
    rows in sorted order: a weight of 2 equals a row twice, and the order of rows does
    not matter. Weights are relative. With ``conditional=True`` rows are equal if y is
    equal, too.

    With fewer than 200 different rows no network is trained; with fewer than twice as
    many as columns the result is a Gaussian with correlations shrunk towards zero.

    Discrete columns have no density, and a flexible model can raise its likelihood
    without bound on them: see ``dequantize``. With it, the probability of a value is
    about its density times the width, and limits are half a width further out. The
    noise depends on the different rows only. Where all columns are dequantized, as many
    draws of it are made for a row as it was repeated, and whole weights count as
    repetitions; weights that are not all whole numbers do not.

    With ``conditional=True`` whitening is the same for all y and the mixture depends on
    it in closed form: classes have components of their own, single ones shrunk towards
    the covariance within all classes; with values a mixture of X and y together is
    conditioned on y. Networks have y as an input.

    References
    ----------
    .. [1] Chen, Rubanova, Bettencourt & Duvenaud, "Neural Ordinary Differential
       Equations", NeurIPS 2018.
    .. [2] Lipman, Chen, Ben-Hamu, Nickel & Le, "Flow Matching for Generative
       Modeling", ICLR 2023.
    .. [3] Grathwohl, Chen, Bettencourt, Sutskever & Duvenaud, "FFJORD: Free-form
       Continuous Dynamics for Scalable Reversible Generative Models", ICLR 2019.
    .. [4] Finlay, Jacobsen, Nurbekyan & Oberman, "How to train your neural ODE: the
       world of Jacobian and kinetic regularization", ICML 2020.
    .. [5] Jordan, Jin, Boza, You, Cesista, Newhouse & Bernstein, "Muon: An optimizer
       for hidden layers in neural networks", 2024.

    Examples
    --------
    >>> from sknode import CNFDensity
    >>> from sknode.datasets import make_density
    >>> X, log_density = make_density("moons", 500, random_state=0)
    >>> density = CNFDensity(random_state=0).fit(X)
    >>> bool(abs(density.score(X) - log_density.mean()) < 0.2)
    True
    >>> density.sample(3, random_state=0).shape
    (3, 2)

    Densities of classes, and what Bayes' rule makes of them:

    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> widths = dict.fromkeys(range(4), 0.1)  # of rounded values
    >>> given = CNFDensity(conditional=True, dequantize=widths, random_state=0)
    >>> given.fit(X, y).predict_proba(X[:1]).round(2)
    array([[1., 0., 0.]])
    >>> given.sample(2, random_state=0, y=1).shape
    (2, 4)
    """

    _parameter_constraints: ClassVar[dict] = {
        **SHARED_CONSTRAINTS,
        "dynamics": [StrOptions(set(DYNAMICS))],
        "vector_field": [callable, None],
        "divergence": [StrOptions({"exact", "hutchinson"})],
        "kinetic_penalty": [Interval(Real, 0, None, closed="left")],
        "jacobian_penalty": [Interval(Real, 0, None, closed="left")],
        "objective": [StrOptions({"flow_matching", "likelihood"})],
        "n_components": [
            StrOptions({"auto"}),
            Interval(Integral, 1, None, closed="left"),
        ],
        "marginals": ["boolean", StrOptions({"auto"})],
        "bounds": [None, dict, "array-like"],
        "dequantize": ["boolean", dict, "array-like"],
        "conditional": ["boolean", StrOptions({"classes", "values"})],
        "refine": ["boolean"],
    }

    def __init__(
        self,
        hidden_layer_sizes=(64, 64),
        activation="tanh",
        *,
        dynamics="mlp",
        vector_field=None,
        divergence="exact",
        objective="flow_matching",
        kinetic_penalty=0.0,
        jacobian_penalty=0.0,
        n_components="auto",
        marginals="auto",
        bounds=None,
        dequantize=False,
        conditional=False,
        refine=True,
        solver="dopri5",
        rtol=1e-7,
        atol=1e-7,
        max_steps=1000,
        step_size=0.02,
        gradient="discrete",
        optimizer="muon",
        alpha=1e-4,
        batch_size="auto",
        learning_rate_init=1e-2,
        max_iter=90,
        tol=2e-3,
        n_iter_no_change=10,
        early_stopping=True,
        validation_fraction=0.1,
        warm_start=False,
        device="cpu",
        dtype="auto",
        verbose=False,
        random_state=None,
    ):
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.dynamics = dynamics
        self.vector_field = vector_field
        self.divergence = divergence
        self.objective = objective
        self.kinetic_penalty = kinetic_penalty
        self.jacobian_penalty = jacobian_penalty
        self.n_components = n_components
        self.marginals = marginals
        self.bounds = bounds
        self.dequantize = dequantize
        self.conditional = conditional
        self.refine = refine
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

    # --- fitting ----------------------------------------------------------------------

    @_fit_context(prefer_skip_nested_validation=True)
    @all_or_nothing
    def fit(self, X, y=None, sample_weight=None):
        """Fit the flow to rows.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Training data.
        y : array-like of shape (n_samples,) or (n_samples, n_values), optional
            If ``conditional``, one column of classes, or one or several of values.
            Ignored otherwise, so that the estimator can be part of a pipeline.
        sample_weight : array-like of shape (n_samples,), optional
            Sample weights; only their ratios matter.

        Returns
        -------
        self : object
            The fitted estimator.
        """
        going_on = self._goes_on()
        X = self._validate(X, reset=not going_on)
        device = self._device()
        dtype, seed = self._dtype(X, device), self._seed()
        self._check_combinations()
        weight = _check_sample_weight(
            sample_weight, X, dtype=np.float64, ensure_non_negative=True
        )
        X, given, weight, maps = prepare_rows(
            X,
            y,
            weight,
            self._names(),
            seed,
            parameters=self.get_params(deep=False),
            maps=self._maps if going_on else None,
        )
        judged = self.early_stopping and len(X) >= LEAST_ROWS
        fraction = self.validation_fraction if judged else 0
        rows = hold_out(len(X), fraction, seed, given.strata())
        U, slope = maps.bounds.forward(X)
        if going_on:
            start = self._start
        else:
            choices = self.marginals, self.n_components, self.validation_fraction
            start = choose_start(U, given, weight, rows[0], *choices, seed)
        history = History()
        n_epochs = (1 + self.refine) * self.max_iter
        context = self._init_callback_context(max_subtasks=n_epochs)
        context.call_on_fit_task_begin(estimator=self, X=X, y=None)
        finish = residual = best = None
        if judged or not self.early_stopping:
            on_epoch = self._epoch_callback(context, X)
            mixture_alone = start
            if self._starts_small() and not going_on:
                train = np.sort(rows[0])
                start = start.simplify(
                    U[train], given.take(train), weight[train], FEW_COMPONENTS, seed
                )
            settings = start.mixture, maps.condition, device, seed, history
            trainer = self._trainer(*settings, on_epoch)
            Z, log_det = start.forward(U)
            log_det += slope
            arrays = Z, given.rows, weight, log_det
            data = [_to_tensors(device, *(x[r] for x in arrays)) for r in rows]
            before = self.module_ if going_on else None
            finish, residual = trainer.fit(data, self.refine, before)
            best = trainer.best
            if judged and start is not mixture_alone:
                held_out = rows[1]
                logs = trainer.log_density(finish, residual, data[1])
                mixture = mixture_alone.log_density(U[held_out], given.take(held_out))
                mixture += slope[held_out]
                if not is_better(logs, mixture, weight[held_out]):
                    start, finish, residual = mixture_alone, None, None
            # not of networks that are left out
            if trainer.cut_short and (finish is not None or residual is not None):
                warn_unless_converged(type(self).__name__, self.max_iter, history)
        if residual is None and finish is None and judged:
            held_out = rows[1]
            logs = start.log_density(U[held_out], given.take(held_out))
            logs += slope[held_out]
            best = float(np.average(logs, weights=weight[held_out]))
            if not going_on:  # the rows that were held out have done their work
                start = start.refit(U, given, weight, seed)
        has = residual is not None, finish is not None
        what = start.mixture, maps.condition, *has
        module = self._make_flow(*what, dtype, device, seed)
        for mine, trained in ((module.finish, finish), (module.residual, residual)):
            if trained is not None:
                mine.load_state_dict(trained.state_dict())
        self._keep(module, maps, start, history, best)
        # of sorted rows, those from first to last
        some = np.unique(np.linspace(0, len(U) - 1, JUDGED_ROWS).astype(int))
        Z, _ = start.forward(U[some])
        self._amplification = self._measure_amplification(Z, given.rows[some])
        context.call_on_fit_task_end(
            estimator=self, X=X, y=None, reconstruction_attributes={}
        )
        return self

    def _dtype(self, X, device):
        """Resolve the dtype parameter: double precision on the CPU."""
        if self.dtype == "auto" and device.type == "cpu":
            return torch.float64
        return super()._dtype(X, device)

    def _check_combinations(self):
        """Reject parameters that do not go together."""
        self._hidden_layer_sizes()
        penalized = self.kinetic_penalty or self.jacobian_penalty
        if penalized and self.objective != "likelihood":
            raise ValueError(
                "kinetic_penalty and jacobian_penalty are for flows that are simulated "
                "in training: use objective='likelihood'. Got "
                f"objective={self.objective!r}."
            )
        if self.vector_field is not None and self.conditional:
            raise ValueError(
                "vector_field must be None for a conditional density: it would have to "
                "depend on y. Use dynamics='mlp' or 'planar'."
            )

    def _starts_small(self):
        """Return whether networks are to start from few components.

        A mixture of many has ripples that a network is long in unlearning; one of few
        it turns into the data faster. That holds for units that begin where there are
        data.
        """
        built_in = self.dynamics == "mlp" and self.vector_field is None
        return self.n_components == "auto" and self.refine and built_in

    def _goes_on(self):
        """Return whether fit goes on from the last one."""
        if not (self.warm_start and hasattr(self, "module_")):
            return False
        if bool(self.conditional) != bool(self._maps.condition.dim):
            raise ValueError(
                "warm_start=True cannot go on from a fit with another value of "
                "conditional. Use a new estimator."
            )
        before = self._module_config
        changed = [
            name
            for name, value in self._network_config().items()
            if before[name] != value
        ]
        if changed:
            raise ValueError(
                "warm_start=True cannot go on from a fit with another value of "
                f"{', '.join(changed)}. Use a new estimator."
            )
        return True

    def _network_config(self):
        """Return the parameters that the networks are made by."""
        return {
            "dynamics": self.dynamics,
            "hidden_layer_sizes": self._hidden_layer_sizes(),
            "activation": self.activation,
            "vector_field": self.vector_field,
        }

    def _names(self):
        """Return the names of the columns, or their positions."""
        return getattr(self, "feature_names_in_", np.arange(self.n_features_in_))

    def _make_flow(self, mixture, condition, residual, finish, dtype, device, seed):
        """Return a flow that starts as the mixture."""
        self._module_config = {
            "dim": self.n_features_in_,
            "n_components": len(mixture.weights),
            "residual": residual,
            "finish": finish,
            "condition": condition.kind,
            "condition_dim": condition.dim,
            **self._network_config(),
        }
        module = self._new_module(self._module_config, dtype, device, seed)
        module.set_mixture(mixture)
        return module

    def _make_module(self, **config):
        return DensityFlow(**config)

    def _trainer(self, mixture, condition, device, seed, history, on_epoch=None):
        """Return what trains the networks."""

        def make(residual, finish):
            flags = residual, finish
            return self._make_flow(
                mixture, condition, *flags, torch.float32, device, seed
            )

        return FlowTrainer(
            make=make,
            recipe=partial(self._recipe, max_iter=self.max_iter, n_updates=N_UPDATES),
            settings=replace(
                self._solver_settings(torch.float32, TRAINING_TOLERANCE),
                row_wise=not condition.dim and self.divergence == "exact",
            ),
            objective=self.objective,
            hutchinson=self.divergence == "hutchinson",
            penalties=(float(self.kinetic_penalty), float(self.jacobian_penalty)),
            generator=torch.Generator().manual_seed(seed),
            history=history,
            on_epoch=on_epoch,
        )

    def _epoch_callback(self, context, X):
        """Return a function that tells scikit-learn's callbacks of an epoch."""

        def on_epoch(history):
            task = context.subcontext(task_name="epoch")
            task.call_on_fit_task_begin(estimator=self, X=X, y=None)
            return task.call_on_fit_task_end(
                estimator=self,
                X=X,
                y=None,
                metadata=history.latest(),
                reconstruction_attributes={},
            )

        return on_epoch

    def _keep(self, module, maps, start, history, best=None):
        """Set the fitted attributes."""
        self.module_, self._maps, self._start = module.eval(), maps, start
        self._amplification = {"density": 1.0, "path": 1.0}
        self.widths_ = maps.grid.width
        if maps.condition.kind == "classes":
            self.classes_ = maps.condition.classes
            self.class_prior_ = maps.condition.priors
        else:  # there may be those of an earlier fit
            vars(self).pop("classes_", None)
            vars(self).pop("class_prior_", None)
        self.n_components_ = len(start.mixture.weights)
        self.marginals_ = start.marginals is not None
        self.loss_curve_, self.nfe_curve_ = history.loss, history.nfe
        self.loss_ = history.loss[-1] if history.loss else None
        self.n_iter_ = len(history.loss) or start.mixture.n_iter
        self.validation_scores_ = history.validation or None
        self.best_validation_score_ = best
        self._n_features_out = self.n_features_in_

    @_fit_context(prefer_skip_nested_validation=True)
    @all_or_nothing
    def fit_target(self, log_density, n_features):
        """Fit the flow to an unnormalised density instead of rows.

        Minimises the divergence of Kullback and Leibler from the flow to the density
        (the "reverse" one), which needs nothing but its values: variational inference
        with a flow, as in section 4 of the paper. ``loss_curve_`` has that divergence,
        up to minus the logarithm of what the density integrates to.

        Parameters
        ----------
        log_density : callable
            Maps a torch tensor of shape (n, n_features) to the logarithm of the
            density, of shape (n,), by operations that torch can differentiate. Best if
            the mass is within a few units of the origin.
        n_features : int
            Number of features.

        Returns
        -------
        self : object
            The fitted estimator.
        """
        if not callable(log_density):
            raise TypeError(f"log_density must be callable. Got {log_density!r}.")
        whole = isinstance(n_features, Integral) and not isinstance(n_features, bool)
        if not whole or n_features < 1:
            raise ValueError(
                f"n_features must be a positive integer. Got {n_features!r}."
            )
        if self.bounds is not None or self.dequantize is not False or self.conditional:
            raise ValueError(
                "fit_target does not support bounds, dequantize or conditional: let "
                "log_density be that of unlimited, continuous variables."
            )
        device, seed = self._device(), self._seed()
        check_target_density(log_density, n_features, device)
        self.n_features_in_ = int(n_features)
        maps = Maps.none(n_features)
        if hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        dtype = self._dtype(np.empty(0), device)
        mixture = GaussianMixtureModel.standard_normal(self.n_features_in_)
        zero, one = np.zeros(n_features), np.ones(n_features)
        start = Start(None, Whitening(zero, one, np.eye(n_features)), mixture)
        history = History()
        trainer = self._trainer(mixture, maps.condition, device, seed, history)
        flow = trainer.make(True, False)
        trainer.fit_target(flow, log_density)
        module = self._make_flow(
            mixture, maps.condition, True, False, dtype, device, seed
        )
        module.residual.load_state_dict(flow.residual.state_dict())
        self._keep(module, maps, start, history)
        noise = np.random.RandomState(seed).normal(size=(JUDGED_ROWS, n_features))
        C = np.empty((JUDGED_ROWS, 0))
        Z = self._by_blocks(noise, C, partial(carry, forwards=True))
        self._amplification = self._measure_amplification(Z, C)
        return self

    # --- using the density ------------------------------------------------------------

    def score_samples(self, X, y=None):
        """Return the log-density of rows.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.
        y : array-like of shape (n_samples,) or (n_samples, n_values), optional
            If ``conditional``, what the densities are given. Ignored otherwise.

        Returns
        -------
        ndarray of shape (n_samples,)
            Logarithms of the density per unit of volume in the units of X: -inf on
            and beyond ``bounds``.
        """
        check_is_fitted(self)
        X = self._validate(X)
        return self._log_density(X, self._maps.condition.encode(y, len(X)))

    def estimate_error(self, X, y=None):
        """Estimate the numerical error of `score_samples`.

        That is the distance to the log-densities by solves that are more accurate:
        with a hundredth of ``rtol`` and ``atol``, or half of ``step_size``, in double
        precision. It says nothing about how well the model fits.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.
        y : array-like of shape (n_samples,) or (n_samples, n_values), optional
            If ``conditional``, what the densities are given. Ignored otherwise.

        Returns
        -------
        ndarray of shape (n_samples,)
            Absolute errors: zero on and beyond ``bounds``, and without networks, where
            log-densities are closed forms, that of rounding.

        Examples
        --------
        >>> from sknode import CNFDensity
        >>> from sknode.datasets import make_density
        >>> X, _ = make_density("moons", 300, random_state=0)
        >>> density = CNFDensity(tol=0.5, n_iter_no_change=1, random_state=0).fit(X)
        >>> bool(density.estimate_error(X).max() < 1e-5)
        True
        """
        check_is_fitted(self)
        X = self._validate(X)
        C = self._maps.condition.encode(y, len(X))
        error, inside = np.zeros(len(X)), self._maps.bounds.is_inside(X)
        if inside.any():
            Z, _ = self._whiten(X[inside])
            logs = self._by_blocks(Z, C[inside], log_density, "density")
            exact = self._by_blocks(Z, C[inside], log_density, "density", finer=True)
            error[inside] = np.abs(logs - exact)
        return error

    def count_evaluations(self, X, y=None):
        """Count the evaluations of the vector field that log-densities need.

        Depends on ``solver``, ``rtol`` and ``atol`` as they are now: with a looser
        tolerance a log-density costs less. Without networks it is a closed form.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.
        y : array-like of shape (n_samples,) or (n_samples, n_values), optional
            If ``conditional``, what the densities are given. Ignored otherwise.

        Returns
        -------
        ndarray of shape (n_samples,)
            Number of function evaluations (NFE) of every sample: zero on and beyond
            ``bounds``, and without networks.
        """
        check_is_fitted(self)
        X = self._validate(X)
        C = self._maps.condition.encode(y, len(X))
        count, inside = np.zeros(len(X), np.int64), self._maps.bounds.is_inside(X)
        if inside.any():
            Z, _ = self._whiten(X[inside])
            arguments = Z, C[inside], count_evaluations, "density"
            count[inside] = self._by_blocks(*arguments)
        return count

    def _log_density(self, X, C):
        """Return the log-density of checked rows, given encoded targets."""
        logs = np.full(len(X), -np.inf, dtype=X.dtype)
        inside = self._maps.bounds.is_inside(X)
        if inside.any():
            Z, log_det = self._whiten(X[inside])
            logs[inside] = log_det + self._by_blocks(
                Z, C[inside], log_density, "density"
            )
        return logs

    def _log_densities(self, X):
        """Return the log-densities (n, n_classes) of rows, given the classes."""
        X = self._validate(X)
        self._maps.bounds.check(X, self._names())
        indicators = np.eye(len(self.classes_))
        return np.stack(
            [self._log_density(X, np.tile(row, (len(X), 1))) for row in indicators],
            axis=1,
        )

    def _whiten(self, X):
        """Return whitened rows and the log-determinants of the map to them."""
        U, slope = self._maps.bounds.forward(X.astype(np.float64, copy=False))
        Z, log_det = self._start.forward(U)
        return Z, log_det + slope

    def score(self, X, y=None, sample_weight=None):
        """Return the mean log-density of rows.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.
        y : array-like of shape (n_samples,) or (n_samples, n_values), optional
            If ``conditional``, what the densities are given. Ignored otherwise.
        sample_weight : array-like of shape (n_samples,), optional
            Weights of the mean.

        Returns
        -------
        float
            Mean log-density; larger is better.
        """
        logs = self.score_samples(X, y)
        weight = None
        if sample_weight is not None:
            weight, _ = near_one(_check_sample_weight(sample_weight, logs))
        return float(np.average(logs, weights=weight))

    def sample(self, n_samples=1, random_state=None, *, y=None):
        """Draw rows from the density.

        Parameters
        ----------
        n_samples : int, default=1
            Number of rows.
        random_state : int, RandomState instance or None, default=None
            Draws them.
        y : label, value or array-like, optional
            If ``conditional``, what to draw rows for: one class, or one value or
            row of values, for all samples, or one for each of them.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            Rows in the units of X.
        """
        check_is_fitted(self)
        if not isinstance(n_samples, Integral) or n_samples < 1:
            raise ValueError(
                f"n_samples must be a positive integer. Got {n_samples!r} instead."
            )
        condition, n = self._maps.condition, int(n_samples)
        C = condition.encode(condition.repeat(y, n), n)
        rng = check_random_state(random_state)
        noise = rng.normal(size=(n, self.n_features_in_))
        # no one is to find the noise again: errors as of log-densities are small enough
        X = self._inverse(noise, C, accuracy="density")
        return self._maps.grid.round(X, self._maps.bounds.low, self._maps.bounds.high)

    def fit_transform(self, X, y=None, **fit_params):
        """Fit to rows, and carry them to the standard normal distribution.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.
        y : array-like of shape (n_samples,) or (n_samples, n_values), optional
            As in `fit`.
        **fit_params : dict
            Further arguments of `fit`.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            What `transform` returns.
        """
        if not self.conditional:
            return super().fit_transform(X, y, **fit_params)
        return self.fit(X, y, **fit_params).transform(X, y)

    def transform(self, X, y=None):
        """Carry rows to the standard normal distribution.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.
        y : array-like of shape (n_samples,) or (n_samples, n_values), optional
            If ``conditional``, what the densities are given. Ignored otherwise.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            What they are at ``t = 0``.

        Raises
        ------
        ValueError
            If values are on or beyond ``bounds``.
        """
        check_is_fitted(self)
        X = self._validate(X)
        C = self._maps.condition.encode(y, len(X))
        self._maps.bounds.check(X, self._names())
        Z, _ = self._whiten(X)
        Z = self._by_blocks(Z, C, partial(carry, forwards=False))
        return Z.astype(X.dtype, copy=False)

    def inverse_transform(self, Z, y=None):
        """Carry rows back from the standard normal distribution.

        Parameters
        ----------
        Z : array-like of shape (n_samples, n_features)
            Rows as `transform` returns them.
        y : array-like of shape (n_samples,) or (n_samples, n_values), optional
            If ``conditional``, what the densities are given. Ignored otherwise.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            Rows in the units of X.
        """
        check_is_fitted(self)
        Z = check_array(Z, dtype=[np.float64, np.float32])
        if Z.shape[1] != self.n_features_in_:
            raise ValueError(
                f"Z has {Z.shape[1]} features, but {type(self).__name__} was fitted "
                f"with {self.n_features_in_}."
            )
        return self._inverse(Z, self._maps.condition.encode(y, len(Z)))

    def _inverse(self, Z, C, accuracy="path"):
        carried = self._by_blocks(Z, C, partial(carry, forwards=True), accuracy)
        rows = self._start.inverse(carried.astype(np.float64, copy=False))
        rows = self._maps.bounds.inverse(rows).astype(Z.dtype, copy=False)
        return self._maps.bounds.keep_inside(rows)

    def trajectory(self, X, n_times=50, *, y=None):
        """Follow rows from the normal distribution to the data.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.
        n_times : int, default=50
            Number of times along the flow, equally spaced, both ends included.
        y : array-like of shape (n_samples,) or (n_samples, n_values), optional
            If ``conditional``, what the densities are given. Ignored otherwise.

        Returns
        -------
        ndarray of shape (n_samples, n_times, n_features)
            Where the rows were, in the units of X: from ``transform(X)``, scaled and
            moved as the data are (and with ``marginals_`` mapped like their columns),
            to X.
        """
        if not isinstance(n_times, Integral) or n_times < 2:
            raise ValueError(f"n_times must be an integer >= 2. Got {n_times!r}.")
        check_is_fitted(self)
        X = self._validate(X)
        C = self._maps.condition.encode(y, len(X))
        self._maps.bounds.check(X, self._names())
        Z, _ = self._whiten(X)
        paths = self._by_blocks(Z, C, partial(follow, n_times=int(n_times)))
        rows = self._start.inverse(paths.reshape(-1, Z.shape[1]).astype(np.float64))
        rows = self._maps.bounds.inverse(rows)
        return rows.reshape(paths.shape).astype(X.dtype, copy=False)

    def _velocity(self, t, X, C):
        """Return how fast rows move (n, n_features) at a time of `trajectory`.

        They are in the units of X, given encoded targets; NaN on and beyond ``bounds``.
        """
        velocity, inside = np.full(X.shape, np.nan), self._maps.bounds.is_inside(X)
        if not inside.any():
            return velocity
        Z, _ = self._whiten(X[inside])
        slope = self._by_blocks(Z, C[inside], partial(slopes, share=t))
        # a derivative of the maps to the units of X, in the direction of the slope
        width = DIFFERENCE / np.maximum(np.abs(slope).max(1, keepdims=True), DIFFERENCE)
        ahead, behind = (
            self._maps.bounds.inverse(self._start.inverse(Z + sign * width * slope))
            for sign in (1, -1)
        )
        velocity[inside] = (ahead - behind) / (2 * width)
        return velocity

    def _measure_amplification(self, Z, C):
        """Return how much larger errors are than the tolerance: those of log-densities,
        and those of rows that go back and forth.

        Errors of single steps add up, and what a flow pulls apart it pulls apart with
        its errors.
        """
        if not get_method(self.solver).adaptive:
            return self._amplification
        rough = copy.copy(self)  # parameters are not to be touched
        rough.set_params(rtol=JUDGED_TOLERANCE, atol=JUDGED_TOLERANCE)
        logs, exact = (
            rough._by_blocks(Z, C, log_density, "density", finer=finer)
            for finer in (False, True)
        )
        rows = [Z]
        for forwards in (False, True, False):
            carried = partial(carry, forwards=forwards)
            rows.append(rough._by_blocks(rows[-1], C, carried))
        # the inverse has to hold for all rows, also for those between clusters
        there_and_back = [
            np.abs(after - row).max(1) / (1 + np.abs(row).max(1))
            for row, after in zip(rows, rows[2:], strict=False)
        ]
        errors = {
            "density": np.sqrt(np.mean((logs - exact) ** 2)),
            "path": np.max(there_and_back),
        }
        factors = {
            kind: np.nan_to_num(error / JUDGED_TOLERANCE, nan=1.0)
            for kind, error in errors.items()
        }
        return {
            kind: float(np.clip(factor, 1.0, LARGEST_AMPLIFICATION))
            for kind, factor in factors.items()
        }

    def _by_blocks(self, Z, C, compute, accuracy="path", finer=False):
        """Return results for whitened rows, given encoded targets.

        They are computed in blocks of a size that bounds the memory, as accurately as
        log-densities or paths need; on request by solves that are more accurate than
        the parameters ask for.
        """
        module = self._module_for_prediction()
        single = module.mixture.axes.dtype == torch.float32
        dtype = torch.float32 if single else torch.float64
        settings = self._solver_settings(dtype, SINGLE_TOLERANCE if single else 0)
        settings = replace(
            settings.tighten(self._amplification[accuracy], dtype),
            row_wise=not module.condition_dim,
        )
        if finer:
            module, settings = copy.deepcopy(module).double(), settings.refine()
        like = module.mixture.axes
        rows_each = min(CHUNK_ROWS, CHUNK_VALUES // module.mixture.variances.numel())
        results, outcomes = [], []
        with torch.no_grad():
            for n, rows in padded_blocks(np.hstack([Z, C]), rows_each):
                block = torch.from_numpy(rows).to(like.device, like.dtype)
                z, condition = block.split([module.dim, module.condition_dim], 1)
                flow = module.given(condition)
                result, solutions = compute(flow, z.contiguous(), settings)
                outcomes.append([outcome(s, n) for s in solutions])
                results.append(result[:n].cpu().numpy())
        warn_of_failures(outcomes)
        return np.concatenate(results)

    def _module_for_prediction(self):
        """Return the module on the device that the parameter names now."""
        device = self._device()
        if self.module_.mixture.axes.device != device:
            return copy.deepcopy(self.module_).to(device)
        return self.module_

    def __sklearn_is_fitted__(self):
        return hasattr(self, "module_")

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.target_tags.required = bool(self.conditional)
        return tags


def _to_tensors(device, Z, C, weight, log_det):
    """Return rows, conditions and weights in single precision, and log_det."""
    single = (torch.from_numpy(x).to(device, torch.float32) for x in (Z, C, weight))
    return (*single, torch.from_numpy(log_det))
