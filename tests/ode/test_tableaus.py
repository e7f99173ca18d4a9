"""The coefficients of the methods satisfy the identities that define them."""

from fractions import Fraction
from itertools import combinations_with_replacement
from math import prod

import numpy as np
import pytest
import scipy.integrate
import torch

from sknode.ode import METHODS
from sknode.ode.tableaus import get_tableau

ADAPTIVE = [m for m in METHODS if get_tableau(m).adaptive]
# order of the embedded solutions, one for every error estimate
EMBEDDED = {"heun": [1], "bosh3": [2], "dopri5": [4], "tsit5": [4], "dopri8": [5, 3]}
ORDERS = {
    **{"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4},
    **{"bosh3": 3, "dopri5": 5, "tsit5": 5, "dopri8": 8},
}
THETAS = np.array([0.1, 0.25, 0.5, 0.77, 0.9, 1.0])


def rooted_trees(order):
    """Return all rooted trees with so many nodes, a tree being the tuple of its
    branches."""
    return _forests(order - 1)


def _forests(n_nodes):
    """Return all multisets of trees with so many nodes together."""
    if n_nodes == 0:
        return [()]
    found = set()
    for partition in _partitions(n_nodes, n_nodes):
        choices = [()]
        for size in sorted(set(partition)):
            count = partition.count(size)
            groups = combinations_with_replacement(rooted_trees(size), count)
            choices = [c + g for g in groups for c in choices]
        found.update(choices)
    return sorted(found)


def _partitions(n, largest):
    if n == 0:
        yield []
    for first in range(min(n, largest), 0, -1):
        for rest in _partitions(n - first, first):
            yield [first, *rest]


def size(tree):
    return 1 + sum(size(branch) for branch in tree)


def density(tree):
    return size(tree) * prod(density(branch) for branch in tree)


def stage_weights(tree, a):
    """Return what each stage contributes to the tree's elementary weight."""
    weights = np.ones(len(a))
    for branch in tree:
        weights = weights * (a @ stage_weights(branch, a))
    return weights


def trees_up_to(order):
    return [tree for n in range(1, order + 1) for tree in rooted_trees(n)]


def fractions(values):
    """Return floats as the rational numbers that they are."""
    return [Fraction(x) for x in values.tolist()]


def dense_weights(tableau, theta):
    """Return the weights of all stages at each theta, one row for each."""
    degrees = np.arange(1, tableau.dense.shape[1] + 1)
    return theta[:, None] ** degrees @ tableau.dense.T


def test_rooted_trees_are_counted_as_in_the_literature():
    # Hairer, Norsett & Wanner I, table II.2.2
    assert [len(rooted_trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


def test_every_method_is_tested():
    assert set(METHODS) == set(ORDERS)
    assert set(ADAPTIVE) == set(EMBEDDED)


@pytest.mark.parametrize("method", METHODS)
class TestStep:
    def test_order_is_the_one_of_the_literature(self, method):
        assert get_tableau(method).order == ORDERS[method]

    def test_stage_coefficients_add_up_to_the_nodes(self, method):
        tableau = get_tableau(method)
        np.testing.assert_allclose(tableau.a.sum(1), tableau.c, rtol=0, atol=2e-14)

    def test_stages_only_use_earlier_ones(self, method):
        assert not np.triu(get_tableau(method).a).any()

    def test_nodes_lie_inside_the_step(self, method):
        c = get_tableau(method).c
        assert c[0] == 0 and c.min() >= 0 and c.max() <= 1

    def test_last_node_is_the_end_of_the_step_exactly(self, method):
        # the solver takes a node of one, and no other, for the end to the bit
        tableau = get_tableau(method)
        assert tableau.c[tableau.n_stages - 1] == 1.0

    def test_weights_add_up_to_one(self, method):
        assert get_tableau(method).b.sum() == pytest.approx(1, abs=1e-15)

    def test_last_stage_is_the_slope_at_the_end(self, method):
        tableau = get_tableau(method)
        s = tableau.n_stages
        np.testing.assert_array_equal(tableau.a[s - 1, :s], tableau.b)
        assert tableau.b[-1] == 0

    def test_order_conditions_hold_for_all_rooted_trees(self, method):
        tableau = get_tableau(method)
        a = tableau.a[: tableau.n_stages, : tableau.n_stages]
        for tree in trees_up_to(tableau.order):
            weight = tableau.b @ stage_weights(tree, a)
            assert weight == pytest.approx(1 / density(tree), abs=1e-13), tree

    def test_order_is_not_higher_than_stated(self, method):
        tableau = get_tableau(method)
        a = tableau.a[: tableau.n_stages, : tableau.n_stages]
        gaps = [
            abs(tableau.b @ stage_weights(tree, a) - 1 / density(tree))
            for tree in rooted_trees(tableau.order + 1)
        ]
        assert max(gaps) > 1e-7

    def test_quadrature_conditions_hold(self, method):
        # In exact arithmetic, because sums in floats depend on their order. What is
        # left is what 16 published digits leave: every coefficient may be off by a unit
        # in the last place of its float, every node, the sum of its row, by the units
        # of its row, and each moves the sum by its own factor in it.
        tableau, s = get_tableau(method), get_tableau(method).n_stages
        b, c = fractions(tableau.b), fractions(tableau.c[:s])
        off_b = fractions(np.spacing(np.abs(tableau.b)))
        off_c = fractions(np.spacing(np.abs(tableau.a[:s, :s])).sum(1))
        for k in range(1, tableau.order + 1):
            total = sum(x * y ** (k - 1) for x, y in zip(b, c, strict=True))
            by_b = sum(x * y ** (k - 1) for x, y in zip(off_b, c, strict=True))
            by_c = sum(
                (k - 1) * abs(x) * y ** max(k - 2, 0) * z
                for x, y, z in zip(b, c, off_c, strict=True)
            )
            assert abs(total - Fraction(1, k)) <= by_b + by_c, k


@pytest.mark.parametrize("method", ADAPTIVE)
class TestErrorEstimate:
    def test_weights_add_up_to_zero(self, method):
        # otherwise u' = 1 has an error estimate that never vanishes
        for weights in get_tableau(method).error:
            assert weights.sum() == pytest.approx(0, abs=1e-15)

    def test_vanishes_up_to_the_order_of_the_embedded_method(self, method):
        tableau = get_tableau(method)
        a = tableau.a[: tableau.n_stages, : tableau.n_stages]
        for weights, order in zip(tableau.error, EMBEDDED[method], strict=True):
            for tree in trees_up_to(order):
                value = weights @ stage_weights(tree, a)
                assert value == pytest.approx(0, abs=1e-13), tree

    def test_sees_the_next_order(self, method):
        tableau = get_tableau(method)
        a = tableau.a[: tableau.n_stages, : tableau.n_stages]
        for weights, order in zip(tableau.error, EMBEDDED[method], strict=True):
            values = [
                abs(weights @ stage_weights(tree, a))
                for tree in rooted_trees(order + 1)
            ]
            assert max(values) > 1e-6

    def test_order_for_the_controller_follows_from_the_embedded_method(self, method):
        expected = {"dopri8": 8}.get(method, EMBEDDED[method][0] + 1)
        assert get_tableau(method).error_order == expected


@pytest.mark.parametrize("method", METHODS)
class TestDenseOutput:
    def test_starts_at_the_state_and_ends_at_the_step(self, method):
        tableau = get_tableau(method)
        ends = dense_weights(tableau, np.array([0.0, 1.0]))
        b = np.zeros(tableau.n_stages_extended)
        b[: tableau.n_stages] = tableau.b
        # there is no constant term, so theta = 0 gives the state itself
        np.testing.assert_array_equal(ends[0], np.zeros_like(b))
        np.testing.assert_allclose(ends[1], b, rtol=0, atol=1e-13)

    def test_has_the_slopes_of_both_ends(self, method):
        tableau = get_tableau(method)
        degrees = np.arange(1, tableau.dense.shape[1] + 1)
        first, last = np.eye(tableau.n_stages_extended)[[0, tableau.n_stages - 1]]
        np.testing.assert_allclose(tableau.dense[:, 0], first, rtol=0, atol=1e-13)
        at_end = tableau.dense @ degrees
        np.testing.assert_allclose(at_end, last, rtol=0, atol=1e-12)

    def test_order_conditions_hold_inside_the_step(self, method):
        # one order less than the global error: local errors do not add up here
        tableau = get_tableau(method)
        weights = dense_weights(tableau, THETAS)
        for tree in trees_up_to(max(tableau.dense_order - 1, 1)):
            got = weights @ stage_weights(tree, tableau.a)
            expected = THETAS ** size(tree) / density(tree)
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)

    def test_order_is_that_of_the_step(self, method):
        tableau = get_tableau(method)
        assert tableau.dense_order == tableau.order


@pytest.mark.parametrize(
    ("method", "reference"),
    [("dopri5", scipy.integrate.RK45), ("bosh3", scipy.integrate.RK23)],
)
def test_coefficients_equal_those_of_scipy(method, reference):
    tableau, s = get_tableau(method), reference.n_stages
    np.testing.assert_allclose(
        tableau.a[:s, : s - 1], reference.A[:, : s - 1], atol=1e-15
    )
    np.testing.assert_allclose(tableau.b[:s], reference.B, atol=1e-15)
    np.testing.assert_allclose(tableau.c[:s], reference.C, atol=1e-15)
    # scipy has the opposite sign
    np.testing.assert_allclose(tableau.error[0], -reference.E, atol=1e-15)
    np.testing.assert_allclose(tableau.dense, reference.P, atol=1e-14)


def test_coefficients_of_dopri8_equal_those_of_scipy():
    tableau, reference = get_tableau("dopri8"), scipy.integrate.DOP853
    s = reference.n_stages
    np.testing.assert_array_equal(tableau.a[:s, :s], reference.A)
    np.testing.assert_array_equal(tableau.a[s + 1 :], reference.A_EXTRA)
    np.testing.assert_array_equal(tableau.b[:s], reference.B)
    np.testing.assert_array_equal(tableau.c[:s], reference.C)
    np.testing.assert_array_equal(tableau.c[s + 1 :], reference.C_EXTRA)
    np.testing.assert_allclose(
        np.abs(tableau.error), np.abs([reference.E5, reference.E3]), atol=1e-15
    )


def test_dense_output_of_dopri8_equals_that_of_scipy():
    def f(t, y):
        return np.array([y[1] * np.cos(t), -y[0] * y[1] + t])

    solver = scipy.integrate.DOP853(f, 0.3, [1.0, 0.5], 2.0, first_step=0.4)
    solver.step()
    h, y = solver.t - solver.t_old, solver.y_old
    reference = solver.dense_output()
    weights = dense_weights(get_tableau("dopri8"), THETAS)
    got = y + h * weights @ solver.K_extended
    expected = reference(solver.t_old + THETAS * h).T
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14)


def test_tensors_have_the_dtype_asked_for_and_are_made_once():
    tableau, cpu = get_tableau("dopri5"), torch.device("cpu")
    for dtype in (torch.float32, torch.float64):
        tensors = tableau.tensors(dtype, cpu)
        assert tensors.dense.dtype == tensors.error.dtype == dtype
        assert {a.dtype for a in tensors.a} == {dtype}
        assert tableau.tensors(dtype, cpu) is tensors


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"dopri5.*Got 'rk45' instead"):
        get_tableau("rk45")
