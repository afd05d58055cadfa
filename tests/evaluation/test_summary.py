"""What a choice among responses costs, in nats and in tokens, by hand; and what a page says where there is nothing to say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from equipoise.decoding.resampling import best_of_n_kl
from equipoise.evaluation.methods import resampled
from equipoise.evaluation.summary import Summary
from equipoise.evaluation.sweep import Scored
from equipoise.objectives import Normaliser
from equipoise.types import UserError
from evaluation.small_comparison import OBJECTIVES, scored, summary_of

NAN = float("nan")
REWARDS = [(1, 0, 0), (3, 0, 0), (2, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0), (4, 0, 0), (5, 0, 0)]  # four of each prompt


def steered(method: str = "steered", kl: float = 1.0) -> Scored:
    """Log-ratios 0.5, 2.0, 1.5, 0.4 of the first prompt's responses and 0 of the second's; `kl` of each."""
    found = scored(method, (1, 0, 0), REWARDS, kl=kl)
    ratios = [0.5, 2.0, 1.5, 0.4, 0.0, 0.0, 0.0, 0.0]
    rollouts = [replace(r, logprobs=(-1.0 + x, -0.9), kl_floor=0.1) for r, x in zip(found.rollouts, ratios, strict=True)]
    return replace(found, rollouts=rollouts)


def test_best_of_n_of_what_is_steered_has_gone_further_than_its_samples() -> None:
    summary = summary_of(scored("reference", None, REWARDS))
    point = summary.best_of(steered(), (1, 0, 0), 2, "steered, best-of-2")
    # chosen: 2.0 and 1.5 of the first prompt, whose four responses have 1.1 on average
    assert point.kl_P == pytest.approx([1.0 + (2.0 + 1.5) / 2 - 1.1 + best_of_n_kl(2), 1.0 + best_of_n_kl(2)])
    assert summary.best_of(steered(), (1, 0, 0), 1, "the same").kl_P == pytest.approx([1.0, 1.0])  # no choice, no drift
    assert summary.best_of(scored("reference", None, REWARDS), (1, 0, 0), 4, "best-of-n").kl_P == pytest.approx([best_of_n_kl(4)] * 2)


def test_a_draw_costs_no_more_nats_than_the_best() -> None:
    summary = summary_of(scored("reference", None, REWARDS))
    greedy = summary.resampled(scored("reference", None, [(float(i), 0, 0) for i in range(8)]), (1, 0, 0), beta=1e-3)
    assert greedy.kl_P == pytest.approx([best_of_n_kl(4)] * 2)  # log 4, what the choice among the four says, is more
    assert summary.resampled(scored("reference", None, REWARDS), (1, 0, 0), beta=1e3).kl_P == pytest.approx([0, 0], abs=1e-4)


def test_candidates_read_their_prompt_once() -> None:
    plain = scored("reference", None, REWARDS)  # 10 tokens each, 6 of them the prompt
    reference = replace(plain, rollouts=[replace(r, prompt_tokens=6) for r in plain.rollouts])
    summary = summary_of(reference)
    point = summary.best_of(reference, (1, 0, 0), 4, "best-of-n")
    assert (point.base_forwards, point.cost, point.seconds) == (6 + 4 * 4, pytest.approx(2.2), None)
    assert point.reward_calls == 12
    guided = replace(reference, rollouts=[replace(r, guide_forwards=10) for r in reference.rollouts])
    point = summary.best_of(guided, (1, 0, 0), 4, "best-of-n")
    assert (point.base_forwards, point.guide_forwards, point.cost) == (22, 40, pytest.approx(6.2))


def test_groups_are_as_many_as_are_asked_for() -> None:
    summary = summary_of(scored("reference", None, REWARDS))
    found = summary.best_of(scored("reference", None, REWARDS), (1, 0, 0), 2, "best-of-n", groups=1)
    assert found.z_PSK[..., 0].tolist() == [[3.0], [0.0]]
    assert summary.best_of(scored("reference", None, REWARDS), (1, 0, 0), 2, "best-of-n").z_PSK[..., 0].tolist() == [[3, 2], [0, 5]]


def test_a_judge_that_cannot_tell_responses_apart_is_left_out(capsys) -> None:
    plain = scored("reference", None, REWARDS)
    judged = replace(plain, reward_NK=np.hstack([plain.reward_NK, np.ones((8, 1))]), names=(*OBJECTIVES, "dull"))
    summary = Summary(judged, Normaliser(objectives=OBJECTIVES, mean_K=(0.0,) * 3, sd_K=(1.0,) * 3), n_boot=20, seed=0)
    assert "the judge dull is left out" in capsys.readouterr().err
    row = summary.row(summary.reference)
    assert np.isnan(row["judge"][0]["mean"])
    assert row["reward"][0]["mean"] == pytest.approx(15 / 8)


def test_a_point_that_nothing_scored_has_no_numbers_and_its_method_is_named() -> None:
    summary = summary_of(scored("reference", None, REWARDS))
    silent = summary.point(scored("silent", (1, 0, 0), [(NAN, 1, 1)] * 8))
    assert np.isnan([summary.gain(silent, 0)["mean"], summary.row(silent)["reward"][0]["lo"]]).all()
    assert np.isnan(summary.compare(silent.z_PK[:, 0], summary.reference.z_PK[:, 0], 0)["p"])
    with pytest.raises(UserError, match=r"^silent: helpful scored its responses to fewer than two prompts"):
        resampled(summary, [silent])
