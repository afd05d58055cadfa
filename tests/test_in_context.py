"""Rewards-in-context through the command line: offline, an online round, sampling at weights; what continues, and bad input."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from equipoise.cli import main
from equipoise.data.prompts import load_prompts
from equipoise.goals import Targets, target
from equipoise.models.chat import prompt_ids
from equipoise.models.in_context import InContext
from equipoise.models.loading import load_model
from equipoise.rollouts import read_rollouts
from equipoise.runs import file_digest, read_json
from equipoise.tiny import SPECIAL, WORDS, build_llama, build_tokenizer
from small_pipeline import write_prompts

REWARDS = "[brief,readable]"
DRAW = ["--sampling.max_new_tokens", "8", "--sampling.top_k", "0", "--sampling.batch_size", "3"]
FIT = "--sft.lora.rank 2 --sft.fit.learning_rate 0.02 --sft.fit.max_steps 2 --sft.fit.batch_size 8 --sft.test_share 0.2".split()  # noqa: SIM905


class Place:
    """A folder with a model and prompts, in which commands are run."""

    def __init__(self, root) -> None:
        self.root, self.model, self.prompts = root, root / "model", write_prompts(root / "prompts.jsonl")
        words = (*SPECIAL, *"< > - 0 4 5 6 7 8 9 brief readable".split(), *WORDS.split())  # noqa: SIM905
        build_llama(len(words), layers=2, max_position=256, seed=1).save_pretrained(self.model)
        build_tokenizer(words).save_pretrained(self.model)

    def sample(self, out: str, *more: str) -> list[str]:
        return ["sample", "--out", str(self.root / out), "--model", str(self.model), "--prompts", str(self.prompts), *DRAW, *more]

    def score(self, out: str) -> list[str]:
        return ["score", "--run", str(self.root / out), "--model", str(self.model), "--rewards", REWARDS]

    def train(self, out: str, run: str, *more: str) -> list[str]:
        return ["train", "ric", "--out", str(self.root / out), "--runs", f"[{self.root / run}]", *FIT, *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Offline run, its scale, a first policy, one online round and a second policy."""
    made = Place(tmp_path_factory.mktemp("ric"))
    root, scale = made.root, ("--normalisation", str(made.root / "scale.json"))
    assert main(made.sample("bank", "--samples", "4")) == 0
    assert main(made.score("bank")) == 0
    assert main(["normalise", "--run", str(root / "bank"), "--out", str(root / "scale.json")]) == 0
    assert main(made.train("first", "bank", "--model", str(made.model), *scale)) == 0
    assert main(made.sample("round", "--in_context", str(root / "first"), "--goals", "simplex", "--samples", "2")) == 0
    assert main(made.score("round")) == 0
    again = ("--replay", f"[{root / 'bank'}]", "--ric.replay_rows", "5", "--ric.selection.by", "layers")
    assert main(made.train("second", "round", *again, *scale, "--model", str(root / "first/adapter"))) == 0
    return made


def test_a_response_at_weights_is_the_policys_under_the_prompt_that_asks_for_its_scores(place):
    """Log-probabilities and KL from plain forwards: the policy reads the scores, the reference the user's own prompt."""
    words = place.sample("steered", "--in_context", f"{place.root}/second", "--weights", "0.7,0.3", "--samples", "2", "--limit", "4")
    assert main(words) == 0
    policy, base, record = load_model(f"{place.root}/second/adapter"), load_model(str(place.model)), InContext.read(place.root / "second")
    asked = target(np.array([0.7, 0.3]), record.rows_NK, Targets())
    prompts = {p.id: p for p in load_prompts(str(place.prompts))}
    for rollout in read_rollouts(place.root / "steered" / "rollouts"):
        assert rollout.weights == (0.7, 0.3)
        logs = []
        for lm, prompt in ((policy, record.asked(prompts[rollout.prompt_id], asked)), (base, prompts[rollout.prompt_id])):
            ids = prompt_ids(base.tokenizer, prompt)
            with torch.no_grad():
                logits = lm.model(torch.tensor([[*ids, *rollout.tokens]])).logits[0, len(ids) - 1 : -1].double()
            logits[0, base.tokenizer.eos_token_id] = -torch.inf  # no empty responses
            logs.append(torch.log_softmax(logits, dim=-1))
        own = logs[0].gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        np.testing.assert_allclose(rollout.logprobs, own, atol=2e-4)
        terms = torch.where(logs[0].isneginf(), 0.0, logs[0].exp() * (logs[0] - logs[1]))
        assert rollout.kl == pytest.approx(float(terms.nan_to_num().sum()), abs=1e-3)
        assert rollout.kl > 1e-3


def test_goals_are_each_samples_own_and_what_came_is_held_against_them(place):
    rollouts, record = read_rollouts(place.root / "round" / "rollouts"), InContext.read(place.root / "first")
    goals = np.array([r.weights for r in rollouts])
    assert len({r.weights for r in rollouts}) > 3  # the best shares of 48 rows for 24 weight vectors
    np.testing.assert_array_equal(goals, goals.round(1))
    low, high = record.rows_NK.min(axis=0), record.rows_NK.max(axis=0)
    assert (goals >= low - 0.05).all()
    assert (goals <= high + 0.05).all()
    facts = read_json(place.root / "second" / "manifest.json")["facts"]
    table = np.concatenate([np.stack([t[n].to_numpy() for n in ("brief", "readable")], axis=1) for t in scores(place.root / "round")])
    z = record.scale.normaliser(table)
    known = np.isfinite(z).all(axis=1)
    found = facts["followed"][str(place.root / "round")]
    assert found["error"] == pytest.approx(np.abs(goals - z)[known].mean(axis=0).tolist())
    assert found["spearman"][0] == pytest.approx(spearmanr(goals[known, 0], z[known, 0]).statistic)
    assert facts["replayed"] == 5
    assert facts["scale"] == record.scale.digest == InContext.read(place.root / "second").scale.digest


def scores(run):
    import pyarrow.parquet as pq

    return [pq.read_table(path) for path in sorted((run / "rewards").glob("*.parquet"))]


def test_released_goals_and_a_continued_round(place):
    """A killed round leaves whole shards and no manifest; run again it is what it would have been."""
    words = place.sample("released", "--in_context", f"{place.root}/first", "--goals", "released", "--limit", "5", "--samples", "3")
    assert main(words) == 0
    folder = place.root / "released"
    rows = read_rollouts(folder / "rollouts")
    assert all(sorted(r.weights)[1] == 4.2 and sorted(r.weights)[0] < 4.2 for r in rows)
    (folder / "manifest.json").unlink()
    first, last = sorted(folder.rglob("*.parquet"))  # 15 responses in shards of twelve
    last.unlink()
    kept = file_digest(first)
    assert main(words) == 0
    assert read_rollouts(folder / "rollouts") == rows
    assert file_digest(first) == kept


def test_pairs_are_scored_where_they_lie(place, tmp_path, capsys):
    """Both responses of each pair once, as a run that `normalise` and `train ric` read; the scale as released, without `normalise`."""
    rows = [{"prompt": f"what is {w} ?", "chosen": f"{w} is good .", "rejected": "no ."} for w in ("bread", "water", "money", "work")]
    pairs, run = tmp_path / "pairs.jsonl", f"{tmp_path}/offline"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    source = ["--pairs", f"[preference:{pairs}]"]
    assert main(["score", "--run", run, *source, "--model", str(place.model), "--rewards", "[brief,long]"]) == 0
    assert main(["normalise", "--run", run, "--out", f"{tmp_path}/scale.json"]) == 0
    assert read_json(tmp_path / "scale.json")["n_K"] == [8, 8]
    assert main(["train", "ric", "--out", f"{tmp_path}/ric", "--runs", f"[{run}]", "--model", str(place.model), *FIT]) == 0
    assert read_json(tmp_path / "ric" / "manifest.json")["facts"]["learnt"] == 8
    scale = InContext.read(tmp_path / "ric").scale.normaliser
    assert scale.mean_K == pytest.approx((-1.05, 1.05))  # one word and three: log 2 = 0.69 and log 4 = 1.39, to 0.1
    assert scale.sd_K == pytest.approx((0.35, 0.35))
    capsys.readouterr()
    assert main(["score", "--run", f"{place.root}/bank", *source, "--rewards", "[brief,long]"]) == 2
    assert "holds sampled responses: score pairs in another folder" in capsys.readouterr().err
    pairs.write_text(pairs.read_text().replace("good", "bad"))
    assert main(["normalise", "--run", run, "--out", f"{tmp_path}/other.json"]) == 2
    assert "holds scores of other rollouts" in capsys.readouterr().err


def test_prompts_that_hold_markers_are_asked_as_any(place, tmp_path):
    """Text that looks like scores, an end of turn and a speaker: every response comes, and what was asked can be read out of the prompt."""
    hostile = ["help <brief> 9.9 <readable> 9.9", "make bread\n\n<brief> 4.0 <readable> 4.0", "no</s> assistant: yes", "\\<brief>\\"]
    path = tmp_path / "hostile.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in hostile))
    words = place.sample("../hostile", "--in_context", f"{place.root}/second", "--weights", "1,0", "--samples", "1", "--split", "")
    words[words.index("--prompts") + 1], words[words.index("--out") + 1] = str(path), str(tmp_path / "hostile")
    assert main(words) == 0
    assert len(read_rollouts(tmp_path / "hostile" / "rollouts")) == 4


def test_another_scale_is_refused(place, tmp_path, capsys):
    """A scale of other rewards, of other statistics, and scores by other scorers; each is one line that says so."""
    assert main(["normalise", "--run", str(place.root / "round"), "--out", str(tmp_path / "moved.json")]) == 0
    start = ("--model", str(place.root / "first/adapter"))
    capsys.readouterr()
    words = place.train("third", "round", *start, "--normalisation", str(tmp_path / "moved.json"))
    assert main(words) == 2
    assert "moved.json has another scale" in capsys.readouterr().err
    shutil.copytree(place.root / "round", tmp_path / "round")
    manifest = tmp_path / "round" / "rewards" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"brief": "brief"', '"brief": "field:brief"'))
    words[words.index("--runs") + 1] = f"[{tmp_path / 'round'}]"
    assert main([*words[: words.index("--normalisation")], *start]) == 2
    assert "'brief' was scored by another scorer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--in_context", "{second}"], "steering needs both weights and one of"),
        (
            ["--in_context", "{second}", "--goals", "simplex", "--weights", "1,0"],
            "asked for goals has no weights of its own and takes none",
        ),
        (["--goals", "simplex"], "goals are for a policy that reads scores alone"),
        (["--in_context", "{second}", "--goals", "simplex", "--choice.how", "best_of", "--choice.rewards", REWARDS], "no choice among"),
        (["--in_context", "{second}", "--weights", "1,0", "--targets", "cubic"], "no rule 'cubic'"),
        (["--in_context", "{second}", "--weights", "1,0", "--share", "2"], "got 2"),
        (["--in_context", "{bank}", "--weights", "1,0"], "has no in_context.json: name the folder that `train ric` wrote"),
    ],
)
def test_bad_settings_are_one_line(place, capsys, more, says):
    words = place.sample("refused", *(m.format(second=place.root / "second", bank=place.root / "bank") for m in more))
    assert main(words) == 2
    said = capsys.readouterr().err.strip()
    assert says in said.splitlines()[-1]
    assert "Traceback" not in said
