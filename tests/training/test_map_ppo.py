"""MAP's outer loop: a correction by hand, its limits against another solver, when it ends; and a policy that is trained to its targets."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from equipoise.models.lora import Lora
from equipoise.objectives import Normaliser
from equipoise.training import on_policy, ppo
from equipoise.training.map_ppo import MAP, Config, corrected, gaps
from equipoise.types import UserError
from training.on_policy_runs import FIT, SAMPLING, SMALL, Failing, Table, law, make_rounds, prompts_of

INF = math.inf
LOOP = on_policy.Config(
    beta=1.0,
    reads="nothing",
    rounds=24,
    prompts=20,
    samples=20,
    steps=4,
    sampling=SAMPLING,
    lora=Lora(rank=0),
    fit=replace(FIT, batch_size=20),
)


def made(loop: on_policy.Config = LOOP, floor=(0.4, -INF), ceiling=(INF, INF), start=(0.0, 0.0), advantage="rloo", **how) -> MAP:
    return MAP(Config(**how), ppo.PPO(ppo.Config(advantage=advantage), loop), ("x", "y"), tuple(floor), tuple(ceiling), tuple(start))


# --- a correction


def test_the_gap_is_to_the_bound_that_a_multiplier_stands_for():
    """Level 1 of each. A floor of 3 and multipliers 0.5 and 0; a floor of 0 that is passed, paid for and not; a ceiling of 0.2, and one
    of 2 that is paid for; both bounds around the level and below it; none."""
    multiplier_K = np.array([0.5, 0.0, 0.5, 0.0, 0.0, -0.5, 0.0, 0.0, 0.0])
    floor_K = np.array([3.0, 3.0, 0.0, 0.0, -INF, -INF, 0.5, 0.1, -INF])
    ceiling_K = np.array([INF, INF, INF, INF, 0.2, 2.0, 1.5, 0.3, INF])
    np.testing.assert_allclose(gaps(np.ones(9), multiplier_K, floor_K, ceiling_K), [2, 2, -1, 0, -0.8, 1, 0, -0.7, 0])


def test_a_correction_by_hand():
    """H^-1 (1, 1) = (0, 1) of H = ((2, 1), (1, 1)), half of it; alone 1/2 and 1; no further than 0.2; to 0 and not through it."""
    covariance_KK = np.array([[2.0, 1.0], [1.0, 1.0]])

    def moved(multipliers, gap, longest=9.0):
        return corrected(np.array(multipliers), np.array(gap), covariance_KK, 0.5, longest)

    np.testing.assert_allclose(moved([0.3, 0.1], [1.0, 1.0]), [0.3, 0.6], atol=1e-5)
    np.testing.assert_allclose(moved([0.0, 0.1], [0.0, 1.0]), [0.0, 0.6], atol=1e-5)
    np.testing.assert_allclose(moved([-0.3, 0.0], [-1.0, 0.0]), [-0.55, 0.0], atol=1e-5)
    np.testing.assert_allclose(moved([0.3, 0.1], [1.0, 1.0], longest=0.2), [0.3, 0.3], atol=1e-5)
    np.testing.assert_array_equal(moved([0.2, 0.0], [-1.0, 0.0]), [0.0, 0.0])
    np.testing.assert_array_equal(moved([-0.2, 0.0], [1.0, 0.0]), [0.0, 0.0])
    assert moved([1.0, 0.0], [0.5, 0.0], longest=0.1)[0] == pytest.approx(1.1)
    assert corrected(np.array([0.4]), np.array([0.1]), np.zeros((1, 1)), 0.5, 1.0)[0] == pytest.approx(1.4), (
        "a constant reward: the longest"
    )


# --- where it ends, with policies that are known exactly: 3 prompts, 7 responses, 2 objectives

RNG = np.random.default_rng(3)
REFERENCE_PS = RNG.dirichlet(np.ones(7), size=3)
REWARD_PSK = RNG.normal(size=(3, 7, 2))


def tilted(multiplier_K) -> np.ndarray:
    law_PS = REFERENCE_PS * np.exp(REWARD_PSK @ np.asarray(multiplier_K))
    return law_PS / law_PS.sum(axis=1, keepdims=True)


def levels(multiplier_K) -> np.ndarray:
    return (tilted(multiplier_K)[..., None] * REWARD_PSK).sum(axis=1).mean(axis=0)


def solved(floor_K, ceiling_K) -> np.ndarray:
    """The dual's optimum by another solver: L-BFGS-B in the multipliers of floors and of ceilings."""
    asked = [(1.0, k, c) for k, c in enumerate(floor_K) if c > -INF] + [(-1.0, k, c) for k, c in enumerate(ceiling_K) if c < INF]

    def net(mu_C):
        return sum(mu * sign * np.eye(2)[k] for mu, (sign, k, _) in zip(mu_C, asked, strict=True))

    def dual(mu_C):
        log_partition = np.log((REFERENCE_PS * np.exp(REWARD_PSK @ net(mu_C))).sum(axis=1)).mean()
        return log_partition - sum(mu * sign * c for mu, (sign, _, c) in zip(mu_C, asked, strict=True))

    return net(minimize(dual, np.zeros(len(asked)), bounds=[(0, None)] * len(asked), options={"ftol": 1e-15, "gtol": 1e-9}).x)


def record(multiplier_K, weights_K, stderr=0.01) -> dict:
    """What an endless round says of the policy of some multipliers, while others are its weights."""
    law_PS = tilted(multiplier_K)
    covariance = np.mean([np.cov(r_SK.T, aweights=p_S, ddof=0) for r_SK, p_S in zip(REWARD_PSK, law_PS, strict=True)], axis=0)
    by_name = [dict(zip(("x", "y"), map(float, value), strict=True)) for value in (levels(multiplier_K), (stderr, stderr), weights_K)]
    return {"round": 0, "reward": by_name[0], "stderr": by_name[1], "covariance": covariance.tolist(), "weights": by_name[2]}


def followed(method: MAP, steps: int, share: float | None = None) -> np.ndarray:
    """The multipliers at so many rounds, by a policy that is theirs, or that goes a share of its way to them after it was measured."""
    records: list[dict] = []
    at_K, found = np.array(method.start_K), []
    for _ in range(steps):
        found.append([method.settings(records)["weights"][name] for name in ("x", "y")])
        records.append(record(found[-1] if share is None else at_K, found[-1]))
        at_K = at_K + (share or 1.0) * (np.array(found[-1]) - at_K)
    return np.array(found)


BASE_K = levels((0, 0))


@settings(max_examples=25, deadline=None)
@given(
    gain=st.tuples(st.floats(-0.4, 0.4), st.floats(-0.4, 0.4)),
    ceilings=st.tuples(st.booleans(), st.booleans()),
    start=st.tuples(st.floats(0, 2), st.floats(0, 2)),
)
def test_it_ends_at_the_duals_optimum_wherever_it_starts(gain, ceilings, start):
    """Floors and ceilings around the reference's levels, binding or slack: the multipliers of slack ones are exactly 0."""
    bounds = [(-INF, base + g) if below else (base + g, INF) for base, g, below in zip(BASE_K, gain, ceilings, strict=True)]
    floor_K, ceiling_K = zip(*bounds, strict=True)
    exact_K = solved(floor_K, ceiling_K)
    start_K = [-s if below else s for s, below in zip(start, ceilings, strict=True)]
    found_K = followed(made(floor=floor_K, ceiling=ceiling_K, start=start_K, every=1, patience=0), 50)[-1]
    np.testing.assert_allclose(found_K, exact_K, atol=2e-3)
    reached_K = levels(found_K)
    assert (reached_K >= np.array(floor_K) - 1e-3).all()
    assert (reached_K <= np.array(ceiling_K) + 1e-3).all()


def test_a_policy_that_lags_needs_less_than_a_whole_step():
    """At a fifth of the way each time errors shrink by sqrt(1 - 0.2 (1 - step)): half a step swings to 0.9^20 = 0.12 of them in 40, a
    whole one (nearly) goes on swinging, and a fourth of the share, 0.05, gets there from one side, by 0.9^40 (1 + 40/9) = 0.08."""
    floor_K = (BASE_K[0] + 0.3, BASE_K[1] + 0.2)
    exact_K = solved(floor_K, (INF, INF))
    swing = {}
    for step in (0.05, 0.5, 0.999):
        method = made(floor=floor_K, start=exact_K - 0.1, every=1, patience=0, step=step)
        off_K = followed(method, 60, share=0.2)[40:] - exact_K
        swing[step] = np.abs(off_K).max() / 0.1
        assert (off_K.max() > 0.003) == (step > 0.05), "past the optimum"
    assert swing[0.05] < 0.12
    assert swing[0.5] < 0.25
    assert swing[0.999] > 0.6


def test_it_ends_early_once_every_target_was_met_often_enough_in_a_row():
    """Three rounds of the second half of six: with 0.01 for each standard error, 1.96 * 0.01 / sqrt 3 is how far a level may lie off."""
    floor_K = (BASE_K[0] + 0.3, -INF)
    exact_K = solved(floor_K, (INF, INF))
    method = made(floor=floor_K, every=6, patience=2)
    near = [replace_level(record(exact_K, exact_K), floor_K[0] + off) for off in (0.011, 0.012, -0.011)]
    way = [record((0, 0), exact_K)] * 3
    met, missed, short = ([*way, *([each] * 3)] for each in near)
    assert method.settings(met) is not None
    assert method.settings([*met, *short]) is None
    assert method.settings([*met, *missed]) is not None
    assert method.settings([*missed, *met]) is not None
    assert method.settings([*met, *short[:5]]) is not None, "not at a correction"
    assert made(floor=floor_K, every=6, patience=0).settings([*met, *short]) is not None
    scale = Normaliser(objectives=("x", "y"), mean_K=(10.0, 0.0), sd_K=(2.0, 5.0))
    told = method.outcome([*met, *missed], scale)
    assert set(told) == {"x"}
    assert told["x"] == {
        "floor": pytest.approx(10 + 2 * floor_K[0]),
        "ceiling": INF,
        "level": pytest.approx(10 + 2 * (floor_K[0] + 0.012)),
        "stderr": pytest.approx(2 * 0.01 / math.sqrt(3)),
        "multiplier": pytest.approx(exact_K[0] / 2),
        "met": False,
    }


def replace_level(found: dict, level: float) -> dict:
    return {**found, "reward": {**found["reward"], "x": level}}


def test_multipliers_change_only_after_so_many_rounds():
    method = made(floor=(BASE_K[0] + 0.3, BASE_K[1] + 0.1), start=(0.5, 0.2), every=2, patience=0, step=0.25)
    first = method.settings([])
    assert first == {"beta": 1.0, "weights": {"x": 0.5, "y": 0.2}}
    one = [record((0.5, 0.2), (0.5, 0.2))]
    assert method.settings(one) == first
    two = method.settings(one * 2)
    gap_K = np.array([BASE_K[0] + 0.3, BASE_K[1] + 0.1]) - levels((0.5, 0.2))
    assert list(two["gap"].values()) == pytest.approx(gap_K.tolist())
    expected_K = np.array([0.5, 0.2]) + 0.25 * np.linalg.solve(np.array(one[0]["covariance"]), gap_K)
    assert list(two["weights"].values()) == pytest.approx(expected_K.tolist(), rel=1e-4)


def test_responses_that_tell_no_covariance_are_an_error():
    lacking = {**record((0, 0), (0, 0)), "covariance": [[None, None], [None, None]]}
    with pytest.raises(UserError, match="round 1 or one before it has no prompt with two responses that are scored on all of x, y"):
        made(every=1).settings([lacking])


# --- a policy that is trained


class Exact:
    """The world of the tests in numbers: the reference's law, and the dual's optimum."""

    def __init__(self) -> None:
        asked = prompts_of()
        self.reference_PS = np.stack([law(SMALL, SMALL.lm.model, a) for a in asked])
        self.reward_PSK = np.array([[SMALL.reward[text, a.text] for text in SMALL.texts] for a in asked])

    def tilted(self, multiplier_K) -> np.ndarray:
        law_PS = self.reference_PS * np.exp(self.reward_PSK @ multiplier_K)
        return law_PS / law_PS.sum(axis=1, keepdims=True)

    def levels(self, law_PS) -> np.ndarray:
        return (law_PS[..., None] * self.reward_PSK).sum(axis=1).mean(axis=0)

    def solved(self, floor_K) -> np.ndarray:
        def dual(v_K):
            return np.log((self.reference_PS * np.exp(self.reward_PSK @ v_K)).sum(axis=1)).mean() - v_K @ np.array(floor_K)

        return minimize(dual, np.zeros(2), bounds=[(0, None)] * 2, options={"ftol": 1e-15, "gtol": 1e-9}).x


def test_a_policy_is_trained_to_its_targets_from_multipliers_that_were_wrong(tmp_path):
    """24 rounds of 4 steps from v = (0.4, 2.4), of a bank too small: the dual's is (1.19, 1.51)."""
    exact = Exact()
    floor_K = exact.levels(exact.reference_PS) + 0.3
    aim_K, start_K = exact.solved(floor_K), np.array([0.4, 2.4])
    aim_PS = exact.tilted(aim_K)
    assert np.abs(exact.tilted(start_K) - aim_PS).sum(axis=1).max() / 2 > 0.1, "PPO at the bank's multipliers would end here"
    run = make_rounds(lambda loop: made(loop, floor_K, start=start_K, every=4, patience=0), LOOP, tmp_path, copies=10)
    records = run.run()
    run.learner.trained.eval()
    has_PS = np.stack([law(SMALL, run.learner.policy.model, asked) for asked in prompts_of()])
    found_K = np.array(list(records[-1]["weights"].values()))
    np.testing.assert_allclose(exact.levels(has_PS), floor_K, atol=0.05)
    np.testing.assert_allclose(found_K, aim_K, atol=0.25)
    assert np.abs(has_PS - aim_PS).sum(axis=1).max() / 2 < 0.05
    assert {n for n, r in enumerate(records) if "gap" in r} == {4, 8, 12, 16, 20}


def test_a_run_that_stopped_goes_on_with_the_same_multipliers_and_one_that_is_at_its_targets_ends(tmp_path):
    loop = replace(LOOP, rounds=3, prompts=2, samples=3, steps=1)

    def run(out, floor, rewards=None):
        return make_rounds(lambda loop: made(loop, floor, start=(0.3, 0.0), every=1, patience=1), loop, tmp_path / out, rewards)

    asked = (2.0, 3.0)
    rewards = [Table("x"), Failing("y")]
    with pytest.raises(UserError, match="paused in round 3 of 3"):
        run("stopped", asked, rewards).run()
    rewards[1].calls = 100
    found = run("stopped", asked, rewards).run()
    assert found == run("whole", asked).run()
    assert len({record["weights"]["x"] for record in found}) == 3
    easy = (-9.0, -INF)
    ended = run("easy", easy).run()
    assert [record["weights"] for record in ended] == [{"x": 0.3, "y": 0.0}, {"x": 0.0, "y": 0.0}]
    assert run("easy", easy).run() == ended


# --- bad input


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"every": 0}, "every must be at least 1"),
        ({"step": 1.0}, "step between 0 and 1 and longest positive, got 4, 2, 1.0 and 1.0"),
        ({"patience": -1}, "patience not negative"),
        ({"longest": 0.0}, "longest positive"),
    ],
)
def test_settings_are_checked(unchecked, bad, says):
    with pytest.raises(UserError, match=says):
        Config(**bad)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"loop": replace(LOOP, beta=0.5)}, "MAP needs loop.beta 1.*got 0.5, linear and 0"),
        ({"loop": replace(LOOP, scalarisation="chebyshev", ideal=(1.0, 1.0))}, "got 1, chebyshev and 0"),
        ({"loop": replace(LOOP, rounds=3)}, "3 rounds end before the multipliers are corrected once, after map.every 4"),
        ({"advantage": "grpo"}, "an advantage in nats, rloo or gae: grpo divides it by its spread"),
        ({"advantage": "gdpo"}, "gdpo divides it"),
    ],
)
def test_what_multipliers_in_nats_exclude(bad, says):
    with pytest.raises(UserError, match=says):
        made(**bad)
