"""Value heads: the parts by hand on made-up states, and the whole on a tiny policy whose rewards count tokens."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from conftest import prompt
from equipoise.decoding.value_guided import PolicySampler, make_guide
from equipoise.models.chat import prompt_ids
from equipoise.models.generation import Sampling
from equipoise.models.value_heads import ValueHeads
from equipoise.rollouts import make_requests
from equipoise.runs import file_digest, read_json, rollouts_digest, stage
from equipoise.training import value
from equipoise.training.value_forms import efficiency
from equipoise.training.value_states import NO_TOKEN, Plan, States, encode_states
from equipoise.training.value_teacher import (
    Actions,
    TeacherFeatures,
    fit_teacher,
    make_actions,
    make_targets,
    response_sums,
)
from equipoise.types import Rewards, Rollout, UserError

TOKENS = {"as": 3, "cs": 5}  # the rewards count these tokens
SAMPLING = Sampling(max_new_tokens=10, top_k=0, batch_size=64, whole_sentences=False)
SETTINGS = {"top_k": 0, "temperature": 1.0, "max_new_tokens": 10, "whole_sentences": False}
CONFIG = value.Config(shard_rollouts=64)
PROMPTS = [prompt(f"p{i}", " ".join(words)) for i, words in enumerate(itertools.product("abcd", repeat=3))]
TRAIN = [p for i, p in enumerate(PROMPTS) if i % 3 != 2]
TEST = [p for i, p in enumerate(PROMPTS) if i % 3 == 2]
BY_ID = {p.id: p for p in PROMPTS}


def count(rollouts: list[Rollout]) -> np.ndarray:
    return np.array([[r.tokens.count(token) for token in TOKENS.values()] for r in rollouts], dtype=np.float64)


def as_rewards(reward_NK: np.ndarray, rollouts: list[Rollout]) -> Rewards:
    names = (*TOKENS, *(f"noise{k}" for k in range(99)))[: reward_NK.shape[1]]
    return Rewards(reward_NK=reward_NK, objectives=names, rollout_ids=tuple(r.id for r in rollouts), digest=rollouts_digest(rollouts))


def fit(lm, rollouts, reward_NK, folder, config=CONFIG) -> ValueHeads:
    with stage(folder, "train value", config) as run:
        path = value.train(lm, BY_ID, rollouts, as_rewards(reward_NK, rollouts), config, SETTINGS, run)
    return ValueHeads.load(path)


@pytest.fixture(scope="module")
def rollouts(tiny_lm) -> list[Rollout]:
    """Eight responses of the reference to each training prompt."""
    return PolicySampler(tiny_lm, SAMPLING)(make_requests(TRAIN, 8, 0))


@pytest.fixture(scope="module")
def trained(tiny_lm, rollouts, tmp_path_factory):
    """Value heads on the counts, and the folder they lie in."""
    folder = tmp_path_factory.mktemp("values")
    return fit(tiny_lm, rollouts, count(rollouts), folder), folder


# --- the parts, by hand


def made_up() -> tuple[States, list[Rollout]]:
    """Four rollouts: two tokens and an end; three tokens up to the cap; an end at once; two tokens and an end, unscored."""
    lengths, stopped = [2, 3, 0, 2], [True, False, True, True]
    position_S = np.concatenate([np.arange(n + 1) for n in lengths])
    token_S = np.array([5, 6, 2, 5, 5, 7, NO_TOKEN, 2, 6, 6, 2])
    states = States(
        rollout_S=np.repeat(np.arange(4), [n + 1 for n in lengths]),
        position_S=position_S,
        token_S=token_S,
        open_SLD=np.arange(11, dtype=np.float16).reshape(11, 1, 1),
        candidates_SC=np.tile([2, 5, 6], (11, 1)),
        logprobs_SC=np.full((11, 3), -np.log(3), dtype=np.float32),
        scored_S=position_S.copy(),
    )
    return states, [rollout(f"p{i % 2}", stop) for i, stop in enumerate(stopped)]


def rollout(prompt_id: str, stopped: bool) -> Rollout:
    return Rollout(
        id=f"{prompt_id}/x",
        prompt_id=prompt_id,
        tokens=(5, 2),
        text="",
        text_tokens=1,
        logprobs=(0.0, 0.0),
        ref_logprobs=(0.0, 0.0),
        kl=0.0,
        kl_floor=0.0,
        finish_reason="stop" if stopped else "length",
        weights=None,
        seed=0,
        base_forwards=1,
    )


def test_response_sums_by_hand():
    states_SD = np.array([[100.0], [1.0], [2.0], [300.0], [5.0], [7.0], [9.0], [1.0]], dtype=np.float16)
    position_S = np.array([0, 1, 2, 0, 1, 2, 3, 0])
    np.testing.assert_array_equal(response_sums(states_SD, position_S)[:, 0], [0, 1, 3, 0, 5, 12, 21, 0])


def test_response_sums_of_a_late_rollout_are_exact():
    """Sums run over all rollouts before they are cut: what came before must not wash out what is small."""
    states_SD = np.tile(np.array([[60000.0], [0.001]], dtype=np.float16), (5000, 1))
    sums = response_sums(states_SD, np.tile([0, 1], 5000))
    np.testing.assert_allclose(sums[1::2, 0], np.float16(0.001), rtol=1e-4)
    loud = np.tile(np.array([[0.0], [60000.0]], dtype=np.float16), (5000, 1))
    loud[-1] = 0.001
    np.testing.assert_allclose(response_sums(loud, np.tile([0, 1], 5000))[-1], np.float16(0.001), rtol=1e-4)


def test_targets_by_hand():
    rollouts = [rollout(p, True) for p in ("p0", "p1", "p0", "p1", "p0")]
    z = np.array([[1.0, 0.0], [5.0, 1.0], [2.0, np.nan], [7.0, 3.0], [6.0, 4.0]])
    targets = make_targets(rollouts, z, folds=2, seed=0)
    # 1 - (2 + 6) / 2 = -3 and so on; a prompt's only scored response says nothing of what its beginning was worth
    np.testing.assert_allclose(targets.centred_RK, [[-3, -4], [-2, -2], [-1.5, np.nan], [2, 2], [4.5, 4]])
    alone = make_targets(rollouts[:2], z[:2], folds=2, seed=0)
    assert np.isnan(alone.centred_RK).all()
    assert targets.fold_R[0] == targets.fold_R[2] == targets.fold_R[4] != targets.fold_R[1] == targets.fold_R[3]
    assert targets.stopped_R.all()


def test_folds_are_even_and_fixed_by_the_seed():
    rollouts = [rollout(f"p{i % 23}", True) for i in range(92)]
    folds = [make_targets(rollouts, np.zeros((92, 1)), 5, seed).fold_R for seed in (0, 0, 1)]
    np.testing.assert_array_equal(folds[0], folds[1])
    assert (folds[0] != folds[2]).any()
    sizes = np.bincount(folds[0][:23])
    assert sizes.max() - sizes.min() <= 1


def test_fewer_prompts_than_folds_are_refused():
    with pytest.raises(UserError, match="rollouts of at least 5 prompts, got 2"):
        make_targets([rollout("p0", True), rollout("p1", True)], np.zeros((2, 1)), 5, 0)


def twice(value_SK: np.ndarray) -> np.ndarray:
    """The same values, whichever of two folds is left out."""
    return np.stack([value_SK, value_SK])


def test_actions_by_hand():
    states, rollouts = made_up()
    targets = replace(
        make_targets(rollouts, np.array([[2.0], [1.0], [4.0], [np.nan]]), folds=2, seed=0), centred_RK=np.array([[-1.0, 0, 1, np.nan]]).T
    )
    actions = make_actions(states, targets, twice(np.array([[0.5, 0.25, 0.125, 10, 20, 40, 80, 7, 1, 2, 3]]).T))
    assert actions.state_A.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert actions.token_A.tolist() == [5, 6, 2, 5, 5, 7, 2]
    # An end is worth the reward; at the cap, the value of the last state; the unscored rollout teaches nothing.
    expected = [0.25 - 0.5, 0.125 - 0.25, -1 - 0.125, 20 - 10, 40 - 20, 80 - 40, 1 - 7]
    np.testing.assert_allclose(actions.advantage_AK[:, 0], expected)
    np.testing.assert_allclose(actions.blind_AFK[:, 1, 0], expected)


def test_heads_learn_from_teachers_that_never_saw_the_tokens_fold():
    states, rollouts = made_up()
    targets = make_targets(rollouts, np.array([[2.0], [1.0], [4.0], [3.0]]), folds=2, seed=0)
    value_FSK = np.random.default_rng(0).normal(size=(2, 11, 1))
    actions = make_actions(states, targets, value_FSK)
    for fold in (0, 1):
        alone = make_actions(states, targets, twice(value_FSK[fold]))
        mine = targets.fold_R[states.rollout_S[actions.state_A]] == fold
        np.testing.assert_array_equal(actions.blind_AFK[:, fold], alone.advantage_AK)
        np.testing.assert_array_equal(actions.advantage_AK[mine], alone.advantage_AK[mine])


def test_advantages_of_a_response_add_up_to_its_reward_less_what_was_expected():
    states, rollouts = made_up()
    targets = make_targets(rollouts, np.array([[2.0], [1.0], [4.0], [3.0]]), folds=2, seed=0)
    value_SK = np.random.default_rng(0).normal(size=(11, 1))
    actions = make_actions(states, targets, twice(value_SK))
    total_R = np.bincount(states.rollout_S[actions.state_A], actions.advantage_AK[:, 0])
    begun = np.flatnonzero(states.position_S == 0)
    ends = np.where(targets.stopped_R, targets.centred_RK[:, 0], value_SK[[2, 6, 7, 10], 0])
    np.testing.assert_allclose(total_R, ends - value_SK[begun, 0])


def test_efficiency_by_hand():
    states, rollouts = made_up()
    targets = replace(
        make_targets(rollouts, np.array([[2.0], [1.0], [4.0], [np.nan]]), folds=2, seed=0), centred_RK=np.array([[-1.0, 0, 1, np.nan]]).T
    )
    actions = Actions(np.array([0, 1, 2, 3, 4, 5, 7]), np.zeros(7), np.zeros((7, 1)), np.zeros((7, 2, 1)))
    q = np.array([[-0.5, -0.5, -1.0, 0.5, -0.5, 0.0, 3.0]]).T  # sums -2, 0, 3
    sums, rewards = np.array([-2.0, 0.0, 3.0]), np.array([-1.0, 0.0, 1.0])
    assert efficiency(q, actions, targets, states) == pytest.approx([np.corrcoef(sums, rewards)[0, 1]])
    assert efficiency(np.zeros((7, 1)), actions, targets, states) == [0.0]


def test_teacher_features_by_hand():
    states, _ = made_up()
    features = TeacherFeatures(replace(states, scored_S=np.array([0, 1, 1, 0, 1, 1, 3, 0, 0, 1, 2])), 0, horizon=4)
    # states 1 2 | 4 5 6 | none | 9 10 after the prompt's; sums over the horizon, means up to what would be scored
    np.testing.assert_allclose(features.sum_SD[:, 0], np.array([0, 1, 3, 0, 4, 9, 15, 0, 0, 9, 19]) / 4)
    np.testing.assert_allclose(features.mean_SD[:, 0], [0, 1, 1, 0, 4, 4, 5, 0, 0, 9, 9.5])
    np.testing.assert_allclose(features.p_S, [-1, -0.5, 0, -1, -0.5, 0, 0.5, -1, -1, -0.5, 0])
    x = features.rows(np.array([6, 3]))
    assert x.shape == (2, 8)
    np.testing.assert_allclose(x[:, 3:6], x[:, :3] * [[0.5], [-1]])
    np.testing.assert_allclose(x[:, 6:], [[0.5, 1], [-1, 1]])


# --- states of a policy


def plan_of(lm, **changes) -> Plan:
    return replace(Plan(layers=(1, lm.num_layers), top_k=0, temperature=1.0, whole_sentences=False), **changes)


def test_states_and_candidates_are_those_of_a_plain_forward(tiny_lm, rollouts, tmp_path):
    import torch

    some = [*rollouts[:3], *rollouts[40:42]]
    states = encode_states(tiny_lm, BY_ID, some, plan_of(tiny_lm, top_k=4, temperature=0.7), tmp_path, 2)
    for index, one in enumerate(some):
        head = prompt_ids(tiny_lm.tokenizer, BY_ID[one.prompt_id])
        body = list(one.tokens[:-1] if one.finish_reason == "stop" else one.tokens)
        mine = states.rollout_S == index
        assert states.position_S[mine].tolist() == list(range(len(body) + 1))
        assert states.token_S[mine].tolist() == [*body, one.tokens[-1] if one.finish_reason == "stop" else NO_TOKEN]
        assert states.scored_S[mine].tolist() == list(range(len(body) + 1))
        out = tiny_lm.model(torch.tensor([head + body]), output_hidden_states=True)
        hidden = torch.stack([out.hidden_states[1][0], out.hidden_states[-1][0]], dim=1)[len(head) - 1 :].numpy()
        np.testing.assert_allclose(states.open_SLD[mine], hidden, rtol=2e-3, atol=2e-3)
        top, ids = (out.logits[0, len(head) - 1 :] / 0.7).topk(4)
        np.testing.assert_array_equal(states.candidates_SC[mine], ids.numpy())
        np.testing.assert_allclose(states.logprobs_SC[mine], torch.log_softmax(top, -1).numpy(), atol=1e-4)


def test_what_would_be_scored_ends_with_the_last_whole_sentence(tiny_lm, tmp_path):
    a, b, stop, eos = 3, 4, 7, 2
    one = replace(rollout("p0", True), tokens=(a, b, stop, a, stop, b, eos))
    two = replace(rollout("p0", False), tokens=(a, b, a))
    states = encode_states(tiny_lm, BY_ID, [one, two], plan_of(tiny_lm, whole_sentences=True), tmp_path, 8)
    # With no sentence yet there is nothing to cut back to, so all of it counts.
    assert states.scored_S.tolist() == [0, 1, 2, 3, 3, 5, 5, 0, 1, 2, 3]


def test_states_of_a_killed_run_are_those_of_an_undisturbed_one(tiny_lm, rollouts, tmp_path):
    whole = encode_states(tiny_lm, BY_ID, rollouts[:50], plan_of(tiny_lm), tmp_path, 16)
    (tmp_path / "part-00002.safetensors").unlink()
    told: list[int] = []
    again = encode_states(tiny_lm, BY_ID, rollouts[:50], plan_of(tiny_lm), tmp_path, 16, told.append)
    assert told == [16, 16, 16, 2]
    for name in States.__annotations__:
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))


def test_a_damaged_shard_of_states_is_named(tiny_lm, rollouts, tmp_path):
    encode_states(tiny_lm, BY_ID, rollouts[:20], plan_of(tiny_lm), tmp_path, 16)
    path = tmp_path / "part-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"part-00001\.safetensors is damaged .*delete it and run again"):
        encode_states(tiny_lm, BY_ID, rollouts[:20], plan_of(tiny_lm), tmp_path, 16)


@pytest.mark.parametrize("changed", [0, 2])
def test_the_teacher_never_saw_the_prompts_that_it_was_kept_from(tiny_lm, rollouts, tmp_path, changed):
    """Other rewards for one fold's prompts don't touch the values at its states, nor any value that left the fold out."""
    states = encode_states(tiny_lm, BY_ID, rollouts, plan_of(tiny_lm), tmp_path, 512)
    config = replace(CONFIG, l2_teacher=(1.0,))
    z = count(rollouts)
    before = make_targets(rollouts, z, 5, 0)
    held = before.fold_R == changed
    after = make_targets(rollouts, np.where(held[:, None], np.random.default_rng(0).normal(size=z.shape), z), 5, 0)
    one, other = (fit_teacher(states, 0, targets, 10, config)[0] for targets in (before, after))
    mine = held[states.rollout_S]
    np.testing.assert_allclose(one[:, mine], other[:, mine], atol=1e-9)
    np.testing.assert_allclose(one[changed], other[changed], atol=1e-9)
    for fold in {*range(5)} - {changed}:
        assert np.abs(one[fold, ~mine] - other[fold, ~mine]).max() > 0.01


# --- the whole


def test_held_out_figures_are_clearly_positive(trained):
    quality = read_json(trained[1] / "quality.json")
    assert quality["objectives"] == ["as", "cs"]
    assert min(quality["single-pass"]["efficiency"]) > 0.5
    assert min(quality["teacher"]["r2"]) > 0.1
    by_position = quality["teacher"]["r2_by_position"]
    assert by_position[0][0] == 0
    assert by_position[-1][1][0] > by_position[0][1][0] + 0.2, "more is known at the end than at the start"
    for form in ("single-pass", "prefix"):
        assert min(quality[form]["r2"]) > 0.2


@pytest.mark.parametrize("l2", [CONFIG.l2_teacher, (0.01,)])
def test_figures_on_noise_are_near_zero(tiny_lm, rollouts, tmp_path, l2):
    """Also where the teacher learns its rewards by heart: what is stated rests on prompts that no fit behind it has seen."""
    reward_NK = np.random.default_rng(0).normal(size=(len(rollouts), 16))
    fit(tiny_lm, rollouts, reward_NK, tmp_path, replace(CONFIG, l2_teacher=l2))
    quality = read_json(tmp_path / "quality.json")
    assert max(quality["teacher"]["r2"]) < 0.02
    assert abs(np.mean(quality["single-pass"]["efficiency"])) < 0.05
    assert np.abs(quality["single-pass"]["efficiency"]).max() < 0.25


@pytest.mark.parametrize("budget", [0.3, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_steering_raises_what_is_weighed_at_about_the_kl_that_was_asked_for(tiny_lm, trained, weights, budget):
    heads = trained[0]
    guide = make_guide(tiny_lm, heads, "single-pass", 8, kl_budget=budget)
    steered = PolicySampler(tiny_lm, SAMPLING, guide)(make_requests(TEST, 8, 1, weights))
    reference = PolicySampler(tiny_lm, SAMPLING)(make_requests(TEST, 8, 1))
    gain_K = (heads.normaliser(count(steered)) - heads.normaliser(count(reference))).mean(axis=0)
    assert gain_K @ weights > 0.4 * np.sqrt(2 * budget)
    assert budget / 2 < np.mean([r.kl for r in steered]) < 2 * budget


def test_the_prefix_form_steers_too(tiny_lm, trained):
    heads = trained[0]
    guide = make_guide(tiny_lm, heads, "prefix", 8, kl_budget=1.0)
    steered = PolicySampler(tiny_lm, SAMPLING, guide)(make_requests(TEST, 4, 1, (1.0, 0.0)))
    reference = PolicySampler(tiny_lm, SAMPLING)(make_requests(TEST, 4, 1))
    gain_K = (heads.normaliser(count(steered)) - heads.normaliser(count(reference))).mean(axis=0)
    assert gain_K[0] > 0.4
    assert 0.5 < np.mean([r.kl for r in steered]) < 2.0


def test_one_objective_alone(tiny_lm, rollouts, tmp_path):
    heads = fit(tiny_lm, rollouts, count(rollouts)[:, :1], tmp_path)
    assert heads.objectives == ("as",)
    assert read_json(tmp_path / "quality.json")["single-pass"]["efficiency"][0] > 0.5


def test_training_again_gives_the_same_bytes(tiny_lm, rollouts, trained, tmp_path):
    fit(tiny_lm, rollouts, count(rollouts), tmp_path)
    for name in ("values.safetensors", "quality.json"):
        assert file_digest(tmp_path / name) == file_digest(trained[1] / name)


def test_unscored_responses_are_counted_and_teach_nothing(tiny_lm, rollouts, tmp_path):
    reward_NK = count(rollouts)
    reward_NK[::7, 0] = np.nan
    heads = fit(tiny_lm, rollouts, reward_NK, tmp_path)
    facts = read_json(tmp_path / "manifest.json")["facts"]
    assert facts["unscored"] == len(rollouts[::7])
    assert facts["rollouts"] == len(rollouts)
    assert all(np.isfinite(t).all() for t in heads.tensors.values())
    assert read_json(tmp_path / "quality.json")["single-pass"]["efficiency"][0] > 0.5


def test_a_fold_without_a_single_score_is_no_obstacle(tiny_lm, rollouts, tmp_path):
    reward_NK = count(rollouts)
    reward_NK[make_targets(rollouts, reward_NK, CONFIG.folds, CONFIG.seed).fold_R == 0] = np.nan
    heads = fit(tiny_lm, rollouts, reward_NK, tmp_path)
    assert all(np.isfinite(t).all() for t in heads.tensors.values())


def test_rollouts_that_never_have_all_scores_are_refused(tiny_lm, rollouts, tmp_path):
    reward_NK = count(rollouts)
    reward_NK[::2, 0] = reward_NK[1::2, 1] = np.nan
    with pytest.raises(UserError, match=f"0 of {len(rollouts)} rollouts are scored on all of as, cs"):
        fit(tiny_lm, rollouts, reward_NK, tmp_path)


def test_layers_are_checked(tiny_lm, rollouts, tmp_path):
    for i, bad in enumerate([{"layers": (1, 2)}, {"layers": (3,), "teacher_layer": 1}, {"layers": (1, 9)}]):
        with pytest.raises(UserError, match="end with the last one, 3"):
            fit(tiny_lm, rollouts, count(rollouts), tmp_path / str(i), replace(CONFIG, **bad))


@pytest.mark.parametrize(
    ("bad", "says"), [({"folds": 2}, "folds"), ({"l2_teacher": ()}, "l2_teacher"), ({"l2_heads": (1.0, -1.0)}, "l2_heads")]
)
def test_settings_are_checked(bad, says):
    with pytest.raises(UserError, match=says):
        value.Config(**bad)
