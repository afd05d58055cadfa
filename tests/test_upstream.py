"""Sampling through a chat server, over real HTTP: what is asked and kept, choices and palettes over it, and servers that behave badly."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.special import softmax

from chat_server import Server, completion, serving
from conftest import prompt
from equipoise.cli import main
from equipoise.decoding.choosing import ChoosingSampler, WeightedRewards
from equipoise.decoding.palette import PaletteSampler
from equipoise.decoding.upstream import UpstreamSampler
from equipoise.models.chat import whole_sentences_of
from equipoise.models.engines import Calls, HTTPEngine
from equipoise.rewards import load_rewards
from equipoise.rewards.cache import Store
from equipoise.rollouts import make_requests, read_rollouts
from equipoise.runs import read_json
from equipoise.types import UserError
from small_pipeline import write_prompts

pytestmark = pytest.mark.usefixtures("apart")

CALLS = Calls(max_tokens=9, temperature=1.0, retries=2, timeout=5.0, concurrency=3)


class Words:
    """A server whose law is uniform over one to six words, drawn by the seed of the request."""

    def __init__(self, **broken) -> None:
        self.server: Server | None = None
        self.broken = broken
        """Number of the request -> what it gets instead."""

    @staticmethod
    def text(seed: int) -> str:
        return " ".join(["bread"] * (1 + seed % 6))

    def __call__(self, text: str, number: int):
        if str(number) in self.broken:
            return self.broken[str(number)]
        said = self.text(self.server.requests[number]["body"]["seed"])
        usage = {"prompt_tokens": 11, "completion_tokens": len(said.split()), "total_tokens": 0}
        return 200, {}, completion(said, usage=usage)


@pytest.fixture
def words_server():
    answer = Words()
    with serving(answer) as server:
        answer.server = server
        yield server


def sampler(server: Server, **settings) -> UpstreamSampler:
    return UpstreamSampler(engine=HTTPEngine("m", server.url, CALLS), **settings)


def requests(count: int, samples: int = 1, weights=None):
    return make_requests([prompt(f"p{i}", "abcdefgh"[i]) for i in range(count)], samples, 0, weights)


def test_what_a_server_draws_is_a_rollout_of_the_reference(words_server):
    asked = requests(2, 3)
    got = sampler(words_server)(asked)
    bodies = {b["seed"]: b for b in (r["body"] for r in words_server.requests)}
    for request, rollout in zip(asked, got, strict=True):
        body = bodies[request.seed % 2**31]
        assert body.keys() == {"model", "messages", "max_tokens", "temperature", "seed"}  # no `n`, which many servers ignore
        assert (body["max_tokens"], body["temperature"]) == (9, 1.0)
        assert body["messages"] == [{"role": "user", "content": request.prompt.text}]
        count = 1 + body["seed"] % 6
        assert rollout.text == " ".join(["bread"] * count)
        assert (rollout.id, rollout.prompt_id, rollout.seed, rollout.weights) == (request.id, request.prompt.id, request.seed, None)
        assert (rollout.tokens, rollout.logprobs, rollout.ref_logprobs, rollout.kl, rollout.kl_floor) == ((), (), (), 0.0, 0.0)
        assert (rollout.length, rollout.base_forwards, rollout.finish_reason) == (count, 11 + count, "stop")


def test_a_response_that_was_cut_ends_with_its_last_whole_sentence():
    with serving(lambda text, n: (200, {}, completion(" One. Two costs 3.50! And thr", finish="length"))) as server:
        (cut,) = sampler(server)(requests(1))
        (whole,) = sampler(server, whole_sentences=False)(requests(1))
    assert (cut.text, cut.finish_reason) == ("One. Two costs 3.50!", "length")
    assert whole.text == "One. Two costs 3.50! And thr"
    assert (cut.text_tokens, cut.base_forwards, cut.length) == (0, 0, 0)  # it counts nothing


@pytest.mark.parametrize(
    ("text", "kept"),
    [("Yes! No", "Yes!"), ("He said (no.) and", "He said (no.)"), ("1. Bread 2. Wa", "1. Bread 2. Wa"), ("a.b c", "a.b c"), ("", "")],
)
def test_whole_sentences_of_a_text(text, kept):
    """A number's full stop ends none, nor does one within a word."""
    assert whole_sentences_of(text) == kept


def by_hand(seeds_n) -> np.ndarray:
    """`brief` of what the server says: -log(1 + words)."""
    return np.array([-math.log(2 + seed % 6) for seed in seeds_n])


def candidates(server: Server, text: str) -> list[int]:
    return [r["body"]["seed"] for r in server.requests if r["body"]["messages"][-1]["content"] == text]


def test_best_of_n_over_a_server(words_server):
    asked, rewards = requests(3, weights=(1.0, 0.0)), WeightedRewards(rewards=load_rewards(["brief", "diverse"], None))
    got = ChoosingSampler(inner=sampler(words_server), rewards=rewards, n=4)(asked)
    assert len(words_server.requests) == 12
    for request, rollout in zip(asked, got, strict=True):
        seeds = candidates(words_server, request.prompt.text)
        assert -math.log(1 + len(rollout.text.split())) == pytest.approx(by_hand(seeds).max())
        assert rollout.base_forwards == sum(11 + 1 + seed % 6 for seed in seeds)
        assert rollout.kl == pytest.approx(math.log(4) - 3 / 4)
        assert (rollout.reward_calls, rollout.weights, rollout.id) == (4, (1.0, 0.0), request.id)


def test_resampling_over_a_server_prices_its_draw(words_server):
    """KL of the draw from the n candidates: sum_j p_j log(n p_j); the same request draws the same, whatever else is asked."""
    asked, rewards = requests(3, weights=(1.0,)), WeightedRewards(rewards=load_rewards(["brief"], None))
    chooser = ChoosingSampler(inner=sampler(words_server), rewards=rewards, n=3, beta=0.4)
    got = chooser(asked)
    for request, rollout in zip(asked, got, strict=True):
        p = softmax(by_hand(candidates(words_server, request.prompt.text)) / 0.4)
        assert rollout.kl == pytest.approx(float((p * np.log(3 * p)).sum()))
    assert chooser(asked[1:2]) == got[1:2]


def test_a_palette_over_a_server(words_server):
    """Multipliers of 0 draw any candidate for no nats; large ones the briefest, at log n where it is alone."""
    asked, rewards = requests(4), load_rewards(["brief"], None)
    free = PaletteSampler(sampler(words_server), rewards, np.zeros(1), 3)(asked)
    assert [r.kl for r in free] == [0.0] * 4
    dear = PaletteSampler(sampler(words_server), rewards, np.array([500.0]), 3)(asked)
    for request, rollout in zip(asked, dear, strict=True):
        score = by_hand(candidates(words_server, request.prompt.text)[:3])
        best = np.isclose(score, score.max()).sum()
        assert -math.log(1 + len(rollout.text.split())) == pytest.approx(score.max())
        assert rollout.kl == pytest.approx(math.log(3 / best), abs=1e-6)


# --- servers that behave badly


def test_busy_dropped_and_late_replies_are_asked_for_again():
    answer = Words(**{"0": (429, {"Retry-After": "0.2"}, "{}"), "1": None, "2": (503, {"Retry-After": "0.01"}, "later")})
    with serving(answer) as server:
        answer.server = server
        got = sampler(server)(requests(3))
    assert len(server.requests) == 6
    assert [r.text for r in got] == [Words.text(r.seed % 2**31) for r in requests(3)]
    first = server.requests[0]["body"]["seed"]
    waited = next(r["time"] for r in server.requests[1:] if r["body"]["seed"] == first) - server.requests[0]["time"]
    assert waited >= 0.2


@pytest.mark.parametrize("body", ["no json", '{"choices": []}', completion(None), '{"choices": [{"message": 3}]}'])
def test_a_malformed_reply_is_named_and_the_others_are_kept(tmp_path, body):
    answer = Words(**{"2": (200, {}, body)})
    with serving(answer) as server:
        answer.server = server
        asked, one = requests(2, 3), UpstreamSampler(engine=HTTPEngine("m", server.url, CALLS), store=Store(tmp_path))
        with pytest.raises(UserError, match=r"m at .* sent .*\(prompt 'p\d'\); 5 of 6 responses came and are kept: mend it and run again"):
            one(asked)
        assert len(server.requests) == 6
        again = UpstreamSampler(engine=HTTPEngine("m", server.url, CALLS), store=Store(tmp_path))(asked)
        assert len(server.requests) == 7, "the one that failed"
        assert server.requests[6]["body"]["seed"] == server.requests[2]["body"]["seed"]
        assert again == one(asked)
        assert len(server.requests) == 7
    assert [(r.text, r.text_tokens) for r in again] == [(Words.text(r.seed % 2**31), 1 + r.seed % 2**31 % 6) for r in asked]
    other = UpstreamSampler(engine=HTTPEngine("m", server.url, Calls(max_tokens=8, temperature=1.0, retries=0)), store=Store(tmp_path))
    with pytest.raises(UserError, match="could not be reached"):
        other(asked)  # other settings, other replies


def test_a_refused_key_ends_it_at_once():
    with serving(lambda text, n: (401, {}, '{"error": {"message": "no"}}')) as server:
        with pytest.raises(UserError, match=r"set EQUIPOISE_API_KEY \(prompt 'p0'\); 0 of 8 responses came and are lost with it"):
            sampler(server)(requests(8))
        assert len(server.requests) <= 3


def test_a_server_without_draws_is_told_of_once(capsys):
    """It ignores the seed, and would ignore `n`: all candidates are the same."""
    with serving(lambda text, n: f"always {text}") as server:
        one = sampler(server)
        one(requests(4))
        assert capsys.readouterr().err == ""
        one(requests(2, 3))
        assert "m answers alike whatever the seed" in capsys.readouterr().err
        one(requests(2, 3))
        assert capsys.readouterr().err == ""


def test_what_a_server_cannot_do_is_refused(words_server):
    from dataclasses import replace

    (plain,) = requests(1)
    for odd in (replace(plain, weights=(1.0,)), replace(plain, given=(3,)), replace(plain, most_tokens=2)):
        with pytest.raises(UserError, match="request 'p0/0': a server takes a prompt, and neither weights"):
            sampler(words_server)([odd])
    assert words_server.requests == []


# --- the stage


def command(out, server: Server, prompts, *more: str) -> list[str]:
    words = f"sample --out {out} --prompts {prompts} --samples 4 --sampling.max_new_tokens 9 --sampling.batch_size 2"
    return [*words.split(), "--upstream.source", f"m@{server.url}", *more]


def test_sample_score_palette_and_apply_over_a_server(words_server, tmp_path):
    """Nothing but prompts and an address: the bank, what an ask costs, and held-out responses that were chosen to meet it."""
    prompts, run = write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "run"
    assert main(command(run, words_server, prompts)) == 0
    bank = read_rollouts(run / "rollouts")
    assert len(bank) == len(words_server.requests) == 4 * len({r.prompt_id for r in bank})
    facts = read_json(run / "manifest.json")["facts"]
    assert facts["tokens"] == sum(len(r.text.split()) for r in bank)
    assert (facts["model_revision"], facts["rollouts"]) == (None, len(bank))
    assert read_json(run / "manifest.json")["config"]["upstream"] == {"source": f"m@{words_server.url}"}
    assert main(["score", "--run", str(run), "--rewards", "[brief,diverse]"]) == 0
    assert main(["log", "--run", str(run), "--n_boot", "50"]) == 0
    assert read_json(run / "log" / "overall.json")["tokens_per_response"] == facts["tokens"] / len(bank)
    quoted = ["palette", "--bank", str(run), "--ask", "brief>=+0.5sd", "--n_boot", "0", "--out", str(tmp_path / "palette")]
    assert main(quoted) == 0
    palette, before = read_json(tmp_path / "palette" / "palette.json"), len(words_server.requests)
    assert palette["feasible"]
    assert palette["cost"]["backbone_tokens"] == pytest.approx(4 * np.mean([r.base_forwards for r in bank]))
    apply = ["palette", "apply", "--palettes", f"[{tmp_path}/palette]", "--prompts", str(prompts), "--n_boot", "50"]
    assert main([*apply, "--responses", "3", "--out", str(tmp_path / "applied")]) == 0
    held_out = read_rollouts(tmp_path / "applied" / "rollouts")
    assert len(held_out) == len(words_server.requests) - before
    assert not {r.prompt_id for r in held_out} & {r.prompt_id for r in bank}
    assert len(held_out) == 4 * 3 * len({r.prompt_id for r in held_out})
    assert not (tmp_path / "cache" / "models").exists(), "no model was loaded"


def test_a_killed_run_asks_for_what_is_missing_alone(words_server, tmp_path):
    prompts, run = write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "run"
    best = ["--choice.how", "best_of", "--choice.n", "3", "--choice.rewards", "[brief,diverse]", "--weights", "1,0", "--limit", "2"]
    words = command(run, words_server, prompts, *best)
    assert main(words) == 0
    rollouts = read_rollouts(run / "rollouts")
    assert len(words_server.requests) == 24
    assert {r.weights for r in rollouts} == {(1.0, 0.0)}
    assert all(r.kl == pytest.approx(math.log(3) - 2 / 3) for r in rollouts)
    (run / "manifest.json").unlink()
    (run / "rollouts" / "part-00000.parquet").unlink()
    assert main([*words, "--upstream.timeout", "7"]) == 0
    assert len(words_server.requests) == 24
    assert read_rollouts(run / "rollouts") == rollouts


def test_values_need_a_models_own_tokens(words_server, tmp_path, capsys):
    prompts, run = write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "run"
    assert main(command(run, words_server, prompts, "--limit", "2")) == 0
    assert main(["score", "--run", str(run), "--rewards", "[brief]"]) == 0
    assert main(["train", "value", "--run", str(run), "--out", str(tmp_path / "values")]) == 2
    assert "whose tokens aren't known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--soup", "[x=A]", "--weights", "1"], "soup steers tokens, and m@"),
        (["--choice.how", "beam"], "choice.how=beam reads a model's tokens, and m@"),
        (["--sampling.top_k", "5"], "sampling.top_k isn't told to a server, whose own law counts: leave it at 40"),
        (["--upstream.source", "local:smollm2"], "local:smollm2 is no server: name it as the model"),
        (["--upstream.source", "m@nowhere"], "write the address of 'm@nowhere' with http://"),
        (["--upstream.source", "gpt"], "https://api.openai.com/v1 needs a key: set OPENAI_API_KEY"),
        (["--upstream.retries", "-1"], "retries must be at least 0, got -1"),
        (["--sampling.greedy", "true"], "greedy responses to one prompt are all the same"),
        (
            ["--sampling.greedy", "true", "--samples", "1", "--choice.how", "best_of", "--choice.rewards", "[brief]", "--weights", "1"],
            "greedy candidates are all the same",
        ),
    ],
)
def test_bad_settings_are_one_line(words_server, tmp_path, capsys, more, says):
    assert main(command(tmp_path / "run", words_server, write_prompts(tmp_path / "prompts.jsonl"), *more)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("equipoise: ")]
    assert len(said) == 1
    assert says in said[0]
    assert words_server.requests == []


def test_runs_of_a_model_say_nothing_of_servers(tiny_folder, tmp_path):
    """So that runs of older versions are continued."""
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    words = f"sample --out {tmp_path}/run --model {tiny_folder} --prompts {prompts} --limit 1 --samples 1 --sampling.max_new_tokens 2"
    assert main(words.split()) == 0
    assert "upstream" not in json.loads((tmp_path / "run" / "started.json").read_text())["config"]
