"""Our rewards in TRL's trainers: what they are told, that the advantages are ours, where RLOO ends, and that a stopped run goes on."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from conftest import prompt
from equipoise.models.chat import prompt_ids
from equipoise.models.lora import Lora
from equipoise.objectives import Normaliser
from equipoise.runs import Manifest, read_json
from equipoise.training import on_policy, ppo
from equipoise.training.trl_policy import Config, Told, make_trainer, rows_of, told, train
from equipoise.types import UserError
from training.on_policy_runs import PLAIN, SMALL, Failing, Table, law, optimum, prompts_of

NAN = math.nan
WEIGHTS = (0.3, 0.7)
CONFIG = Config(
    **{"weights": "0.3,0.7", "beta": 0.7, "steps": 4, "prompts": 2, "samples": 3, "batch_size": 6, "max_new_tokens": SMALL.horizon},
    **{"lora": Lora(rank=8, alpha=16, dropout=0.0), "learning_rate": 0.01, "checkpoint_every": 2},
)


class Sometimes(Table):
    """Scores no response that begins with the token b."""

    def __call__(self, prompts, responses):
        return np.where([text.startswith("b") for text in responses], NAN, super().__call__(prompts, responses))


def own_lm():
    """The world's model, for adapters to be put into."""
    return replace(SMALL.lm, model=copy.deepcopy(SMALL.lm.model))


def test_what_lacks_an_objective_of_weight_is_unscored():
    """TRL would count the NaN of the second response as 0 and keep it; without weight the objective doesn't matter."""
    z_NK = np.array([[1.0, 2.0], [NAN, 3.0], [4.0, 5.0]])
    assert told(z_NK, (0.5, 0.5)) == [[1.0, None, 4.0], [2.0, None, 5.0]]
    assert told(z_NK, (0.0, 1.0)) == [[1.0, None, 4.0], [2.0, 3.0, 5.0]]


def test_functions_have_the_rewards_names_and_score_once():
    """(0 - 1) / 2 and so on of the numbers of words, and of half that; TRL gives messages where the prompt is a conversation."""

    class Words:
        def __init__(self, name: str, factor: float) -> None:
            self.name, self.factor, self.calls = name, factor, 0

        def __call__(self, prompts, responses):
            assert [p.text for p in prompts] == ["how are you", "why", "how are you"]
            self.calls += 1
            return self.factor * np.array([len(text.split()) for text in responses], dtype=float)

    rewards = [Words("x", 1.0), Words("y", 0.5)]
    scale = Normaliser(objectives=("x", "y"), mean_K=(1.0, 0.0), sd_K=(2.0, 0.25))
    functions = Told(rewards, [prompt("p", "how are you"), prompt("q", "why")], scale, WEIGHTS).functions()
    assert [function.__name__ for function in functions] == ["x", "y"]
    given = {"prompts": ["P", "Q", "P"], "id": ["p", "q", "p"], "completion_ids": [[1], [2], [3]], "trainer_state": None}
    for completions in (["", "a b c", "a"], [[{"role": "assistant", "content": text}] for text in ("", "a b c", "a")]):
        assert functions[0](completions=completions, **given) == [-0.5, 1.0, 0.0]
        assert functions[1](completions=completions, **given) == [0.0, 6.0, 2.0]
    assert [reward.calls for reward in rewards] == [1, 1]


@pytest.mark.parametrize(
    "template", [None, "{{ '</s>' }}{% for m in messages %}{{ m['content'] }}{% endfor %}{{ ' b' if add_generation_prompt }}"]
)
def test_trl_reads_the_tokens_that_we_read(template):
    tokenizer = copy.deepcopy(SMALL.tokenizer)
    tokenizer.chat_template = template
    asked = prompts_of()
    rows = [row["prompt"] for row in rows_of(tokenizer, asked)]
    if template:
        found = tokenizer.apply_chat_template(conversation=rows, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    else:
        found = tokenizer(text=rows)["input_ids"]
    assert [list(ids) for ids in found] == [prompt_ids(tokenizer, p) for p in asked]


def test_trls_advantages_are_ours(tmp_path):
    """Of RLOO with a policy that has left the reference, and one objective that is unscored now and then; log-ratios by plain forwards."""
    asked = prompts_of()
    rewards = [Table("x"), Sometimes("y")]
    config = replace(CONFIG, samples=6, batch_size=12)
    trainer = make_trainer(own_lm(), config, Told(rewards, asked, PLAIN, WEIGHTS).functions(), asked, str(tmp_path))
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    trainer.model.train()
    found = trainer._generate_and_score_completions([row for row in rows_of(SMALL.tokenizer, asked) for _ in range(6)])
    ids = [row[mask.bool()].tolist() for row, mask in zip(found["completion_ids"], found["completion_mask"], strict=True)]
    texts, places = SMALL.tokenizer.batch_decode(ids, skip_special_tokens=True), [SMALL.said.index(tuple(row)) for row in ids]
    return_PG = []
    for p, one in enumerate(asked):
        has_S, ref_S = law(SMALL, trainer.model, one), law(SMALL, SMALL.lm.model, one)
        own = slice(6 * p, 6 * p + 6)
        z_GK = np.array([reward([one] * 6, texts[own]) for reward in rewards]).T
        logratio_G = np.log(has_S / ref_S)[places[own]]
        assert np.abs(logratio_G).max() > 0.1
        return_PG.append(z_GK @ WEIGHTS - 0.7 * logratio_G)
    assert 0 < np.isnan(return_PG).sum() < 10
    np.testing.assert_allclose(found["advantages"].numpy(), ppo.leave_one_out(np.array(return_PG)).flatten(), atol=1e-4)


@pytest.mark.parametrize("algorithm", ["grpo", "gdpo"])
def test_those_of_groups_are_ours_and_a_step_is_taken(algorithm, tmp_path):
    """s - mean s of each group of six is 5/6 of what RLOO has; GDPO is `ppo.decoupled`; neither has a KL."""
    asked, rewards = prompts_of(), [Table("x"), Table("y")]
    config = replace(CONFIG, algorithm=algorithm, beta=0.0, samples=6, batch_size=12, steps=2)
    trainer = make_trainer(own_lm(), config, Told(rewards, asked, PLAIN, WEIGHTS).functions(), asked, str(tmp_path))
    trainer.model.train()
    found = trainer._generate_and_score_completions([row for row in rows_of(SMALL.tokenizer, asked) for _ in range(6)])
    ids = [row[mask.bool()].tolist() for row, mask in zip(found["completion_ids"], found["completion_mask"], strict=True)]
    texts = SMALL.tokenizer.batch_decode(ids, skip_special_tokens=True)
    z_PGK = np.array([[reward([one] * 6, texts[6 * p : 6 * p + 6]) for reward in rewards] for p, one in enumerate(asked)]).swapaxes(1, 2)
    ours_PG = ppo.leave_one_out(z_PGK @ WEIGHTS) * 5 / 6 if algorithm == "grpo" else ppo.decoupled(z_PGK, np.array([WEIGHTS] * 2))
    np.testing.assert_allclose(found["advantages"].numpy(), ours_PG.flatten(), atol=1e-4)
    trainer.train()
    assert any(parameter.abs().max() > 0 for name, parameter in trainer.model.named_parameters() if "lora_B" in name)


def test_rloo_by_trl_reaches_the_closed_form(tmp_path):
    """50 steps of 200 responses to each of two prompts at beta 1."""
    config = replace(CONFIG, beta=1.0, steps=50, samples=200, batch_size=400, learning_rate=0.02, checkpoint_every=100)
    asked, loop = prompts_of(), on_policy.Config(weights="0.3,0.7", beta=1.0)
    trainer = make_trainer(own_lm(), config, Told([Table("x"), Table("y")], asked, PLAIN, WEIGHTS).functions(), asked, str(tmp_path))

    def far() -> float:
        trainer.model.eval()
        return max(np.abs(law(SMALL, trainer.model, one) - optimum(SMALL, one, WEIGHTS, loop)).sum() / 2 for one in asked)

    assert far() > 0.15
    trainer.train()
    assert far() < 0.05


def run_of(folder) -> Manifest:
    return Manifest(folder, "train trl", {}, {})


def test_a_run_that_stopped_ends_with_the_same_bytes(tmp_path):
    """Stopped in the third of four steps, with a checkpoint after the second."""
    source = tmp_path / "source"
    SMALL.lm.model.save_pretrained(source)
    SMALL.tokenizer.save_pretrained(source)
    for name in ("whole", "stopped"):
        rewards = [Table("x"), Failing("y") if name == "stopped" else Table("y")]
        if name == "stopped":
            with pytest.raises(UserError, match=r"reward 'y' failed on rollout .*out of memory"):
                train(prompts_of(), rewards, PLAIN, str(source), CONFIG, run_of(tmp_path / name))
            rewards[1].calls = 100
        train(prompts_of(), rewards, PLAIN, str(source), CONFIG, run_of(tmp_path / name))
    whole, stopped = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped
    card = read_json(tmp_path / "whole" / "card.json")
    assert (card["method"], card["weights"], card["beta"]) == ("rloo by TRL", [0.3, 0.7], 0.7)
    history = read_json(tmp_path / "whole" / "history.json")
    assert [entry["step"] for entry in history] == [1, 2, 3, 4]
    for entry in history:
        assert entry["reward"] == pytest.approx(0.3 * entry["rewards/x/mean"] + 0.7 * entry["rewards/y/mean"], abs=1e-5)
    assert not (tmp_path / "whole" / "checkpoints").exists()
    other = Normaliser(objectives=("y", "x"), mean_K=(0.0, 0.0), sd_K=(1.0, 1.0))
    with pytest.raises(UserError, match=r"the statistics are of y, x, and the rewards are x, y"):
        train(prompts_of(), [Table("x"), Table("y")], other, str(source), CONFIG, run_of(tmp_path / "other"))
    with pytest.raises(UserError, match="a round takes 3 prompts, and there are 2"):
        train(
            prompts_of(), [Table("x"), Table("y")], PLAIN, str(source), replace(CONFIG, prompts=3, batch_size=9), run_of(tmp_path / "few")
        )


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"algorithm": "ppo"}, "the algorithm is one of rloo, grpo, gdpo, not 'ppo'"),
        ({"algorithm": "grpo"}, "beta 0.7: the KL of TRL's GRPO is a loss whose gradient isn't the KL's, so beta is 0"),
        ({"algorithm": "gdpo"}, "beta is 0; rloo, or `train ppo --ppo.advantage grpo`"),
        ({"weights": ""}, "weights are empty"),
        ({"batch_size": 4}, "batch_size divide prompts times samples .* got prompts 2, samples 3, batch_size 4"),
        ({"samples": 1, "batch_size": 2}, "samples 2"),
        ({"reuse": 3}, "reuse divide checkpoint_every"),
        ({"lora": Lora(rank=0)}, "lora.rank 0: of whole weights TRL loads the reference from the disk"),
        ({"clip": 0.0}, "learning_rate and clip be positive"),
    ],
)
def test_settings_are_checked(unchecked, bad, says):
    with pytest.raises(UserError, match=says):
        replace(CONFIG, **bad)
