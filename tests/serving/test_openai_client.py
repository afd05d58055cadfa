"""The official client drives the endpoint: plain, streamed, weights, targets, and everything that has to be refused."""

from __future__ import annotations

import json
import math

import numpy as np
import openai
import pytest
from openai import OpenAI

from conftest import prompt
from equipoise.models.generation import Sampling, generate
from equipoise.rewards.scoring import score
from equipoise.types import Request
from serving.conftest import asked, serving


def numbers(said: dict) -> list[float]:
    """Values of a reply; null is unscored."""
    return [math.nan if value is None else value for value in said.values()]


def name_of(served, method: str) -> str:
    return f"{served.lm.name}:{method}"


def test_the_models_are_the_base_under_each_method(client, served):
    listed = {model.id: model.model_extra["equipoise"] for model in client.models.list()}
    assert set(listed) == {name_of(served, m) for m in ("reference", "values", "best-of-3", "palette")}
    assert listed[name_of(served, "values")]["reads"] == ["weights", "kl_budget", "beta"]
    assert listed[name_of(served, "palette")]["reads"] == ["targets"]
    assert client.models.retrieve(name_of(served, "values")).owned_by == "equipoise"


def test_a_plain_answer_is_what_the_sampler_draws(client, served):
    """The reference's own tokens at this seed, with the rewards of their text."""
    found = client.chat.completions.create(**asked(model=served.lm.name))
    request = Request(id="r", prompt=prompt("p", "how do i make bread ?"), seed=3, most_tokens=8)
    config = Sampling(max_new_tokens=8, top_k=12)
    [alone] = generate(served.lm, [request], config)
    choice, said = found.choices[0], found.choices[0].model_extra["equipoise"]
    assert choice.message.content == generate(served.lm, [request], Sampling(max_new_tokens=8, top_k=12, whole_sentences=False))[0].text
    assert (said["tokens"], choice.finish_reason) == (len(alone.tokens), alone.finish_reason)
    assert (said["kl"], said["kl_floor"]) == pytest.approx((alone.kl, alone.kl_floor))
    [reward_K] = score(served.rewards, {"p": request.prompt}, [alone])
    assert numbers(said["rewards"]) == pytest.approx(reward_K, nan_ok=True)
    mean_K, sd_K = np.array(served.scale.mean_K), np.array(served.scale.sd_K)
    assert numbers(said["scores"]) == pytest.approx((reward_K - mean_K) / sd_K, nan_ok=True)
    assert found.usage.total_tokens == found.usage.prompt_tokens + len(alone.tokens)


def test_weights_of_every_form_are_one_request(client, served):
    forms = ({"brief": 0.25, "diverse": 0.75}, [0.25, 0.75])
    first, second = (client.chat.completions.create(**asked(extra_body={"weights": weights})) for weights in forms)
    assert first.model == name_of(served, "values")  # weights without a method go to the first that reads them
    assert first.choices[0].message.content == second.choices[0].message.content
    said = first.model_extra["equipoise"]
    assert said["weights"] == {"brief": 0.25, "diverse": 0.75}
    assert said["kl_budget"] == 1.0  # the default of the settings
    assert said["multipliers"]["diverse"] == pytest.approx(0.75 / said["beta"])
    assert first.choices[0].model_extra["equipoise"]["kl"] > 0


def test_beta_and_the_budget_are_two_ways_to_say_one_thing(client):
    by_budget = client.chat.completions.create(**asked(extra_body={"weights": [1, 0], "kl_budget": 0.4}))
    beta = by_budget.model_extra["equipoise"]["beta"]
    by_beta = client.chat.completions.create(**asked(extra_body={"weights": [1, 0], "beta": beta}))
    assert by_beta.choices[0].message.content == by_budget.choices[0].message.content
    kl = [r.choices[0].model_extra["equipoise"]["kl"] for r in (by_budget, by_beta)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-5)
    assert by_beta.model_extra["equipoise"]["kl_budget"] is None


def test_a_stream_says_the_same_as_the_whole(client, served):
    request = asked(extra_body={"weights": [0, 1], "explain": True}, n=2)
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    usage = chunks.pop()
    assert usage.choices == []
    assert usage.usage == whole.usage
    for index, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert [c.finish_reason for c in own if c.finish_reason] == [choice.finish_reason]
        last, said = own[-1].model_extra["equipoise"], choice.model_extra["equipoise"]
        assert {k: last[k] for k in said} == pytest.approx(said) if not said.get("push") else last["scores"] == said["scores"]
        pushes = [p for c in own[:-1] for p in (c.model_extra.get("equipoise") or {}).get("push", [])]
        assert pushes == said["push"]
        assert len(pushes) == said["tokens"]
    assert last["answer"]["weights"] == {"brief": 0.0, "diverse": 1.0}


def test_what_pushed_a_token_sums_to_the_log_ratio_but_for_a_constant(served):
    """sum_k push_k(a) - sum_k push_k(b) = log pi(a)/pi_ref(a) - log pi(b)/pi_ref(b) for two candidates of one step."""
    from equipoise.models.generation import Loop
    from equipoise.serving.explaining import Explained

    offer = served.offers["values"]
    seen = {}

    class Watched(Explained):
        def shift(self, step):
            shift_RC = super().shift(step)
            seen["shift"], seen["ids"], seen["ref"] = shift_RC[0], step.candidates_RC[0], step.ref_logprobs_RC[0]
            return shift_RC

    guide = Watched(offer.guide)
    loop = Loop(served.lm, Sampling(max_new_tokens=4, top_k=12), guide)
    loop.submit([loop.job(Request(id="r", prompt=prompt("p", "how do i make bread ?"), seed=1, weights=(1.5, 0.7), explained=True))])
    import torch

    with torch.inference_mode():
        loop.turn()
    law = torch.log_softmax(seen["ref"] + seen["shift"], dim=-1) - seen["ref"]
    total = torch.tensor([sum(guide.push("r", int(token))) for token in seen["ids"]])
    assert torch.allclose(total - total[0], law - law[0], atol=1e-5)
    mean = (seen["ref"].exp()[:, None] * torch.tensor([guide.push("r", int(t)) for t in seen["ids"]])).sum(dim=0)
    assert torch.allclose(mean, torch.zeros(2), atol=1e-6)


def test_targets_bring_multipliers_and_what_they_promise(client, served):
    found = client.chat.completions.create(**asked(extra_body={"targets": "brief>=+0.2sd diverse>=keep-1"}))
    said = found.model_extra["equipoise"]
    assert found.model == name_of(served, "palette")
    assert said["multipliers"]["brief"] > 0
    assert said["levels"]["brief"] >= said["asked"]["brief"] - 1e-6
    assert found.usage.completion_tokens >= said["candidates"]
    assert said["reward_calls"] == 2 * said["candidates"]
    other = client.chat.completions.create(**asked(extra_body={"targets": {"brief": ">=+0.2sd", "diverse": ">=keep-1"}}))
    assert other.choices[0].message.content == found.choices[0].message.content


def test_best_of_n_takes_the_best_of_its_candidates(client, served):
    """The candidates' own scores, drawn here by their seeds: the served one has the highest weighted score."""
    from equipoise.decoding.choosing import candidate_requests

    found = client.chat.completions.create(**asked(model=name_of(served, "best-of-3"), extra_body={"weights": [0.6, 0.4]}))
    request = Request(id="r", prompt=prompt("p", "how do i make bread ?"), seed=3, most_tokens=8)
    drawn = generate(served.lm, candidate_requests([request], 3), Sampling(max_new_tokens=8, top_k=12))
    z_NK = served.scale(score(served.rewards, {"p": request.prompt}, drawn))
    best = int(np.nanargmax(z_NK @ [0.6, 0.4]))
    said = found.choices[0].model_extra["equipoise"]
    assert numbers(said["scores"]) == pytest.approx(z_NK[best], nan_ok=True)
    assert said["kl"] == pytest.approx(math.log(3) - 2 / 3, abs=1e-6)
    assert found.model_extra["equipoise"]["base_forwards"] == sum(r.base_forwards for r in drawn) - 2 * drawn[0].prompt_tokens


def test_completions_go_on_with_a_text(client, served):
    found = client.completions.create(model=served.lm.name, prompt="how do i make", max_tokens=4, seed=1)
    ids = served.lm.tokenizer("how do i make", add_special_tokens=False)["input_ids"]
    assert found.usage.prompt_tokens == len(ids)
    assert found.object == "text_completion"
    pieces = client.completions.create(model=served.lm.name, prompt="how do i make", max_tokens=4, seed=1, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == found.choices[0].text


def test_a_stop_string_ends_a_response(client, served):
    whole = client.chat.completions.create(**asked(max_tokens=30)).choices[0].message.content
    words = whole.split()
    stop = words[len(words) // 2]
    found = client.chat.completions.create(**asked(max_tokens=30, stop=[stop])).choices[0]
    assert found.message.content == whole[: whole.index(stop)]
    assert found.finish_reason == "stop"
    streamed = client.chat.completions.create(**asked(max_tokens=30, stop=stop), stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == found.message.content


def test_without_scores_nothing_is_scored(client):
    said = client.chat.completions.create(**asked(extra_body={"scores": False})).choices[0].model_extra["equipoise"]
    assert "scores" not in said


def test_temperature_zero_is_greedy(client):
    texts = {client.chat.completions.create(**asked(temperature=0, seed=seed)).choices[0].message.content for seed in (1, 2, 3)}
    assert len(texts) == 1


REFUSED = {
    "unknown model": ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "there are"),
    "unknown method": ({"extra_body": {"method": "magic"}}, openai.BadRequestError, "unknown_method", "'magic'"),
    "weights that don't sum to 1": ({"extra_body": {"weights": [0.5, 0.6]}}, openai.BadRequestError, None, "sum to 1.1, not 1"),
    "an unknown objective": ({"extra_body": {"weights": {"humor": 1}}}, openai.BadRequestError, None, "'humor'"),
    "a negative weight": ({"extra_body": {"weights": [1.5, -0.5]}}, openai.BadRequestError, "invalid_request", "weights"),
    "too few weights": ({"extra_body": {"weights": [1.0]}}, openai.BadRequestError, None, "1 weights"),
    "weights for the reference": (
        {"extra_body": {"weights": [1, 0], "method": "reference"}},
        openai.BadRequestError,
        None,
        "doesn't read weights",
    ),
    "both strengths": (
        {"extra_body": {"weights": [1, 0], "beta": 1, "kl_budget": 1}},
        openai.BadRequestError,
        None,
        "kl_budget and beta",
    ),
    "a budget out of reach": ({"extra_body": {"weights": [1, 0], "kl_budget": 999}}, openai.BadRequestError, None, "kl_budget=999"),
    "targets that can't be had": ({"extra_body": {"targets": "brief>=+99"}}, openai.BadRequestError, None, "nearest levels"),
    "targets that can't be read": ({"extra_body": {"targets": "brief"}}, openai.BadRequestError, None, "can't read"),
    "a prompt that is too long": (
        {"messages": [{"role": "user", "content": "a " * 100}]},
        openai.BadRequestError,
        "context_length_exceeded",
        "tokens",
    ),
    "an empty prompt": ({"messages": [{"role": "user", "content": " "}]}, openai.BadRequestError, "invalid_prompt", "empty"),
    "n too large": ({"n": 9}, openai.BadRequestError, "too_large", "of at most 8"),
    "too many candidates": ({"n": 8, "extra_body": {"targets": "brief>=keep"}}, openai.BadRequestError, None, "lower n"),
    "too many tokens": ({"max_tokens": 999}, openai.BadRequestError, "too_large", "of at most 48"),
    "a misspelt field": ({"extra_body": {"weigths": [1, 0]}}, openai.BadRequestError, "invalid_request", "weigths"),
    "what isn't served": ({"logprobs": True}, openai.BadRequestError, "invalid_request", "logprobs isn't served"),
    "greedy candidates": ({"temperature": 0, "extra_body": {"method": "best-of-3"}}, openai.BadRequestError, None, "temperature 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(client, case):
    changed, kind, code, said = REFUSED[case]
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**(asked() | changed))
    assert said in caught.value.message
    assert caught.value.code == code
    assert caught.value.type == "invalid_request_error"


def test_neutral_fields_are_accepted(client):
    client.chat.completions.create(**asked(top_p=1, presence_penalty=0, user="me", response_format={"type": "text"}, store=False))


def test_a_wrong_key(settings, make_service):
    with serving(make_service(), {}, key="secret") as address:
        right, wrong = (OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) for key in ("secret", "wrong"))
        assert right.chat.completions.create(**asked()).choices
        with pytest.raises(openai.AuthenticationError, match="wrong or missing"):
            wrong.chat.completions.create(**asked())
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        import urllib.request

        with urllib.request.urlopen(f"{address}/health") as answer:  # watchdogs need no key
            assert json.load(answer)["status"] == "ok"
