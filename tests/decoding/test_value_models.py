"""Value models that read along: every response of tiny models against uncached forwards, rows, skipped steps, bad input."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from transformers import MistralConfig

from conftest import TINY_WORDS, build_llama, build_tokenizer
from decoding.rows import OBJECTIVES, PROMPTS, Plain, check_batches, check_every_response, leaves, sibling
from decoding.test_value_guided import random_calibration
from equipoise.decoding.value_guided import ValueModelGuide
from equipoise.models.generation import Sampling, generate
from equipoise.models.loading import LanguageModel
from equipoise.models.value_heads import ValueHeads
from equipoise.models.value_models import ValueModel
from equipoise.objectives import Normaliser, parse_weights
from equipoise.types import Request, UserError

BETA = 0.6
WEIGHTS = ((0.3, 0.7), (1.0, 0.0), None)
CONFIG = Sampling(max_new_tokens=9, top_k=4, batch_size=5)


def value_model(lm, seed: int, objectives: tuple[str, ...], **settings) -> ValueModel:
    other = sibling(lm, seed)
    if settings:
        other = replace(other, model=build_llama(8, layers=2, max_position=64, seed=seed, **settings))
    count, rng = len(objectives), np.random.default_rng(seed)
    weight_KPI = np.zeros((count, 2, other.hidden_size), dtype=np.float32)
    weight_KPI[:, 0] = rng.normal(scale=0.3, size=(count, other.hidden_size))
    heads = ValueHeads(
        normaliser=Normaliser(objectives=objectives, mean_K=(0.0,) * count, sd_K=(1.0,) * count),
        model="any",
        layers=(other.num_layers,),
        horizon=9,
        tensors={
            "prefix_KPI": weight_KPI,
            "prefix_mean_I": np.zeros(other.hidden_size, dtype=np.float32),
            "bias_K": np.zeros(count, dtype=np.float32),
        },
        calibration={"prefix": random_calibration(seed)} if count == 2 else {},
    )
    return ValueModel(LanguageModel(other.model.base_model, lm.tokenizer, other.name, other.revision), heads)


@pytest.fixture(scope="module")
def apart(tiny_lm):
    """A value model per objective."""
    return [value_model(tiny_lm, 61, ("x",)), value_model(tiny_lm, 62, ("y",))]


@pytest.fixture(scope="module")
def joint(tiny_lm):
    return [value_model(tiny_lm, 63, OBJECTIVES)]


def by_hand(models, ids_NT) -> np.ndarray:
    """Values [N, K] of equally long prefixes, each model run alone, uncached."""
    columns = []
    for model in models:
        with torch.no_grad():
            state = model.lm.model(input_ids=torch.tensor(ids_NT), use_cache=False).last_hidden_state[:, -1].double().numpy()
        columns.append(state @ model.heads.tensors["prefix_KPI"][:, 0].T)
    return np.concatenate(columns, axis=1)


@pytest.mark.parametrize("skip_above", [1.0, 0.6])
@pytest.mark.parametrize("which_models", ["apart", "joint"])
@pytest.mark.parametrize(
    "config",
    [
        Sampling(max_new_tokens=2, top_k=0, batch_size=40),
        Sampling(max_new_tokens=4, top_k=3, temperature=0.7, allow_eos_first=True, batch_size=40),
    ],
    ids=str,
)
def test_every_response(tiny_lm, request, monkeypatch, which_models, config, skip_above):
    """Rows that skip a step are caught up with at the next one, so a wrong cache would show in all that follows."""
    models, plain, sure = request.getfixturevalue(which_models), Plain(), []

    def fused(weights):
        def law(head, prefixes, allowed):
            out = plain.along(tiny_lm, head, prefixes)[1]
            if weights is None:
                return out
            value = by_hand(models, [[*head, *p, a] for p in prefixes for a in range(8)]).reshape(len(prefixes), 8, 2)
            ref = softmax(np.where(allowed, out / config.temperature, -np.inf), axis=1)
            skipped = ref.max(axis=1) > skip_above
            sure.extend(skipped)
            # pi_ref is tempered and the tilt is added to it, so that the helper's division by T is undone here.
            return out + config.temperature * np.where(skipped[:, None], 0, value @ np.array(weights) / BETA)

        return law

    wanted = [x for which in (0, 1) for w in WEIGHTS for x in leaves(plain, tiny_lm, which, w, config, fused(w))]
    guide = ValueModelGuide(tiny_lm, models, beta=BETA, skip_above=skip_above)
    check_every_response(tiny_lm, guide, config, wanted, monkeypatch)
    assert (0.1 < np.mean(sure) < 0.9) if skip_above < 1 else not any(sure)


def test_a_value_model_in_bfloat16_steers_by_nearly_the_same_values(tiny_lm, joint):
    """The first step's tilt, of which all candidates share the prompt: the same to 8 bits of the states."""
    half = ValueModel(replace(joint[0].lm, model=copy.deepcopy(joint[0].lm.model).bfloat16()), joint[0].heads)
    requests = [Request(id=str(i), prompt=p, seed=i, weights=(0.3, 0.7)) for i, p in enumerate(PROMPTS)]
    one = replace(CONFIG, max_new_tokens=1, top_k=0)
    tilts = []
    for models in (joint, [half]):
        guide, seen = ValueModelGuide(tiny_lm, models, beta=BETA), []
        shift = guide.shift
        guide.shift = lambda step, shift=shift, seen=seen: seen.append(shift(step)) or seen[-1]
        generate(tiny_lm, requests, one, guide)
        tilts.append(torch.cat(seen).numpy())
    assert 0 < np.abs(tilts[1] - tilts[0]).max() < 0.05 * np.abs(tilts[0]).max()


def test_rows_do_not_depend_on_their_batch(tiny_lm, apart):
    """Tokens, prices and counted forwards: prompt and every candidate of every step, once for each model that has weight."""
    rollouts = check_batches(tiny_lm, ValueModelGuide(tiny_lm, apart, beta=BETA), CONFIG, WEIGHTS)
    for rollout in rollouts:
        steps, read = len(rollout.tokens), 0 if rollout.weights is None else sum(w > 0 for w in rollout.weights)
        assert rollout.guide_forwards == read * (rollout.base_forwards - steps + 1 + CONFIG.top_k * steps)


def test_skipping_changes_no_row_by_its_batch_and_saves_forwards_alone(tiny_lm, joint):
    guide = ValueModelGuide(tiny_lm, joint, beta=BETA, skip_above=0.6)
    requests = [Request(id=f"{p.id}/{i}", prompt=p, seed=10 * n + i, weights=(0.3, 0.7)) for i in range(4) for n, p in enumerate(PROMPTS)]
    together = generate(tiny_lm, requests, CONFIG, guide)
    alone = [generate(tiny_lm, [r], CONFIG, guide)[0] for r in requests]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    full = [generate(tiny_lm, [r], CONFIG, ValueModelGuide(tiny_lm, joint, beta=BETA, skip_above=1.0))[0] for r in requests]
    spent, whole = (sum(r.guide_forwards / len(r.tokens) for r in rows) for rows in (alone, full))
    assert spent < 0.9 * whole
    untilted = generate(tiny_lm, requests, CONFIG, ValueModelGuide(tiny_lm, joint, beta=BETA, skip_above=1e-6))
    plain = generate(tiny_lm, [replace(r, weights=None) for r in requests], CONFIG)
    assert [r.tokens for r in untilted] == [r.tokens for r in plain]
    # A model that never speaks reads no more than the prompts.
    assert [r.guide_forwards for r in untilted] == [r.base_forwards - len(r.tokens) + 1 for r in untilted]


def test_weights_as_mavis_writes_them(tiny_lm, apart):
    """ "0.2,,0.8" on three objectives leaves the middle one out; one without a value model is passed over beside others."""
    assert parse_weights("0.2,,0.8", ("x", "z", "y")) == (0.2, 0.0, 0.8)
    three = ValueModelGuide(tiny_lm, apart, beta=BETA, objectives=("x", "z", "y"))
    two = ValueModelGuide(tiny_lm, apart, beta=BETA)
    asked = [Request(id=f"{p.id}{i}", prompt=p, seed=i) for i in range(3) for p in PROMPTS]
    with_gap = generate(tiny_lm, [replace(r, weights=(0.2, 0.0, 0.8)) for r in asked], CONFIG, three)
    without = generate(tiny_lm, [replace(r, weights=(0.2, 0.8)) for r in asked], CONFIG, two)
    assert [r.tokens for r in with_gap] == [r.tokens for r in without]
    part = generate(tiny_lm, [replace(r, weights=(0.2, 0.8, 0.0)) for r in asked], CONFIG, three)
    assert [r.tokens for r in part] == [r.tokens for r in generate(tiny_lm, [replace(r, weights=(0.2, 0.0)) for r in asked], CONFIG, two)]
    with pytest.raises(UserError, match="request 'long0' weighs only z, which no value model is loaded for"):
        generate(tiny_lm, [replace(asked[0], weights=(0.0, 1.0, 0.0))], CONFIG, three)


def test_padding_of_the_policys_vocabulary_is_not_read(tiny_lm):
    """The policy has eleven rows for eight tokens, the value model eight: all candidates of a step are asked for."""
    padded = sibling(tiny_lm, 65, rows=11)
    guide = ValueModelGuide(padded, [value_model(tiny_lm, 63, OBJECTIVES)], beta=BETA)
    rollouts = generate(
        padded, [Request(id=str(i), prompt=PROMPTS[0], seed=i, weights=(0.3, 0.7)) for i in range(4)], replace(CONFIG, top_k=0), guide
    )
    assert max(token for r in rollouts for token in r.tokens) < 8
    assert sum(r.kl for r in rollouts) > 0.1


def test_a_beta_for_a_budget(tiny_lm, joint, apart):
    guide = ValueModelGuide(tiny_lm, joint, kl_budget=0.4)
    table, beta = joint[0].heads.calibration["prefix"], guide.tilt.beta((0.3, 0.7))
    tilted = log_softmax(table.logprobs_SC + table.q_SCK @ [0.3, 0.7] / beta, axis=1)
    spent = (np.exp(tilted) * (tilted - table.logprobs_SC)).sum(axis=1).mean() * table.steps
    assert spent == pytest.approx(0.4, abs=1e-6)
    with pytest.raises(UserError, match="2 value models share no calibration: set kl_budget to null and give beta"):
        ValueModelGuide(tiny_lm, apart, kl_budget=0.4)
    with pytest.raises(UserError, match="no calibration"):
        ValueModelGuide(tiny_lm, apart[:1], kl_budget=0.4)


def test_bad_input(tiny_lm, joint, apart):
    with pytest.raises(UserError, match="may have one value model"):
        ValueModelGuide(tiny_lm, [*joint, *apart], beta=1.0)
    with pytest.raises(UserError, match="may have one value model"):
        ValueModelGuide(tiny_lm, joint, beta=1.0, objectives=("x", "z"))
    with pytest.raises(UserError, match="may have one value model"):
        ValueModelGuide(tiny_lm, [], beta=1.0)
    for share in (0.0, 1.1):
        with pytest.raises(UserError, match="skip_above"):
            ValueModelGuide(tiny_lm, joint, beta=1.0, skip_above=share)
    swapped = build_tokenizer((*TINY_WORDS[:-3], TINY_WORDS[-2], TINY_WORDS[-3], TINY_WORDS[-1]))
    other = ValueModel(replace(joint[0].lm, tokenizer=swapped, name="other"), joint[0].heads)
    with pytest.raises(UserError, match="'other' has another tokenizer than 'tiny': token 5 is 'c' here, there it is 6"):
        ValueModelGuide(tiny_lm, [other], beta=1.0)
    windowed = value_model(tiny_lm, 64, OBJECTIVES, config_class=MistralConfig, sliding_window=4)
    with pytest.raises(UserError, match="attend to the full past"):
        ValueModelGuide(tiny_lm, [windowed], beta=1.0)
    nowhere = joint[0].heads.tensors | {"prefix_mean_I": np.full(16, np.nan, dtype=np.float32)}
    guide = ValueModelGuide(tiny_lm, [ValueModel(joint[0].lm, replace(joint[0].heads, tensors=nowhere))], beta=1.0)
    with pytest.raises(UserError, match=r"ValueModelGuide on x, y returned NaN or infinity for prompt 'long' \(request 'r'\) at token 0"):
        generate(tiny_lm, [Request(id="r", prompt=PROMPTS[0], seed=0, weights=(0.5, 0.5))], CONFIG, guide)
