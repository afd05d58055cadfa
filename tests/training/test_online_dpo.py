"""Labels and losses of online DPO's pairs by hand, and against plain DPO; where a policy that reads weights converges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.models.completions import Completions
from equipoise.training import dpo
from equipoise.training.completion_rows import Row, collator
from equipoise.training.online_dpo import Config, OnlineDPO, pair_labels, pair_losses, pairs_of
from equipoise.types import UserError
from training.every_sequence import PROMPTS, RESPONSES, build
from training.on_policy_runs import HALF

NAN = math.nan


def test_labels_by_hand():
    """Three responses at 0, log 3 and unscored: one pair of three can be used, and counts three times; 3 to 1 is 3/4."""
    scalar_G = np.array([0.0, math.log(3), NAN])
    np.testing.assert_allclose(pair_labels(scalar_G, "soft", "all"), [[0.75, 2.25], [0, 0], [0, 0]])
    np.testing.assert_allclose(pair_labels(scalar_G, "hard", "all"), [[0, 3], [0, 0], [0, 0]])
    tied_G = np.array([1.0, 1.0])
    np.testing.assert_allclose(pair_labels(tied_G, "soft", "all"), [[0.5, 0.5]])
    assert not pair_labels(tied_G, "hard", "all").any()
    assert not pair_labels(np.array([NAN, NAN, 2.0]), "soft", "all").any()


def test_the_best_against_the_worst():
    found = pair_labels(np.array([2.0, 5.0, 1.0, NAN]), "hard", "extremes")
    assert pairs_of(4)[3] == (1, 2)
    np.testing.assert_allclose(found, [[0, 0]] * 3 + [[6, 0]] + [[0, 0]] * 2)


@settings(max_examples=50, deadline=None)
@given(scalars=st.lists(st.floats(-5, 5) | st.just(NAN), min_size=2, max_size=5), labels=st.sampled_from(["soft", "hard"]))
def test_labels_sum_to_the_pairs_and_turn_with_the_rewards(scalars, labels):
    scalar_G = np.array(scalars)
    for pairs in ("all", "extremes"):
        label_Q2 = pair_labels(scalar_G, labels, pairs)
        assert label_Q2.sum() == pytest.approx(len(label_Q2)) or not label_Q2.any()
        np.testing.assert_allclose(pair_labels(-scalar_G, labels, pairs), label_Q2[:, ::-1], atol=1e-9)


def test_two_responses_are_plain_dpo():
    """The loss of the rows that `training/dpo.py` makes of the same two responses, and its gradient."""
    reference, scalars = [[-2.0, -3.5], [-1.0, -4.0]], [[0.4, -0.3], [1.0, 2.5]]
    said = [(RESPONSES[1], RESPONSES[5]), (RESPONSES[0], RESPONSES[7])]
    plain, ours = [], []
    for prompt, both, ref, (first, second) in zip(PROMPTS, said, reference, scalars, strict=True):
        label = pair_labels(np.array([first, second]), "soft", "all")
        better = 1 / (1 + math.exp(second - first))
        plain.append(Row(Completions(prompt, both), {"label": (better, 1 - better), "margin": (0.0,), "reference": ref}))
        ours.append(Row(Completions(prompt, both), {"label": label.flatten().tolist(), "weights": [1.0], "reference": ref}))
    gradients, losses = [], []
    for rows, loss in ((plain, dpo.make_loss(0.7)), (ours, OnlineDPO(Config(), HALF).loss({"beta": 0.7}))):
        model = build().requires_grad_(True)
        found = loss(model, collator(shared=True)(rows))
        found.loss.backward()
        losses.append(found.loss.item())
        gradients.append(model.lm_head.weight.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(*gradients)


def test_several_responses_are_the_mean_of_their_pairs():
    """Delta 1, 0 and -2 at beta 0.5 with the middle one best: z of the pairs is 1, 3 and 2."""
    label = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]])
    found, z = pair_losses(torch.tensor([[1.0, 0.0, -2.0]]), label, "sigmoid", 0.5)
    assert z.tolist() == [[1.0, 3.0, 2.0]]
    assert found.item() == pytest.approx((math.log(1 + math.exp(0.5)) + math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(-1.0))) / 3)


def test_the_minimum_is_the_closed_form():
    """At beta Delta = s + c the soft labels' loss has no slope, whatever c; hard labels push on."""
    scalar_G = np.array([0.7, -1.1, 2.0, 0.1])
    for labels, slope in (("soft", False), ("hard", True)):
        delta = torch.tensor(scalar_G / 0.6 + 3.0, dtype=torch.float32)[None].requires_grad_(True)
        label = torch.tensor(pair_labels(scalar_G, labels, "all"), dtype=torch.float32)[None]
        pair_losses(delta, label, "sigmoid", 0.6)[0].sum().backward()
        assert (delta.grad.abs().max().item() > 1e-3) == slope


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"pairs": "some"}, "pairs are all or extremes"),
        ({"labels": "firm"}, "labels soft or hard, got 'all' and 'firm'"),
        ({"loss": "log"}, "unknown loss 'log'; known: sigmoid, hinge, ipo"),
    ],
)
def test_settings_are_checked(unchecked, bad, says):
    with pytest.raises(UserError, match=says):
        Config(**bad)
