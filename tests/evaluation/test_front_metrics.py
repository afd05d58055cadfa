"""Metrics of fronts: hand-worked numbers, published fronts, loops over the definitions, properties and limiting cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import spearmanr

from equipoise.evaluation.front import hypervolume, hypervolumes, non_dominated
from equipoise.evaluation.front_metrics import (
    additive_epsilon,
    follows,
    mean_inner_product,
    mean_regret,
    regrets,
    spacing,
    sparsity,
    spread,
    violations,
)
from equipoise.types import UserError

NAN = float("nan")
WEIGHTS = np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
STAIRS = np.array([[1.0, 3.0], [2.0, 2.0], [4.0, 1.0]])

# Helpfulness and minus harm of two methods at weights 0, .1, .. 1 on helpfulness, 300 prompts each: the measurements that the
# replication toz015/common-agency published (phase2_w2s/pareto_n300.csv).
GRID = np.array([[i / 10, 1 - i / 10] for i in range(11)])
PARM = np.array(
    [
        [-0.2358154296875, 12.751770833333333], [0.3630196126302083, 11.260384114583333], [-0.022574462890625, 9.150169270833333],
        [0.213031005859375, 6.831416015625], [1.3516739908854167, 2.462431640625], [2.298807373046875, -2.0566536458333333],
        [3.357882080078125, -5.3373828125], [3.7852571614583335, -8.263824869791666], [4.150963541666667, -10.17324951171875],
        [4.487561848958333, -11.485498046875], [4.946800944010417, -11.970436197916667],
    ]
)  # fmt: skip
GENARM = np.array(
    [
        [-2.5693766276041665, 13.512565104166667], [-0.2821175130208333, 12.799947916666667], [1.105225830078125, 10.089761962890625],
        [2.0713938649495445, 6.1812141927083335], [3.3861763509114584, -0.16500244140625], [4.469345703125, -4.822376302083334],
        [5.5058805338541665, -8.585052083333334], [6.025150553385417, -10.647415364583333], [6.0440911865234375, -11.214397786458333],
        [5.791125081380208, -12.395221354166667], [5.4644641621907555, -13.057032877604167],
    ]
)  # fmt: skip


def fronts(most: int = 7) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    """(points, weights) of few distinct values, so that ties and equal points happen, on 2 to 4 objectives."""
    grid = st.integers(-8, 8).map(lambda i: i / 4)
    shapes = st.tuples(st.integers(1, most), st.integers(2, 4))
    return shapes.flatmap(lambda shape: st.tuples(hnp.arrays(np.float64, shape, elements=grid), simplex(*shape)))


def simplex(points: int, objectives: int) -> st.SearchStrategy[np.ndarray]:
    counts = hnp.arrays(np.int64, (points, objectives), elements=st.integers(0, 4))
    some = counts.map(lambda c: c + (c.sum(axis=1, keepdims=True) == 0))
    return some.map(lambda c: c / c.sum(axis=1, keepdims=True))


def inclusion_exclusion(points: np.ndarray, ref: np.ndarray) -> float:
    """Volume of a union of boxes from the volumes of all their intersections: exact, and shares nothing with a sweep."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in itertools.combinations(points, size):
            total -= (-1) ** size * float(np.prod(np.maximum(np.min(chosen, axis=0) - ref, 0)))
    return total


# --- hypervolume against others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objectives", [2, 3, 4, 5])
def test_hypervolume_equals_inclusion_and_exclusion(objectives: int) -> None:
    rng = np.random.default_rng(objectives)
    for count in (1, 2, 5, 8):
        points = rng.normal(size=(count, objectives))
        ref = np.full(objectives, -0.5)
        assert hypervolume(points, ref) == pytest.approx(inclusion_exclusion(points, ref), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("objectives", [2, 3, 4, 5])
def test_hypervolume_equals_monte_carlo_on_random_fronts(objectives: int) -> None:
    rng = np.random.default_rng(10 + objectives)
    sphere = np.abs(rng.normal(size=(12, objectives)))
    points = sphere / np.linalg.norm(sphere, axis=1, keepdims=True)
    draws = rng.random((100_000, objectives))
    inside = np.zeros(len(draws), dtype=bool)
    for point in points:
        inside |= (draws <= point).all(axis=1)
    error = 4 * np.sqrt(inside.mean() * (1 - inside.mean()) / len(draws))
    assert hypervolume(points, np.zeros(objectives)) == pytest.approx(inside.mean(), abs=error)


def test_many_hypervolumes_are_those_of_each() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(3, 2, 5, 3))
    points[0, 1, 2] = NAN
    found = hypervolumes(points, [-0.5, 0, 0.1])
    assert found.shape == (3, 2)
    for at in np.ndindex(3, 2):
        keep = points[at][~np.isnan(points[at]).any(axis=1)]
        assert found[at] == pytest.approx(inclusion_exclusion(keep, np.array([-0.5, 0, 0.1])))


# --- published fronts -----------------------------------------------------------------------------------------------------------


def test_a_published_pair_of_fronts() -> None:
    every = np.vstack([PARM, GENARM])
    nadir, ideal = every.min(axis=0), every.max(axis=0)
    unit = [(f - nadir) / (ideal - nadir) for f in (PARM, GENARM)]
    assert [hypervolume(f, nadir) for f in (PARM, GENARM)] == pytest.approx([112.9, 141.6], abs=0.05)
    assert [hypervolume(f, [0, 0]) for f in unit] == pytest.approx([0.493, 0.619], abs=5e-4)
    assert [float(mean_inner_product(f, GRID)) for f in (PARM, GENARM)] == pytest.approx([4.22, 4.75], abs=5e-3)
    assert [float(mean_inner_product(f, GRID)) for f in unit] == pytest.approx([0.687, 0.769], abs=5e-4)
    # which reference point is chosen moves the ratio of the two
    ratio = [hypervolume(PARM, ref) / hypervolume(GENARM, ref) for ref in ([0, -13], [-5, -15])]
    assert ratio == pytest.approx([0.62, 0.86], abs=5e-3)
    # from a weight of 0.2 on, each of PARM's points is dominated by one of GenARM's
    union = np.vstack([PARM, GENARM])
    assert not non_dominated(union)[2:11].any()


def test_the_ends_of_a_published_soup() -> None:
    # rewarded soups of news summaries: two end points alone, and with the midpoint and a point of the soup between them
    ends, ref = np.array([[0.984, -0.788], [1.781, -1.526]]), [0.98, -1.787]
    assert hypervolume(ends, ref) == pytest.approx(0.212, abs=5e-4)
    midpoint, soup, multi_objective = [1.459, -1.080], [1.314, -0.945], [1.312, -1.005]
    assert non_dominated(np.array([soup, multi_objective])).tolist() == [True, False]
    # four of the 21 points that together have 0.6018
    assert 0.212 < hypervolume(np.vstack([ends, midpoint, soup]), ref) < 0.6018
    assert hypervolume(np.vstack([ends, midpoint, soup, multi_objective]), ref) == hypervolume(np.vstack([ends, midpoint, soup]), ref)


# --- by hand --------------------------------------------------------------------------------------------------------------------


def test_inner_product_and_regret_by_hand() -> None:
    # w.f at each weight's own point: 3, 2, 4. The third point has 2.5 for the second weight, half a unit more.
    assert float(mean_inner_product(STAIRS, WEIGHTS)) == pytest.approx(3)
    assert regrets(STAIRS, WEIGHTS) == pytest.approx([0, 0.5, 0])
    assert float(mean_regret(STAIRS, WEIGHTS)) == pytest.approx(0.5 / 3)
    # the weights turned round: 1, 2, 1 where 3, 2.5, 4 could be had
    assert regrets(STAIRS, WEIGHTS[::-1]) == pytest.approx([3, 0.5, 2])


def test_sparsity_spacing_and_spread_by_hand() -> None:
    # gaps 1 and 2 on the first objective, 1 and 1 on the second: (1 + 4 + 1 + 1) / 2
    assert float(sparsity(STAIRS)) == pytest.approx(3.5)
    assert float(sparsity(STAIRS[[2, 0, 1]])) == pytest.approx(3.5)
    # nearest neighbours at L1 distances 2, 2 and 3: mean 7/3, squares 1/9, 1/9, 4/9 over 2
    assert float(spacing(STAIRS)) == pytest.approx(np.sqrt(1 / 3))
    assert spread(STAIRS) == pytest.approx([3, 2])


def test_epsilon_by_hand() -> None:
    # the corner (2, 2) lacks 2 of (4, 1)'s first objective, more than the 1 it lacks of (1, 3)'s second
    assert float(additive_epsilon(STAIRS[1:2], STAIRS)) == pytest.approx(2)
    assert float(additive_epsilon(STAIRS, STAIRS[1:2])) == 0
    assert float(additive_epsilon(STAIRS + 0.25, STAIRS)) == pytest.approx(-0.25)


def test_following_and_violations_by_hand() -> None:
    points = np.array([[0.0, 5.0], [3.0, 5.0], [2.0, 9.0]])
    # first: ranks 1, 3, 2 beside 1, 2, 3 are 1 - 6 (0 + 1 + 1) / (3 * 8). Second: 1.5, 1.5, 3 beside 3, 2, 1 is -sqrt(3)/2.
    assert follows(points, WEIGHTS) == pytest.approx([0.5, -np.sqrt(3) / 2])
    # first: one of three pairs falls. Second: weights fall along the rows, and two of three rewards rise; a tie is no violation.
    assert violations(points, WEIGHTS) == pytest.approx([1 / 3, 2 / 3])


# --- limiting cases -------------------------------------------------------------------------------------------------------------


def test_one_point() -> None:
    one, weight = np.array([[2.0, 1.0]]), np.array([[0.25, 0.75]])
    assert float(mean_inner_product(one, weight)) == pytest.approx(1.25)
    assert regrets(one, weight) == pytest.approx([0])
    assert spread(one) == pytest.approx([0, 0])
    assert float(additive_epsilon(one, one)) == 0
    assert np.isnan([float(sparsity(one)), float(spacing(one)), *follows(one, weight), *violations(one, weight)]).all()


def test_all_points_equal() -> None:
    same = np.full((3, 2), 0.7)
    assert float(sparsity(same)) == float(spacing(same)) == float(mean_regret(same, WEIGHTS)) == 0
    assert spread(same) == pytest.approx([0, 0])
    assert np.isnan(follows(same, WEIGHTS)).all()  # nothing follows anything
    assert violations(same, WEIGHTS) == pytest.approx([0, 0])


def test_unscored_points_are_left_out() -> None:
    lost = np.vstack([STAIRS, [NAN, 9.0]])
    weights = np.vstack([WEIGHTS, [0.0, 1.0]])
    assert float(sparsity(lost)) == pytest.approx(3.5)
    assert float(spacing(lost)) == pytest.approx(np.sqrt(1 / 3))
    assert float(additive_epsilon(lost, STAIRS)) == 0
    # what the fourth weight asks for was scored, so that it counts there: (3 + 2 + 4 + 9) / 4, and it is best for the first too
    assert float(mean_inner_product(lost, weights)) == pytest.approx(4.5)
    assert regrets(lost, weights) == pytest.approx([6, 0.5, 0, 0])
    assert spread(lost) == pytest.approx([3, 8])
    nothing = np.full((3, 2), NAN)
    assert np.isnan([float(f(nothing)) for f in (sparsity, spacing)]).all()
    assert np.isnan([float(f(nothing, WEIGHTS)) for f in (mean_inner_product, mean_regret)]).all()
    assert np.isnan([*spread(nothing), *follows(nothing, WEIGHTS), *violations(nothing, WEIGHTS)]).all()
    assert np.isnan([float(additive_epsilon(nothing, STAIRS)), float(additive_epsilon(STAIRS, nothing))]).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("metric", [mean_inner_product, regrets, follows, violations])
def test_points_and_weights_that_do_not_match_are_refused(metric) -> None:
    with pytest.raises(UserError, match="a point per weight vector"):
        metric(STAIRS, WEIGHTS[:2])


# --- properties, and loops over the definitions ---------------------------------------------------------------------------------


@given(fronts())
@settings(max_examples=80, deadline=None)
def test_metrics_are_what_a_loop_over_the_definition_finds(front: tuple[np.ndarray, np.ndarray]) -> None:
    points, weights = front
    utility = [[sum(w * f for w, f in zip(weight, point, strict=True)) for point in points] for weight in weights]
    own = [utility[i][i] for i in range(len(points))]
    assert float(mean_inner_product(points, weights)) == pytest.approx(sum(own) / len(own))
    assert regrets(points, weights) == pytest.approx([max(row) - mine for row, mine in zip(utility, own, strict=True)])
    shift = max(min(max(r[k] - p[k] for k in range(len(p))) for p in points) for r in points[::2] + 1)
    assert float(additive_epsilon(points, points[::2] + 1)) == pytest.approx(shift)
    for k, (share, rho) in enumerate(zip(violations(points, weights), follows(points, weights), strict=True)):
        pairs = [(i, j) for i in range(len(points)) for j in range(len(points)) if weights[i, k] < weights[j, k]]
        expected = np.mean([points[i, k] > points[j, k] for i, j in pairs]) if pairs else NAN
        assert share == pytest.approx(expected, nan_ok=True)
        flat = len(points) < 3 or np.ptp(weights[:, k]) == 0 or np.ptp(points[:, k]) == 0
        assert rho == pytest.approx(NAN if flat else spearmanr(weights[:, k], points[:, k]).statistic, nan_ok=True)
    if len(points) > 1:
        near = [min(float(np.abs(p - q).sum()) for j, q in enumerate(points) if j != i) for i, p in enumerate(points)]
        assert float(spacing(points)) == pytest.approx(np.std(near, ddof=1))
        columns = [sorted(column) for column in points.T]
        gaps = sum((b - a) ** 2 for column in columns for a, b in itertools.pairwise(column))
        assert float(sparsity(points)) == pytest.approx(gaps / (len(points) - 1))


@given(fronts(), st.randoms(use_true_random=False), st.floats(0.25, 4), st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_order_scale_and_place(front: tuple[np.ndarray, np.ndarray], random, scale: float, shift: float) -> None:
    points, weights = front
    order = list(range(len(points)))
    random.shuffle(order)
    moved, turned = scale * points[order] + shift, weights[order]

    def same(found: np.ndarray, expected: np.ndarray) -> None:
        np.testing.assert_allclose(found, expected, atol=1e-9)

    same(mean_inner_product(moved, turned), scale * mean_inner_product(points, weights) + shift)
    same(mean_regret(moved, turned), scale * mean_regret(points, weights))
    same(sparsity(moved), scale**2 * sparsity(points))
    same(spacing(moved), scale * spacing(points))
    same(spread(moved), scale * spread(points))
    same(follows(moved, turned), follows(points, weights))
    same(violations(moved, turned), violations(points, weights))
    same(additive_epsilon(moved, scale * points + shift), 0.0)


@given(fronts(), st.data())
@settings(max_examples=60, deadline=None)
def test_another_point_only_helps(front: tuple[np.ndarray, np.ndarray], data: st.DataObject) -> None:
    points, _ = front
    other = data.draw(hnp.arrays(np.float64, points.shape, elements=st.integers(-8, 8).map(lambda i: i / 4)))
    new = data.draw(hnp.arrays(np.float64, (1, points.shape[1]), elements=st.integers(-12, 12).map(lambda i: i / 4)))
    more, ref = np.vstack([points, new]), np.full(points.shape[1], -2.5)
    assert hypervolume(more, ref) >= hypervolume(points, ref) - 1e-12
    if non_dominated(more)[-1] and (new > ref).all() and not (points == new).all(axis=1).any():
        assert hypervolume(more, ref) > hypervolume(points, ref)
    assert float(additive_epsilon(more, other)) <= float(additive_epsilon(points, other)) + 1e-12
    assert (spread(more) >= spread(points)).all()


def test_many_fronts_at_once_are_each_of_them() -> None:
    rng = np.random.default_rng(1)
    points = rng.normal(size=(2, 3, 5, 3)).round(1)
    points[1, 2, 0, 1] = NAN
    weights = rng.dirichlet(np.ones(3), size=5)
    for metric in (sparsity, spacing, spread, lambda f: additive_epsilon(f, f[..., ::2, :])):
        whole = metric(points)
        for at in np.ndindex(2, 3):
            np.testing.assert_array_equal(whole[at], metric(points[at]))
    for metric in (mean_inner_product, regrets, mean_regret, follows, violations):
        whole = metric(points, weights)
        for at in np.ndindex(2, 3):
            np.testing.assert_allclose(whole[at], metric(points[at], weights), atol=1e-12)
