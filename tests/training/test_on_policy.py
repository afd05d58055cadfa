"""Rounds: what they draw and log, where they lead, and what becomes of a run that is killed, fails or diverges."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import prompt
from equipoise.runs import read_json
from equipoise.training import on_policy, online_dpo, ppo
from equipoise.training.on_policy import drawn_prompts, requests_of, scalarised
from equipoise.training.scored_round import Round, covariance_within, standard_error, statistics, summary
from equipoise.types import Rollout, UserError
from training.children import child_runner
from training.on_policy_runs import FIT, HALF, NUMBERS, PLAIN, WEIGHTS, Table, far, make_rounds

NAN = math.nan
FEW = replace(HALF, rounds=3, samples=4, steps=2)


@pytest.fixture(scope="module", autouse=True)
def _quicker_rounds():
    """Every round's fit collects garbage, and what the tests have imported is much to look through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def by_ppo(**settings):
    return lambda config: ppo.PPO(ppo.Config(**settings), config)


def by_dpo(**settings):
    return lambda config: online_dpo.OnlineDPO(online_dpo.Config(**settings), config)


# --- what a round is made of


def test_no_prompt_comes_again_before_all_have_come():
    prompts = [prompt(str(i), f"ask {i}") for i in range(11)]
    rounds = [[p.id for p in drawn_prompts(prompts, 3, number, seed=5)] for number in range(6)]
    for cycle in (rounds[:3], rounds[3:]):
        assert len({id for ids in cycle for id in ids}) == 9
    assert rounds[:3] != rounds[3:]
    assert rounds[4] == [p.id for p in drawn_prompts(prompts, 3, 4, seed=5)]
    assert rounds != [[p.id for p in drawn_prompts(prompts, 3, number, seed=6)] for number in range(6)]
    with pytest.raises(UserError, match="a round takes 12 prompts, and there are 11"):
        drawn_prompts(prompts, 12, 0, seed=5)


def test_weights_are_those_of_a_prompt_and_fresh_in_every_round():
    prompts = [prompt(str(i), f"ask {i}") for i in range(8)]
    config = replace(FEW, weights="", reads="prompt", prompts=4)
    first, second = (requests_of(prompts, PLAIN.objectives, config, number) for number in (0, 1))
    drawn = [group[0].weights for group in (*first, *second)]
    assert len(set(drawn)) == 8
    assert all(len({r.weights for r in group}) == 1 and len({r.seed for r in group}) == 4 for group in (*first, *second))
    assert requests_of(prompts, PLAIN.objectives, config, 1) == second
    grid = {g[0].weights for n in range(9) for g in requests_of(prompts, PLAIN.objectives, replace(config, grid=2), n)}
    assert grid == {(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)}
    assert {g[0].weights for g in requests_of(prompts, PLAIN.objectives, replace(FEW, prompts=4), 1)} == {WEIGHTS}
    again = requests_of(prompts, PLAIN.objectives, replace(FEW, prompts=8, samples=2), 1)
    other = requests_of(prompts, PLAIN.objectives, replace(FEW, prompts=8, samples=2), 2)
    assert not {r.seed for group in again for r in group} & {r.seed for group in other for r in group}


def test_scalarisation_by_hand():
    """w = (1/4, 3/4), z = (2, -1): -1/4; with the ideal (2, 1) the shortfalls 0 and 3/2. Weight 0 needs no score."""
    z_PGK, weights_PK = np.array([[[2.0, -1.0]], [[NAN, 4.0]]]), np.array([[0.25, 0.75], [0.0, 1.0]])
    np.testing.assert_allclose(scalarised(z_PGK, weights_PK, HALF), [[-0.25], [4.0]])
    worst = replace(HALF, scalarisation="chebyshev", ideal=(2.0, 1.0))
    np.testing.assert_allclose(scalarised(z_PGK, weights_PK, worst), [[-1.5], [3.0]])
    assert np.isnan(scalarised(z_PGK[1:], weights_PK[:1], HALF)).all()


def rollout(kl: float, logprobs: tuple[float, ...], ended: bool) -> Rollout:
    same = {"prompt_id": "p", "tokens": (3,) * len(logprobs), "text": "", "text_tokens": 0, "ref_logprobs": logprobs, "kl_floor": 0.0}
    rest = {"finish_reason": "stop" if ended else "length", "weights": None, "seed": 0, "base_forwards": 0}
    return Rollout(id="", kl=kl, logprobs=logprobs, **same, **rest)


def test_statistics_by_hand():
    """Two responses, of one token at -1 and of three at -2 each: entropy 7/4 a token, two tokens a response, half of them cut."""
    said = [[rollout(0.2, (-1.0,), True), rollout(0.6, (-2.0, -2.0, -2.0), False)]]
    z_PGK = np.array([[[1.0, NAN], [3.0, 5.0]]])
    scored = Round(
        number=4, requests=[], rollouts=said, weights_PK=np.ones((1, 2)), reward_PGK=10 * z_PGK, z_PGK=z_PGK, scalar_PG=np.array([[NAN, 4]])
    )
    found = statistics(scored, ("x", "y"))
    assert np.isnan(list(found.pop("stderr").values())).all(), "of one prompt"
    assert np.isnan(found.pop("covariance")).all(), "of one response that is scored on both"
    assert found == {
        **{"round": 4, "reward": {"x": 2.0, "y": 5.0}, "raw": {"x": 20.0, "y": 50.0}, "unscored": {"x": 0, "y": 1}, "scalar": 4.0},
        **{"kl_exact": pytest.approx(0.4), "kl_exact_p95": pytest.approx(0.58), "entropy_per_token": 1.75, "length": 2.0, "truncated": 0.5},
    }
    steps = [{"step": n, "loss": float(n), "grad_norm": g, "learning_rate": 1 / n} for n, g in ((1, 3.0), (2, 1.0))]
    assert summary(steps) == {"loss": 1.5, "grad_norm": 3.0, "learning_rate": 0.5}


def test_covariances_and_standard_errors_by_hand():
    """Prompts of (0, 0), (2, 4) and of (1, 5), (3, 5), (5, 2): covariances ((2, 4), (4, 8)) and ((4, -3), (-3, 3)); one response that
    lacks y is left out of these, not of x's means 1, 3 and 7, whose sd is sqrt(28/3)."""
    z_PGK = np.array([[[0.0, 0], [2, 4], [NAN, NAN]], [[1, 5], [3, 5], [5, 2]], [[7, NAN], [7, 1], [7, NAN]]])
    np.testing.assert_allclose(covariance_within(z_PGK), [[3, 0.5], [0.5, 5.5]])
    np.testing.assert_allclose(standard_error(z_PGK), [math.sqrt(28 / 9), np.std([2, 4, 1], ddof=1) / math.sqrt(3)])


# --- where it leads


STEPS = replace(HALF, beta=1.0, rounds=10, steps=10, samples=100)


@pytest.mark.parametrize(
    ("method", "config", "bound"),
    [
        (by_ppo(), STEPS, 0.04),
        (by_ppo(), replace(STEPS, rounds=7, scalarisation="chebyshev", ideal=(2.0, 2.0)), 0.05),
        # an advantage stays through a round's steps, where the KL in the loss follows the policy: 60 steps, with more left to go
        (by_ppo(advantage="gae"), replace(STEPS, rounds=20, steps=3), 0.09),
    ],
    ids=["MORLHF", "MORLHF by the worst shortfall", "MORLHF with values"],
)
def test_ppo_reaches_the_closed_form(method, config, bound, tmp_path):
    run = make_rounds(method, config, tmp_path)
    assert far(run.learner, WEIGHTS, config) > 0.15
    run.run()
    assert far(run.learner, WEIGHTS, config) < bound


UNSEEN = ((0.95, 0.05), (0.6, 0.4), (0.35, 0.65), (0.1, 0.9))


def test_online_dpo_reaches_it_at_weights_it_never_saw(tmp_path):
    """Trained on the five points of a grid for 168 steps."""
    config = replace(STEPS, weights="", reads="parameters", grid=4, prompts=20, samples=8, rounds=14, steps=12)
    run = make_rounds(by_dpo(), replace(config, fit=replace(FIT, batch_size=10)), tmp_path, copies=10)
    assert min(far(run.learner, weights, config) for weights in UNSEEN) > 0.15
    run.run()
    assert max(far(run.learner, weights, config) for weights in UNSEEN) < 0.05


def test_a_policy_that_is_told_its_weights_follows_them(tmp_path):
    """After 120 steps it has some way to go, but told the right weights it is much nearer to their optimum than told the others."""
    config = replace(STEPS, weights="", reads="prompt", prompts=32, samples=6, rounds=10, steps=12)
    run = make_rounds(by_dpo(), replace(config, fit=replace(FIT, batch_size=32)), tmp_path, copies=16, world=NUMBERS)
    run.run()
    ends = (UNSEEN[0], UNSEEN[-1])
    right = [far(run.learner, weights, config, NUMBERS) for weights in ends]
    wrong = [far(run.learner, weights, config, NUMBERS, told=other) for weights, other in zip(ends, ends[::-1], strict=True)]
    assert max(right) < 0.18
    assert min(w - r for r, w in zip(right, wrong, strict=True)) > 0.03


# --- the loop


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> tuple[Path, on_policy.Rounds, list]:
    out = tmp_path_factory.mktemp("short")
    run = make_rounds(by_ppo(advantage="gae"), FEW, out)
    return out, run, run.run()


def test_a_round_is_logged_and_the_schedule_is_over_all_of_them(short):
    out, _, records = short
    assert [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] == records
    assert [read_json(out / "rounds" / f"{n:04d}" / "round.json") for n in range(3)] == records
    assert [r["step"] for r in records] == [2, 4, 6]
    # warm-up: round(0.1 * 6) = 1 step; then a line down to 0 after step 6, so 1/5 and 3/5 of the way at steps 4 and 2 from the end
    assert [r["learning_rate"] for r in records] == pytest.approx([0.01, 0.006, 0.002])
    assert records[0]["kl_exact"] < 1e-6 < records[1]["kl_exact"]
    for key in ("loss", "grad_norm", "clip_fraction", "value_loss", "entropy_per_token", "length", "truncated", "beta"):
        assert all(math.isfinite(record[key]) for record in records)


def test_a_finished_run_takes_no_step_and_has_the_same_policy(short):
    out, run, records = short

    def never(requests):
        raise AssertionError("there is nothing left to sample")

    again = make_rounds(by_ppo(advantage="gae"), FEW, out)
    assert replace(again, sampler=never).run() == records
    for (name, trained), (_, restored) in zip(
        run.learner.trained.named_parameters(), again.learner.trained.named_parameters(), strict=True
    ):
        assert torch.equal(trained, restored), name
    (out / "rounds" / "0002" / "round.json").unlink()
    assert replace(make_rounds(by_ppo(advantage="gae"), FEW, out), sampler=never).run() == records, "as if killed before it wrote this"
    with pytest.raises(UserError, match="was made with other settings"):
        make_rounds(by_ppo(advantage="gae"), replace(FEW, beta=0.6), out).run()


class Failing(Table):
    """A reward that fails on its third call."""

    def __init__(self) -> None:
        super().__init__("y")
        self.calls = 0

    def __call__(self, prompts, responses):
        self.calls += 1
        if 3 <= self.calls < 100:
            raise RuntimeError("out of memory")
        return super().__call__(prompts, responses)


def test_a_reward_that_fails_pauses_the_run_and_it_goes_on_with_the_same_losses(short, tmp_path):
    _, _, records = short
    failing = Failing()
    with pytest.raises(UserError, match=r"paused in round 3 of 3, all before it is kept: reward 'y' failed on rollout .*out of memory"):
        make_rounds(by_ppo(advantage="gae"), FEW, tmp_path, [Table("x"), failing]).run()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    failing.calls = 100
    assert make_rounds(by_ppo(advantage="gae"), FEW, tmp_path, [Table("x"), failing]).run() == records


def test_a_kl_over_its_bound_stops_the_run_and_leaves_the_last_good_policy(tmp_path):
    """With a bound between the KL of the third and the fourth round, what is left is the policy that the third one sampled."""
    steady = replace(FEW, samples=40, rounds=4, fit=replace(FIT, learning_rate=0.0003, warmup=0.0, schedule="constant"))
    kl = [record["kl_exact"] for record in make_rounds(by_ppo(), steady, tmp_path / "free").run()]
    assert kl == sorted(kl)
    bounded = make_rounds(by_ppo(), replace(steady, max_kl=(kl[2] + kl[3]) / 2), tmp_path / "bounded")
    says = r"stopped in round 4 of 4: KL is \S+ nats per response, over max_kl \S+: lower fit.learning_rate.*; the last good policy"
    with pytest.raises(UserError, match=says):
        bounded.run()
    assert len((tmp_path / "bounded" / "log.jsonl").read_text().splitlines()) == 3
    assert read_json(tmp_path / "bounded" / "last_good" / "card.json")["weights"] == [0.3, 0.7]
    short = make_rounds(by_ppo(), replace(steady, rounds=2), tmp_path / "short")
    short.run()
    good = load_file(tmp_path / "bounded" / "last_good" / "model" / "model.safetensors")
    for name, parameter in short.learner.model.state_dict().items():
        assert torch.equal(good[name], parameter), name


def test_a_loss_that_is_no_number_stops_it_too(tmp_path):
    calls = 0

    def broken(config):
        method = ppo.PPO(ppo.Config(), config)
        plain = method.loss

        def loss(settings):
            own = plain(settings)

            def each(model, batch):
                nonlocal calls
                calls += 1
                found = own(model, batch)
                return replace(found, loss=found.loss * (NAN if calls == 4 else 1))

            return each

        object.__setattr__(method, "loss", loss)
        return method

    run = make_rounds(broken, FEW, tmp_path)
    with pytest.raises(UserError, match=r"stopped in round 2 of 3: the loss is nan at step 4: lower learning_rate.*last good policy is in"):
        run.run()
    kept = {name: p.clone() for name, p in run.learner.trained.named_parameters()}
    assert all(torch.isfinite(p).all() for p in kept.values()), "as it was before the round"


def reading_run(out: Path, rewards=None) -> Path:
    """A short run of a policy whose parameters read the weights; returns its adapter."""
    run = make_rounds(by_dpo(), replace(FEW, weights="", reads="parameters"), out, rewards)
    run.run()
    return run.learner.save(out)[0]


def _child(out: str, model: str, dies_at: int) -> None:
    """Die in the `dies_at`-th look at a reward, or with minus that in a loss."""
    torch.set_num_threads(1)
    seen = {"rewards": 0, "losses": 0}

    def count(what: str, at: int) -> None:
        seen[what] += 1
        if seen[what] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    class Deadly(Table):
        def __call__(self, prompts, responses):
            count("rewards", dies_at)
            return super().__call__(prompts, responses)

    losses = online_dpo.pair_losses
    online_dpo.pair_losses = lambda *given: (count("losses", -dies_at), losses(*given))[1]
    reading_run(Path(out), [Table("x"), Deadly("y")])


def test_a_run_killed_anywhere_ends_with_the_same_bytes(tmp_path):
    """In the second round's scores, and, going on from there, in the third round's second step."""
    run = child_runner(_child, tmp_path)
    for at, rounds in ((2, 1), (-4, 2)):
        assert run(tmp_path / "killed", at) == -signal.SIGKILL
        assert len((tmp_path / "killed" / "log.jsonl").read_text().splitlines()) == rounds
    whole, killed = reading_run(tmp_path / "whole"), reading_run(tmp_path / "killed")
    for name in ("../log.jsonl", "adapter_model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


# --- bad input


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"reads": "tea leaves"}, "reads weights in its prompt or its parameters, or nothing, not in 'tea leaves'"),
        ({"scalarisation": "chebyshev"}, "scalarise by linear, or by chebyshev and an ideal"),
        ({"beta": 0.0}, "beta, max_kl and concentration must be positive"),
        ({"samples": 1}, "samples at least 2"),
        ({"fit": replace(FIT, max_steps=9)}, "leave fit.max_steps 9 away"),
        ({"sampling": replace(HALF.sampling, top_k=40)}, "sampling needs temperature 1, top_k 0, .* got 1, 40, false and true"),
        ({"sampling": replace(HALF.sampling, temperature=0.7)}, "got 0.7, 0, false and true"),
    ],
)
def test_settings_are_checked(unchecked, bad, says):
    with pytest.raises(UserError, match=says):
        replace(HALF, **bad)
