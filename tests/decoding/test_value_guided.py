"""The two value forms against their formulas worked from plain forwards; unguided rows; beta for a budget; bad input."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from transformers import MistralConfig

from conftest import build_llama
from decoding.rows import EOS, OBJECTIVES, PROMPTS, KnowsItsRows, Weights, plain_forward
from equipoise.decoding.value_guided import PolicySampler, PrefixGuide, SinglePassGuide, make_guide
from equipoise.models.generation import Sampling, generate
from equipoise.models.loading import LanguageModel
from equipoise.models.value_heads import Calibration, ValueHeads
from equipoise.objectives import Normaliser
from equipoise.types import Request, UserError


def random_calibration(seed: int, candidates: int = 6, scale: float = 1.0) -> Calibration:
    rng = np.random.default_rng(seed)
    return Calibration(
        logprobs_SC=log_softmax(rng.normal(size=(20, candidates)), axis=1),
        q_SCK=rng.normal(scale=scale, size=(20, candidates, len(OBJECTIVES))),
        steps=7.5,
    )


@pytest.fixture(scope="module")
def heads(tiny_lm) -> ValueHeads:
    rng = np.random.default_rng(21)
    layers, hidden, features = (1, tiny_lm.num_layers), tiny_lm.hidden_size, 5
    inner = len(layers) * hidden
    tensors = {
        "mean_I": rng.normal(size=inner),
        "whiten_IM": rng.normal(scale=0.2, size=(inner, features)),
        "single_KXD": rng.normal(scale=0.3, size=(len(OBJECTIVES), features + 3, hidden)),
        "prefix_mean_I": rng.normal(size=inner),
        "prefix_KPI": rng.normal(scale=0.2, size=(len(OBJECTIVES), 2, inner)),
    }
    return ValueHeads(
        normaliser=Normaliser(objectives=OBJECTIVES, mean_K=(0.0, 0.0), sd_K=(1.0, 1.0)),
        model=tiny_lm.name,
        layers=layers,
        horizon=6,
        tensors={name: t.astype(np.float32) for name, t in tensors.items()},
        calibration={"single-pass": random_calibration(1), "prefix": random_calibration(2)},
    )


FORMS = ("single-pass", "prefix")
BETA = 0.7
CONFIG = Sampling(max_new_tokens=9, top_k=4, batch_size=5)
"""Nine tokens against a horizon of six, so that positions past the horizon occur."""


def guide_of(lm, heads, form, config=CONFIG, **how):
    return make_guide(lm, heads, form, config.top_k or 8, **(how or {"beta": BETA}))


def requests_for(samples: int, weights: list[Weights]) -> list[Request]:
    turn = itertools.cycle(weights)
    return [Request(id=f"{p.id}/{i}", prompt=p, seed=50 * n + i, weights=next(turn)) for i in range(samples) for n, p in enumerate(PROMPTS)]


def place(position: int, horizon: int) -> float:
    return min(1.0, 2 * position / horizon - 1)


def single_pass_by_hand(lm, heads, context: list[int], position: int, candidates: list[int]) -> np.ndarray:
    """q_CK by the formula, term by term."""
    t = {name: array.astype(np.float64) for name, array in heads.tensors.items()}
    states = plain_forward(lm, [context])[1]
    h_I = np.concatenate([states[layer][0] for layer in heads.layers])
    p = place(position, heads.horizon)
    x_X = np.concatenate([[1.0], (h_I - t["mean_I"]) @ t["whiten_IM"], [p, p**2]])
    table_VD = lm.model.get_input_embeddings().weight.double().numpy()
    return np.array(
        [[sum(x * (table_VD[a] @ row_D) for x, row_D in zip(x_X, A_XD, strict=True)) for A_XD in t["single_KXD"]] for a in candidates]
    )


def prefix_by_hand(lm, heads, context: list[int], position: int, candidates: list[int]) -> np.ndarray:
    """v_CK of the prefix with each candidate appended, each run alone."""
    t = {name: array.astype(np.float64) for name, array in heads.tensors.items()}
    states = plain_forward(lm, [[*context, a] for a in candidates])[1]
    h_CI = np.concatenate([states[layer] for layer in heads.layers], axis=1) - t["prefix_mean_I"]
    p = place(position + 1, heads.horizon)
    return np.stack([h_CI @ (first + p * second) for first, second in t["prefix_KPI"]], axis=1)


BY_HAND = {"single-pass": single_pass_by_hand, "prefix": prefix_by_hand}


class ByHand(KnowsItsRows):
    """The shifts of a form, each from plain forwards; the policy runs the chosen tokens itself."""

    def __init__(self, lm, heads, form, beta=BETA):
        super().__init__(lm)
        self.value_heads, self.by_hand, self.beta = heads, BY_HAND[form], beta

    def shift(self, step):
        rows = []
        for (which, prefix), tokens, weights in zip(self.rows_of(step), step.candidates_RC.tolist(), step.weights_RK.tolist(), strict=True):
            value_CK = self.by_hand(self.lm, self.value_heads, [*self.heads[which], *prefix], len(prefix), tokens)
            rows.append(value_CK @ np.nan_to_num(np.array(weights)) / self.beta)
        return torch.tensor(np.array(rows), dtype=torch.float32)


class Watched(ByHand):
    """A guide under test, each of whose shifts is held against the one by hand."""

    def __init__(self, lm, heads, form, guide, beta=BETA):
        super().__init__(lm, heads, form, beta)
        self.guide, self.seen = guide, 0
        self.layers, self.forwards_per_step = guide.layers, guide.forwards_per_step

    def shift(self, step):
        got, want = self.guide.shift(step), super().shift(step)
        guided = ~step.weights_RK.isnan().any(dim=1)
        torch.testing.assert_close(got[guided], want[guided], atol=1e-4, rtol=1e-4)
        assert torch.isfinite(got).all()
        assert (got[~guided] == 0).all()
        self.seen += int(guided.sum())
        return got

    def advance(self, step, choice_R):
        return self.guide.advance(step, choice_R)


MIXED: list[Weights] = [(0.3, 0.7), None, (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]


@pytest.mark.parametrize("top_k", [4, 0])
@pytest.mark.parametrize("form", FORMS)
def test_values_equal_those_by_hand(tiny_lm, heads, form, top_k):
    config = replace(CONFIG, top_k=top_k)
    watched = Watched(tiny_lm, heads, form, guide_of(tiny_lm, heads, form, config))
    rollouts = generate(tiny_lm, requests_for(5, MIXED), config, watched)
    assert watched.seen == sum(len(r.tokens) for r in rollouts if r.weights)
    assert len({len(r.tokens) for r in rollouts}) > 2  # rows leave the batch at different steps
    assert sum(r.kl for r in rollouts if r.weights) > 1  # the values do tilt


@pytest.mark.parametrize("top_k", [4, 0])
@pytest.mark.parametrize("form", FORMS)
def test_same_tokens_as_by_hand_and_for_every_batch(tiny_lm, heads, form, top_k):
    """For the prefix form: keeping the chosen branch leaves the loop where running the chosen token would."""
    config, requests = replace(CONFIG, top_k=top_k), requests_for(5, MIXED)
    plain = generate(tiny_lm, requests, config, ByHand(tiny_lm, heads, form))
    for size in (1, 4, 32):
        rollouts = generate(tiny_lm, requests, replace(config, batch_size=size), guide_of(tiny_lm, heads, form, config))
        assert [r.tokens for r in rollouts] == [r.tokens for r in plain]
        for got, want in zip(rollouts, plain, strict=True):
            np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
            np.testing.assert_allclose(got.ref_logprobs, want.ref_logprobs, atol=1e-4)
            np.testing.assert_allclose([got.kl, got.kl_floor], [want.kl, want.kl_floor], atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_weights_are_the_reference_in_a_mixed_batch(tiny_lm, heads, form):
    mixed = requests_for(5, MIXED)
    plain = {r.id: r for r in generate(tiny_lm, [replace(r, weights=None) for r in mixed], CONFIG)}
    rollouts = PolicySampler(tiny_lm, CONFIG, guide_of(tiny_lm, heads, form))(mixed)
    assert [r.id for r in rollouts] == [r.id for r in mixed]
    unguided = [r for r in rollouts if r.weights is None]
    assert len(unguided) == 3
    for got in unguided:
        assert got.tokens == plain[got.id].tokens
        assert got.kl == pytest.approx(0, abs=1e-6)
        np.testing.assert_allclose(got.logprobs, plain[got.id].logprobs, atol=1e-5)
    assert any(r.tokens != plain[r.id].tokens for r in rollouts if r.weights)


@pytest.mark.parametrize("how", [{"beta": 0.7}, {"kl_budget": 2.0}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_all_weight_on_one_objective_equals_dropping_the_other(tiny_lm, heads, form, how):
    only = replace(
        heads,
        normaliser=Normaliser(objectives=("x",), mean_K=(0.0,), sd_K=(1.0,)),
        tensors={n: t[:1] if n in ("single_KXD", "prefix_KPI") else t for n, t in heads.tensors.items()},
        calibration={f: replace(table, q_SCK=table.q_SCK[:, :, :1]) for f, table in heads.calibration.items()},
    )
    both = generate(tiny_lm, requests_for(4, [(1.0, 0.0)]), CONFIG, guide_of(tiny_lm, heads, form, **how))
    one = generate(tiny_lm, requests_for(4, [(1.0,)]), CONFIG, guide_of(tiny_lm, only, form, **how))
    assert [r.tokens for r in both] == [r.tokens for r in one]
    for got, want in zip(both, one, strict=True):
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_large_beta_is_the_reference_and_a_small_one_the_best_candidate(tiny_lm, heads, form):
    requests = requests_for(3, [(0.3, 0.7)])
    plain = generate(tiny_lm, [replace(r, weights=None) for r in requests], CONFIG)
    weak = generate(tiny_lm, requests, CONFIG, guide_of(tiny_lm, heads, form, beta=1e7))
    assert [r.tokens for r in weak] == [r.tokens for r in plain]
    strong = generate(tiny_lm, requests, CONFIG, guide_of(tiny_lm, heads, form, beta=1e-5))
    np.testing.assert_allclose([p for r in strong for p in r.logprobs], 0.0, atol=1e-4)
    # All on one candidate: the price is that candidate's surprise under the restricted reference.
    for r in strong:
        assert r.kl == pytest.approx(-sum(r.ref_logprobs) - r.kl_floor, abs=1e-3)


@pytest.mark.parametrize(("form", "extra"), [("single-pass", 0), ("prefix", 3)])
def test_what_the_guide_costs(tiny_lm, heads, form, extra):
    for r in generate(tiny_lm, requests_for(3, [(0.3, 0.7)]), CONFIG, guide_of(tiny_lm, heads, form)):
        # Prefix: 4 candidates a step; all but the last chosen one also serve as the policy's own token.
        assert r.guide_forwards == extra * len(r.tokens) + (extra > 0)


# --- beta for a budget -------------------------------------------------------------------------------------------------


def test_predicted_kl_by_hand():
    """One state, two equally likely candidates, q = (0, log 3): at beta 1 the tilt is (1/4, 3/4)."""
    table = Calibration(logprobs_SC=np.log([[0.5, 0.5]]), q_SCK=np.array([[[0.0], [np.log(3)]]]), steps=10.0)
    expected = 10 * (0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5))
    assert table.kl((1.0,), 1.0) == pytest.approx(expected)
    assert table.beta_for((1.0,), expected) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("budget", [0.05, 0.5, 3.0])
def test_a_budget_is_met_for_each_weight_vector(tiny_lm, heads, form, budget):
    guide = guide_of(tiny_lm, heads, form, kl_budget=budget)
    for weights in [(1.0, 0.0), (0.3, 0.7), (0.0, 1.0)]:
        beta = guide.tilt.beta(weights)
        assert heads.calibration[form].kl(weights, beta) == pytest.approx(budget, abs=1e-3)
        fixed = generate(tiny_lm, requests_for(1, [weights]), CONFIG, guide_of(tiny_lm, heads, form, beta=beta))
        assert [r.tokens for r in generate(tiny_lm, requests_for(1, [weights]), CONFIG, guide)] == [r.tokens for r in fixed]
    [scaled] = guide.tilt(torch.tensor([[0.3, 0.7]])).tolist()
    assert scaled == pytest.approx([w / guide.tilt.beta((0.3, 0.7)) for w in (0.3, 0.7)], rel=1e-5)


def test_every_row_of_a_batch_has_its_own_beta(tiny_lm, heads):
    guide = guide_of(tiny_lm, heads, "single-pass", kl_budget=1.0)
    rows = [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)]
    scaled = guide.tilt(torch.tensor([*rows, (float("nan"), float("nan"))]))
    for weights, got in zip(rows, scaled.tolist(), strict=False):
        assert got == pytest.approx([w / heads.calibration["single-pass"].beta_for(weights, 1.0) for w in weights], rel=1e-4)
    assert scaled[3].tolist() == [0.0, 0.0]
    assert len({round(sum(row), 3) for row in scaled[:3].tolist()}) == 3


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(0.05, 5.0),
    weight=st.floats(0.0, 1.0),
    shares=st.tuples(st.floats(0.02, 0.95), st.floats(0.02, 0.95)),
)
def test_beta_falls_with_the_budget_and_meets_it(seed, scale, weight, shares):
    table, weights = random_calibration(seed, scale=scale), (weight, 1 - weight)
    most = table.kl(weights, 1e-6)
    small, large = sorted(share * most for share in shares)
    betas = [table.beta_for(weights, budget) for budget in (small, large)]
    assert betas[0] >= betas[1]
    assert [table.kl(weights, beta) for beta in betas] == pytest.approx([small, large], abs=1e-3)
    assert table.kl(weights, 2 * betas[0]) <= table.kl(weights, betas[0]) + 1e-12


@pytest.mark.parametrize("budget", [1e6, 0.0, -1.0, float("nan")])
@pytest.mark.parametrize("form", FORMS)
def test_an_impossible_budget_is_named(tiny_lm, heads, form, budget):
    with pytest.raises(UserError, match=r"kl_budget.*(1e\+06 nats is more|must be positive, got (0|-1|nan))"):
        generate(tiny_lm, requests_for(1, [(0.3, 0.7)]), CONFIG, guide_of(tiny_lm, heads, form, kl_budget=budget))


@pytest.mark.parametrize("beta", [0.0, -0.5, float("nan")])
@pytest.mark.parametrize("form", FORMS)
def test_an_impossible_beta_is_named(tiny_lm, heads, form, beta):
    with pytest.raises(UserError, match=f"beta must be positive, got {beta:g}"):
        guide_of(tiny_lm, heads, form, beta=beta)


@pytest.mark.parametrize("how", [{"beta": None}, {"beta": 1.0, "kl_budget": 1.0}], ids=str)
def test_one_of_beta_and_budget(tiny_lm, heads, how):
    for guide in (lambda: SinglePassGuide(tiny_lm, heads, **how), lambda: PrefixGuide(tiny_lm, heads, 4, **how)):
        with pytest.raises(UserError, match="exactly one of beta and kl_budget"):
            guide()


def test_values_that_do_not_fit_are_refused(tiny_lm, heads):
    with pytest.raises(UserError, match="'other', not on 'tiny'"):
        make_guide(tiny_lm, replace(heads, model="other"), "prefix", 4, beta=1.0)
    with pytest.raises(UserError, match="unknown value form 'postfix'; known: single-pass, prefix"):
        make_guide(tiny_lm, heads, "postfix", 4, beta=1.0)
    with pytest.raises(UserError, match="no calibration for the form 'prefix'"):
        make_guide(tiny_lm, replace(heads, calibration={}), "prefix", 4, kl_budget=1.0)


@pytest.mark.parametrize("window", [4, 40])
def test_the_prefix_form_refuses_a_sliding_window(tiny_tokenizer, heads, window):
    """Whether or not the prompt fits into the window."""
    model = build_llama(8, layers=3, max_position=64, seed=5, config_class=MistralConfig, sliding_window=window)
    lm = LanguageModel(model=model, tokenizer=tiny_tokenizer, name="tiny", revision="5", eos_ids=frozenset({EOS}))
    with pytest.raises(UserError, match="attend to the full past"):
        generate(lm, requests_for(1, [(0.3, 0.7)]), CONFIG, guide_of(lm, heads, "prefix"))
    generate(lm, requests_for(1, [(0.3, 0.7)]), CONFIG, guide_of(lm, heads, "single-pass"))


def test_heads_survive_the_file(tiny_lm, heads, tmp_path):
    heads.save(tmp_path / "values.safetensors")
    loaded = ValueHeads.load(tmp_path / "values.safetensors")
    requests = requests_for(2, [(0.3, 0.7)])
    for form, how in itertools.product(FORMS, ({"beta": 0.7}, {"kl_budget": 1.0})):
        got = generate(tiny_lm, requests, CONFIG, guide_of(tiny_lm, loaded, form, **how))
        assert [r.tokens for r in got] == [r.tokens for r in generate(tiny_lm, requests, CONFIG, guide_of(tiny_lm, heads, form, **how))]
