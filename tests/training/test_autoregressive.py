"""Autoregressive rewards: losses by hand, tiny models trained to their closed forms, conditioning by row, runs that are killed."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax

from conftest import FOLDER_WORDS, TINY_WORDS, build_llama, prompt
from equipoise.cli import main
from equipoise.data.labelled import write_labelled
from equipoise.decoding.reward_guided import reward_guide
from equipoise.models.chat import prompt_ids
from equipoise.models.completions import Completions, completion_batch, completions_of
from equipoise.models.generation import Sampling, generate
from equipoise.models.loading import LanguageModel, load_model
from equipoise.models.lora import Lora, WeightedLora, add_lora, merge_lora
from equipoise.models.weighted_lora import WeightedLinear, add_weighted_lora, dense_update
from equipoise.rollouts import read_rollouts
from equipoise.runs import read_json, stage
from equipoise.training import autoregressive
from equipoise.training.autoregressive import (
    Config,
    drawn_weights,
    gaps,
    label_shares,
    make_loss,
    objective_losses,
    reward_sums,
)
from equipoise.training.completion_rows import Row, collator
from equipoise.training.fit import FitConfig, fit
from equipoise.types import LabelledPair, LossOutput, Request, UserError
from training.children import child_runner, dying

NAN = math.nan
TOKENS = tuple(range(len(TINY_WORDS)))
PROMPTS = (prompt("p", "a b c"), prompt("q", "d"), prompt("r", "b b a ."))


def fresh(lm: LanguageModel) -> LanguageModel:
    """The same model in tensors of its own, since training changes them."""
    return replace(lm, model=build_llama(len(TINY_WORDS), layers=3, max_position=64, seed=0))


def stirred(lm: LanguageModel, scale: float = 0.4) -> LanguageModel:
    made = add_weighted_lora(lm, WeightedLora(shared_rank=2, rank=3, dropout=0.0), ("x", "y"), seed=1)
    generator = torch.Generator().manual_seed(5)
    for module in made.model.modules():
        if isinstance(module, WeightedLinear):
            module.up_Or.data = scale * torch.randn(module.up_Or.shape, generator=generator)
    return made


ROWS = [
    Completions((3, 4, 5), ((6, 2), (4, 4, 7, 2))),
    Completions((5,), ((3, 3, 2), (7,))),
    Completions((6, 6, 3, 4), ((4, 2), (5, 5, 5))),
]
LABELS = [(1.0, -1.0), (0.0, 1.0), (NAN, -1.0)]
WEIGHTS = [(0.3, 0.7), (1.0, 0.0), (0.25, 0.75)]


# --- the arithmetic


def test_losses_by_hand():
    """beta d = 2 for the first pair: log(1 + e^-2) where the first is better, log(1 + e^2) where the second is."""
    found = objective_losses(torch.tensor([4.0, -2.0]), torch.tensor([[1.0, -1.0, 0.0], [NAN, -1.0, 1.0]]), 0.5)
    expected = [[math.log(1 + math.exp(-2)), math.log(1 + math.exp(2)), 0], [0, math.log(1 + math.exp(-1)), math.log(1 + math.e)]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_missing_labels_have_no_gradient():
    gap = torch.tensor([1.0, -2.0], requires_grad=True)
    objective_losses(gap, torch.tensor([[NAN, 0.0], [NAN, 1.0]]), 0.5).sum().backward()
    np.testing.assert_allclose(gap.grad, [0.0, -0.5 * expit(1.0)], rtol=1e-6)


class Fixed(torch.nn.Module):
    """Log-probabilities that don't depend on the prompt: one per token."""

    def __init__(self, logprobs):
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(torch.tensor([[0.0]] * len(logprobs)))
        self.head = torch.nn.Linear(1, len(logprobs))
        self.head.weight.data[:], self.head.bias.data[:] = 0.0, torch.tensor(logprobs)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **_):
        return type("Out", (), {"logits": self.head(self.table(input_ids))})


@pytest.mark.parametrize("shared", [True, False])
def test_the_batch_loss_by_hand(shared):
    """Two pairs with d = log 4 and log 4 - log 8, objectives of which the second orders only one pair in two."""
    model = Fixed([math.log(p) for p in (0.5, 0.25, 0.125, 0.125)])
    pairs = [Completions((1, 2), ((0,), (3,))), Completions((3,), ((0, 2), (1,)))]  # log (1/2) / (1/8); log (1/16) / (1/4)
    rows = [Row(pairs[0], {"label": (1.0, NAN), "weights": (0.25, 0.75)}), Row(pairs[1], {"label": (-1.0, 1.0), "weights": (0.5, 0.5)})]
    out = make_loss(2.0, [1.0, 0.5])(model, collator(shared=shared)(rows))
    first = 0.25 * math.log(1 + 1 / 16)  # e^(beta d) = 4^2
    second = 0.5 * math.log(1 + 1 / 16) + (0.5 / 0.5) * math.log(1 + 16)  # d = -log 4; the second objective counts twice
    assert out.loss.item() == pytest.approx((first + second) / 2, rel=1e-5)
    assert out.logged["agreement"].item() == pytest.approx((1.0 + 0.5) / 2)
    assert out.logged["gap"].item() == pytest.approx(math.log(4), rel=1e-5)


def test_every_objectives_mean_is_over_its_own_pairs():
    label_NK = np.array([[1, NAN], [-1, 0], [1, 1], [0, -1]])
    np.testing.assert_allclose(label_shares(label_NK, ("x", "y")), [0.75, 0.5])
    with pytest.raises(UserError, match="no pair to train on has a label of 'y'"):
        label_shares(np.array([[1.0, NAN], [1.0, 0.0]]), ("x", "y"))


def test_weights_are_a_function_of_seed_epoch_and_row():
    config = Config(objectives=("x", "y", "z"), fit=FitConfig(seed=4))
    drawn = np.array([[drawn_weights(config, row, epoch) for row in range(400)] for epoch in range(2)])
    np.testing.assert_allclose(drawn.sum(-1), 1.0)
    assert drawn.min() >= 0
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) == 800
    # Dirichlet(1/2, 1/2, 1/2): mean 1/3, variance (1/3)(2/3) / (3/2 + 1) = 0.0889
    np.testing.assert_allclose(drawn.mean((0, 1)), 1 / 3, atol=4 * math.sqrt(0.0889 / 800))
    np.testing.assert_allclose(drawn.var((0, 1)), 0.0889, atol=0.015)
    torch.manual_seed(1)
    np.random.seed(1)
    np.testing.assert_array_equal(drawn_weights(config, 7, 1), drawn[1, 7])
    other = replace(config, fit=FitConfig(seed=5))
    assert drawn_weights(other, 7, 1) != drawn[1, 7].tolist()


def test_weights_from_a_grid_are_all_its_points():
    config = Config(objectives=("x", "y"), grid=2)
    drawn = [tuple(drawn_weights(config, row, 0)) for row in range(300)]
    assert {point: drawn.count(point) > 60 for point in set(drawn)} == {(1.0, 0.0): True, (0.5, 0.5): True, (0.0, 1.0): True}


# --- what a model reads


@pytest.mark.parametrize("shared", [True, False])
def test_a_pairs_responses_are_read_at_its_own_weights(tiny_lm, shared):
    """One row of the forward per pair or two: each pair's difference is that of the pair alone, at weights for the whole batch."""
    lm = stirred(tiny_lm)
    batch = completion_batch(ROWS, shared=shared)
    with torch.no_grad():
        together = gaps(lm.model, batch, torch.tensor(WEIGHTS))
    assert len(batch["input_ids"]) == (3 if shared else 6)
    for row, weights, gap in zip(ROWS, WEIGHTS, together.tolist(), strict=True):
        ((first, second),) = reward_sums(lm, [row], weights, shared=False, title="")
        assert gap == pytest.approx(first - second, abs=1e-4)
        ((other, one),) = reward_sums(lm, [row], weights[::-1], shared=False, title="")
        assert abs(gap - (other - one)) > 0.01 or weights == (0.5, 0.5)


def test_batch_and_padding_change_no_gradient(tiny_lm):
    """The gradient of a batch is the mean of its rows' own, whatever they are padded to and whether they share their prompts."""
    rows = [Row(row, {"label": label, "weights": weights}) for row, label, weights in zip(ROWS, LABELS, WEIGHTS, strict=True)]

    def gradients(parts, shared):
        lm = stirred(tiny_lm)
        for part in parts:
            (make_loss(0.5, [0.9, 0.8])(lm.model, collator(shared=shared)(part)).loss * len(part) / len(rows)).backward()
        return {name: p.grad for name, p in lm.model.named_parameters() if p.requires_grad}

    whole = gradients([rows], True)
    assert min(float(g.abs().max()) for g in whole.values()) > 0
    for parts, shared in (([rows], False), ([[row] for row in rows], True), ([rows[:1], rows[1:]], False)):
        for name, gradient in gradients(parts, shared).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-3, atol=1e-5)


def test_the_factored_form_trains_as_the_dense_one(tiny_lm):
    """Loss and gradients of the adapters against plain models whose matrices W + s B C(w) A are written out, a model per row."""
    lm, rows = stirred(tiny_lm), [Row(r, {"label": a, "weights": w}) for r, a, w in zip(ROWS, LABELS, WEIGHTS, strict=True)]
    share_K = [2 / 3, 1.0]
    layers = {name: m for name, m in lm.model.named_modules() if isinstance(m, WeightedLinear)}
    dense_loss = torch.tensor(0.0)
    for row, label_K, weights in zip(ROWS, LABELS, WEIGHTS, strict=True):
        matrices = {f"{name}.weight": layer.base.weight + dense_update(layer, weights) for name, layer in layers.items()}
        sums = []
        for response in row.responses:
            ids = torch.tensor([[*row.prompt, *response]])
            logits = torch.func.functional_call(tiny_lm.model, matrices, (ids,)).logits[0, len(row.prompt) - 1 : -1]
            sums.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())
        for label, weight, share in zip(label_K, weights, share_K, strict=True):
            if abs(label) == 1:
                dense_loss = dense_loss + weight / share * torch.log1p(torch.exp(-0.5 * label * (sums[0] - sums[1]))) / 3
    parameters = [p for layer in layers.values() for p in (layer.down_rI, layer.up_Or, layer.fixed, layer.cores_K)]
    expected = torch.autograd.grad(dense_loss, parameters)
    found = make_loss(0.5, share_K)(lm.model.train(), collator(shared=True)(rows)).loss
    assert found.item() == pytest.approx(dense_loss.item(), rel=1e-4)
    for got, gradient in zip(torch.autograd.grad(found, parameters), expected, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-5)


# --- the optimum, where every response can be enumerated

BETA = 0.7
REWARD_PVK = np.random.default_rng(0).normal(size=(len(PROMPTS), len(TOKENS), 2))


def everything(lm) -> list[Completions]:
    """Every prompt with all its one-token responses."""
    return [Completions(tuple(prompt_ids(lm.tokenizer, p)), tuple((token,) for token in TOKENS)) for p in PROMPTS]


def pairs_of_all(lm) -> list[Row]:
    """Every pair of responses, with the probability by Bradley and Terry that the first is better."""
    found = []
    for row, reward_VK in zip(everything(lm), REWARD_PVK, strict=True):
        for first, second in itertools.combinations(TOKENS, 2):
            better_K = expit(reward_VK[first] - reward_VK[second])
            found.append(Row(Completions(row.prompt, ((first,), (second,))), {"better": tuple(better_K)}))
    return found


def expected_loss(model, batch) -> LossOutput:
    """The loss of infinitely many labels: hard ones have no finite optimum."""
    weights_BK, better_BK = batch["weights"], batch["better"]
    gap_B, one_BK = gaps(model, batch, weights_BK), torch.ones_like(better_BK)
    up_BK, down_BK = (objective_losses(gap_B, sign * one_BK, BETA) for sign in (1, -1))
    return LossOutput(loss=(weights_BK * (better_BK * up_BK + (1 - better_BK) * down_BK)).sum(-1).mean())


def total_variation(log_PV, other_PV) -> float:
    """The largest of the prompts'."""
    return float(0.5 * np.abs(softmax(log_PV, axis=1) - softmax(other_PV, axis=1)).sum(1).max())


def check_guided(lm, guide, weights, log_PV) -> None:
    """`generate` draws its tokens by this law."""
    sampling = Sampling(max_new_tokens=1, top_k=0, allow_eos_first=True, batch_size=30)
    requests = [Request(id=f"{p}-{i}", prompt=PROMPTS[p], seed=100 * p + i, weights=weights) for p in range(3) for i in range(10)]
    law_PV = log_softmax(log_PV, axis=1)
    for request, rollout in zip(requests, generate(lm, requests, sampling, guide), strict=True):
        assert rollout.logprobs[0] == pytest.approx(law_PV[PROMPTS.index(request.prompt), rollout.tokens[0]], abs=1e-3)


def test_genarm_has_the_rewards_shape_and_guides_to_the_closed_form(tiny_lm, tmp_path):
    """log pi = r / beta_r + c; the guided law is pi_ref exp(r / (beta_r beta)) / Z, at a beta that training didn't know."""
    rows = [Row(row.completions, {"better": row.numbers["better"][:1], "weights": (1.0,)}) for row in pairs_of_all(tiny_lm)]
    config = FitConfig(learning_rate=0.01, max_steps=130, batch_size=42, checkpoint_every=0)
    torch.manual_seed(0)
    model = add_lora(fresh(tiny_lm).model, Lora(rank=4, dropout=0.0), "CAUSAL_LM")
    found = fit(model, rows, collator(shared=True), expected_loss, config, tmp_path).model
    reward, every = replace(tiny_lm, model=merge_lora(found.eval())), everything(tiny_lm)
    reward_PV, ref_PV = (reward_sums(lm, every, None, shared=True, title="") for lm in (reward, tiny_lm))
    assert total_variation(reward_PV, REWARD_PVK[..., 0] / BETA) < 0.02
    beta = 1.6
    closed_PV = ref_PV + REWARD_PVK[..., 0] / (BETA * beta)
    assert total_variation(ref_PV + reward_PV / beta, closed_PV) < 0.02
    assert total_variation(ref_PV, closed_PV) > 0.3
    check_guided(tiny_lm, reward_guide(tiny_lm, {"x": reward}, beta), (1.0,), ref_PV + reward_PV / beta)


def mixed_optimum(reward_VK, weights) -> np.ndarray:
    """The scores whose differences explain labels best that follow objective k's law in a share w_k of the cases."""
    first, second = np.triu_indices(len(reward_VK), 1)
    better = expit(reward_VK[first] - reward_VK[second]) @ np.array(weights)

    def loss(score_V):
        gap = score_V[first] - score_V[second]
        error, gradient = expit(gap) - better, np.zeros_like(score_V)
        np.add.at(gradient, first, error)
        np.add.at(gradient, second, -error)
        return float((np.logaddexp(0, gap) - better * gap).sum()), gradient

    return minimize(loss, np.zeros(len(reward_VK)), jac=True, method="BFGS").x


def test_parm_reaches_the_mixed_rewards_at_weights_it_never_saw(tiny_lm, tmp_path):
    """Trained at the multiples of 1/4 alone, it is near pi_ref exp(sum_k w_k r_k / beta) / Z at all weights.

    Inside the simplex it is nearer to what a share w_k of labels by each objective asks for, which isn't quite that.
    """
    rows = pairs_of_all(tiny_lm)
    fitted = FitConfig(learning_rate=0.03, max_steps=160, batch_size=42, checkpoint_every=0)
    config = Config(objectives=("x", "y"), grid=4, fit=fitted)
    lora = WeightedLora(shared_rank=8, rank=8, alpha=16.0, dropout=0.0, targets=("v_proj", "o_proj", "up_proj", "down_proj"))
    made = add_weighted_lora(fresh(tiny_lm), lora, ("x", "y"), seed=1)

    def renew(row, number, epoch):
        return replace(row, numbers={**row.numbers, "weights": drawn_weights(config, number, epoch)})

    found = fit(made.model, rows, collator(shared=True), expected_loss, fitted, tmp_path, renew=renew).model
    reward, every = replace(made, model=found.eval()), everything(tiny_lm)
    ref_PV = reward_sums(tiny_lm, every, None, shared=True, title="")
    for weights in ((1.0, 0.0), (0.9, 0.1), (0.6, 0.4), (0.3, 0.7), (0.0, 1.0)):
        guided_PV = ref_PV + BETA * reward_sums(reward, every, weights, shared=True, title="")
        closed_PV = ref_PV + REWARD_PVK @ np.array(weights)
        asked_PV = ref_PV + np.array([mixed_optimum(reward_VK, weights) for reward_VK in REWARD_PVK])
        assert total_variation(ref_PV, closed_PV) > 0.25
        assert total_variation(guided_PV, closed_PV) < 0.05
        assert total_variation(guided_PV, asked_PV) < (0.05 if 1.0 in weights else 0.03)
        check_guided(tiny_lm, reward_guide(tiny_lm, reward, 1 / BETA), weights, guided_PV)
    ends = [ref_PV + BETA * reward_sums(reward, every, weights, shared=True, title="") for weights in ((1.0, 0.0), (0.0, 1.0))]
    assert total_variation(*ends) > 0.35


# --- whole runs

WORDS = [word for word in FOLDER_WORDS[3:] if word.isalpha() and word not in ("good", "bad", "time", "car")]
QUICK = FitConfig(learning_rate=0.01, epochs=5, batch_size=8, checkpoint_every=4)
SMALL = WeightedLora(shared_rank=2, rank=2, targets=("q_proj", "v_proj", "down_proj"))


def labelled_pairs(count: int) -> list[LabelledPair]:
    """Of two answers one has a good word and one a bad one (kind); one speaks of time and one of a car (late, not always labelled)."""
    rng, found = random.Random(3), []
    for i in range(count):
        kind, late = rng.choice([1.0, -1.0]), rng.choice([1.0, -1.0])
        words = zip(("good", "bad")[:: int(kind)], ("time", "car")[:: int(late)], strict=True)
        first, second = (" ".join([*rng.choices(WORDS, k=2), *pair]) for pair in words)
        asked = prompt(f"p{i // 2:03d}", f"{WORDS[i // 2]} {WORDS[i // 3]}") if i % 2 == 0 else found[-1].prompt
        labels = (kind, late if i % 5 else NAN)
        found.append(LabelledPair(id=f"{i:03d}", prompt=asked, responses=(first, second), objectives=("kind", "late"), label_K=labels))
    return found


def test_parm_from_a_file_to_a_guide(tiny_folder, tmp_path, capsys):
    """Each objective is learnt at its own end, the untrained model knows neither, and the folder says what the card says."""
    write_labelled(tmp_path / "pairs.jsonl", labelled_pairs(60))
    words = [
        "train",
        "autoregressive",
        "--out",
        f"{tmp_path}/run",
        "--model",
        str(tiny_folder),
        "--pairs",
        f"[labelled:{tmp_path}/pairs.jsonl]",
    ]
    words += ["--reward.objectives", "[kind,late]", "--reward.beta", "0.3", "--reward.fit.epochs", "12", "--reward.fit.batch_size", "8"]
    words += ["--reward.fit.learning_rate", "0.02", "--reward.weighted.targets", "[q_proj,v_proj,down_proj]"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == f"{tmp_path}/run/adapter"
    assert "kind=0 late=1: late held-out accuracy" in printed.err
    card, held = read_json(tmp_path / "run" / "card.json"), read_json(tmp_path / "run" / "held_out.json")
    assert (card["method"], card["train_pairs"], card["test_pairs"]) == ("PARM", 48, 12)
    figures = card["held_out"]
    assert list(figures) == ["untrained", "kind=1 late=0", "kind=0.5 late=0.5", "kind=0 late=1"]
    assert figures["kind=1 late=0"]["kind"]["test_accuracy"] >= 0.9
    assert figures["kind=0 late=1"]["late"]["test_accuracy"] >= 0.9
    assert figures["kind=1 late=0"]["late"]["test_accuracy"] < 0.9 > figures["kind=0 late=1"]["kind"]["test_accuracy"]
    assert figures["untrained"]["kind"]["test_interval"][0] < 0.6

    lm = load_model(f"{tmp_path}/run/adapter")
    pairs = {pair.id: pair for pair in labelled_pairs(60)}
    for id, gaps_of in held.items():
        row = completions_of(lm.tokenizer, pairs[id].prompt, pairs[id].responses)
        ((first, second),) = reward_sums(lm, [row], (0.5, 0.5), shared=False, title="")
        assert gaps_of["kind=0.5 late=0.5"] == pytest.approx(first - second, abs=1e-3)
    asked = ["sample", "--out", f"{tmp_path}/drawn", "--model", str(tiny_folder), "--limit", "2", "--sampling.max_new_tokens", "4"]
    assert main([*asked, "--guides", f"[{tmp_path}/run/adapter]", "--weights", "kind=0.2,late=0.8", "--beta", "1.0"]) == 0
    assert all(r.weights == (0.2, 0.8) and r.kl > 0 for r in read_rollouts(tmp_path / "drawn" / "rollouts"))


@pytest.mark.parametrize("rank", [2, 0])
def test_genarm_from_a_file_to_a_guide(tiny_folder, tmp_path, capsys, rank):
    pairs = labelled_pairs(40)
    rows = [{"prompt": p.prompt.text, "chosen": p.pair("kind").chosen, "rejected": p.pair("kind").rejected} for p in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", "autoregressive", "--out", f"{tmp_path}/run", "--model", str(tiny_folder)]
    words += ["--pairs", f"[preference:{tmp_path}/pairs.jsonl]", "--reward.objectives", "[kind]", "--reward.lora.rank", str(rank)]
    assert main([*words, "--reward.fit.epochs", "3", "--reward.fit.learning_rate", "0.01"]) == 0
    folder = capsys.readouterr().out.strip()
    assert folder == f"{tmp_path}/run/{'adapter' if rank else 'model'}"
    figures = read_json(tmp_path / "run" / "card.json")["held_out"]
    assert figures["trained"]["kind"]["test_accuracy"] > 0.8 > figures["untrained"]["kind"]["test_accuracy"]
    lm, held = load_model(folder), read_json(tmp_path / "run" / "held_out.json")
    for pair in pairs:
        if (id := f"kind-{int(pair.id):05d}") in held:
            row = completions_of(lm.tokenizer, pair.prompt, (pair.pair("kind").chosen, pair.pair("kind").rejected))
            ((first, second),) = reward_sums(lm, [row], None, shared=False, title="")
            assert held[id]["trained"] == pytest.approx(first - second, abs=1e-3)
    asked = ["sample", "--out", f"{tmp_path}/drawn", "--model", str(tiny_folder), "--limit", "2", "--sampling.max_new_tokens", "4"]
    assert main([*asked, "--guides", f"[kind={folder}]", "--weights", "1", "--beta", "1.0"]) == 0


def _child(out: str, model: str, dies_at: int) -> None:
    """Train PARM; die in the `dies_at`-th loss (0: live)."""
    torch.set_num_threads(1)
    autoregressive.objective_losses = dying(autoregressive.objective_losses, dies_at)
    config = Config(objectives=("kind", "late"), weighted=SMALL, fit=replace(QUICK, epochs=3))
    with stage(Path(out), "train autoregressive", {}) as run:
        autoregressive.train(labelled_pairs(30), model, config, run)
    os._exit(0)


def test_a_killed_run_ends_with_the_same_files(tiny_folder, tmp_path):
    """In its second epoch, with dropout: the losses after it, and so the weights drawn for each row, are the undisturbed run's."""
    run = child_runner(_child, tiny_folder)
    assert run(tmp_path / "whole", 0) == 0
    assert run(tmp_path / "killed", 6) == -signal.SIGKILL
    (checkpoint,) = (tmp_path / "killed" / "checkpoints").iterdir()
    kept = load_file(checkpoint / "model.safetensors")
    assert {name.rsplit(".", 1)[1] for name in kept} == {"down_rI", "up_Or", "fixed", "cores_K"}, "the frozen model isn't in it"
    assert run(tmp_path / "killed", 0) == 0
    digests = [read_json(tmp_path / name / "manifest.json")["outputs"] for name in ("whole", "killed")]
    assert {"adapter/adapter_model.safetensors", "history.json"} <= digests[0].keys()
    assert digests[0] == digests[1]


def test_bad_input_is_named(tiny_folder, tmp_path, capsys):
    write_labelled(tmp_path / "pairs.jsonl", labelled_pairs(20))
    words = ["train", "autoregressive", "--out", f"{tmp_path}/run", "--pairs", f"[labelled:{tmp_path}/pairs.jsonl]"]
    words += ["--reward.fit.max_steps", "1"]
    for settings, says in {
        ("--reward.objectives", "[kind,sound]"): "no pair is labelled on 'sound'",
        ("--reward.objectives", "[kind,kind]"): "objectives must be one name (GenARM) or several different ones (PARM)",
        ("--reward.objectives", "[kind]", "--reward.beta", "0"): "beta and concentration must be positive, got 0.0",
        ("--reward.objectives", "[kind,late]", "--reward.grid", "-1"): "grid must not be negative, got -1",
    }.items():
        assert main([*words, *settings]) == 2
        assert says in capsys.readouterr().err
    assert main([*words, "--model", str(tiny_folder), "--reward.objectives", "[kind]", "--out", f"{tmp_path}/first"]) == 0
    assert main([*words, "--model", f"{tmp_path}/first/adapter", "--reward.objectives", "[kind,late]"]) == 2
    assert "PARM's adapters lie on a plain model, not on the adapter" in capsys.readouterr().err
