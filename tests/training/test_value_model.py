"""Value models: packed trees against paths run alone, the loss by hand, learning, saving, continuing, distilling."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import FOLDER_WORDS, build_llama, build_tokenizer, prompt
from equipoise.decoding.value_guided import PolicySampler, ValueModelGuide
from equipoise.forests.backups import make_targets
from equipoise.forests.growing import Growth, Root, grow
from equipoise.forests.packing import choose_nodes, pack
from equipoise.models.chat import prompt_ids
from equipoise.models.generation import Sampling
from equipoise.models.loading import load_model
from equipoise.models.lora import Lora
from equipoise.models.value_models import load_value_model
from equipoise.objectives import Normaliser
from equipoise.runs import Manifest, read_json
from equipoise.training.fit import FitConfig
from equipoise.training.value_model import Config, Row, collate, distil_lesson, label_lesson, make_loss, ridge_start, train
from equipoise.training.value_net import ValueNet
from equipoise.training.value_quality import r2_table
from equipoise.types import Request, UserError

CAP = 10
SAMPLING = Sampling(max_new_tokens=CAP, top_k=12, batch_size=64)
PROMPTS = [prompt(f"p{i}", text) for i, text in enumerate(("how do i make bread ?", "help", "is water safe ?", "what is good ?", "yes"))]
NAN = float("nan")
SCALE = Normaliser(objectives=("even", "low"), mean_K=(1.0, -2.0), sd_K=(2.0, 0.5))
QUICK = Config(
    lora=Lora(rank=4, alpha=8, dropout=0.0),
    validation_share=0.2,
    calibration_states=16,
    fit=FitConfig(learning_rate=3e-3, epochs=3, batch_size=2, checkpoint_every=0),
)


@pytest.fixture(scope="module")
def policy(tiny_folder):
    return load_model(str(tiny_folder))


@pytest.fixture(scope="module")
def forest(policy):
    return grow(PolicySampler(policy, SAMPLING), [Root(id=p.id, prompt=p) for p in PROMPTS], Growth(root_children=3, layers=3), CAP, seed=1)


@pytest.fixture(scope="module")
def targets(forest):
    """Two rewards that a prefix tells something about: how many of its tokens are even, and how many are low."""
    reward_NK = np.full((len(forest), 2), NAN)
    for leaf in np.flatnonzero(forest.leaf_N):
        path = path_to(forest, leaf)
        reward_NK[leaf] = sum(t % 2 == 0 for t in path), sum(t < 25 for t in path)
    zero = np.zeros(len(forest))
    return make_targets("hard", forest.parent_N, forest.leaf_N, reward_NK, zero, zero, zero)


def path_to(forest, node) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path = [*forest.tokens(node).tolist(), *path]
        node = int(forest.parent_N[node])
    return path


def asked_of(policy, forest):
    by_id = {p.id: prompt_ids(policy.tokenizer, p) for p in PROMPTS}
    return [by_id[name] for name in forest.prompt_ids]


def lesson_of(policy, forest, targets, config=QUICK):
    return label_lesson(policy.tokenizer, {p.id: p for p in PROMPTS}, forest, targets, SCALE, config)


def manifest(folder) -> Manifest:
    folder.mkdir()
    return Manifest(folder, "train value_model", {}, {})


# --- packing


@pytest.mark.parametrize("most", [20, 60, 10**6])
@pytest.mark.parametrize("every", [False, True])
def test_packs_hold_each_chosen_node_once_with_its_whole_path(policy, forest, most, every):
    asked = asked_of(policy, forest)
    nodes = choose_nodes(forest, 0.4, seed=3)
    packs = pack(forest, asked, nodes, most, every_token=every)
    assert all(len(p.tree.wanted) == len(p.nodes) == len(p.position) for p in packs)
    found = np.concatenate([p.nodes for p in packs])
    length_N = np.diff(forest.offset_M)
    assert sorted(found.tolist()) == sorted(np.repeat(nodes, length_N[nodes] if every else 1).tolist())
    for one in packs:
        for wanted, node, position in zip(one.tree.wanted, one.nodes, one.position, strict=True):
            at, path = wanted, []
            while at >= 0:
                path.insert(0, one.tree.tokens[at])
                at = one.tree.parents[at]
            assert path == (asked[one.index] + path_to(forest, node))[: len(asked[one.index]) + position]
            assert forest.tree_N[node] == one.index
    used = {n for node in nodes for n in ancestors(forest, node)}
    whole = sum(int(length_N[n]) for n in used) + sum(len(asked[p.index]) for p in packs)
    assert sum(len(p.tree) for p in packs) == whole, "nothing that leads to no chosen node is encoded, and no prefix twice in a pack"
    tops = {p.index: sum(1 for n in used if forest.parent_N[n] < 0 and forest.tree_N[n] == p.index) for p in packs}
    assert all(len(p.tree) <= most or tops[p.index] for p in packs)
    if most == 10**6:
        assert len(packs) == len(forest.tree_ids)
    elif most == 20:
        assert len(packs) > len(forest.tree_ids)


def ancestors(forest, node) -> list[int]:
    found = []
    while node >= 0:
        found.append(int(node))
        node = forest.parent_N[node]
    return found


def test_nodes_are_chosen_as_the_paper_says(forest):
    """All above a tree's greatest depth, and max(1, floor(f n)) of the n at it; another tree's presence changes nothing."""
    for fraction in (0.01, 0.4, 1.0):
        nodes = choose_nodes(forest, fraction, seed=3)
        for index in range(len(forest.tree_ids)):
            mine = forest.tree_N == index
            bottom = mine & (forest.depth_N == forest.depth_N[mine].max())
            chosen = np.isin(np.arange(len(forest)), nodes)
            assert (chosen & mine & ~bottom).sum() == (mine & ~bottom).sum()
            assert (chosen & bottom).sum() == max(1, math.floor(fraction * bottom.sum()))
    assert choose_nodes(forest, 0.4, seed=3).tolist() == choose_nodes(forest, 0.4, seed=3).tolist()


def test_packed_values_are_those_of_each_path_alone(policy, forest):
    asked = asked_of(policy, forest)
    torch.manual_seed(0)
    net = ValueNet(policy.backbone, torch.randn(2, policy.hidden_size), torch.randn(2))
    packs = pack(forest, asked, np.arange(len(forest)), 80)
    batch = collate([Row(p, np.zeros((len(p.nodes), 2))) for p in packs])
    with torch.no_grad():
        value_SK = net(batch["input_ids"], batch["attention_mask"], batch["position_ids"])[batch["row_S"], batch["token_S"]].numpy()
        nodes = np.concatenate([p.nodes for p in packs])
        for row in range(0, len(nodes), 3):
            ids = torch.tensor([asked[forest.tree_N[nodes[row]]] + path_to(forest, nodes[row])])
            alone = policy.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1][0, -1]
            wanted = (net.weight_KD @ alone + net.bias_K).numpy()
            np.testing.assert_allclose(value_SK[row], wanted, atol=1e-4)


# --- arithmetic


def test_the_loss_by_hand():
    """Two trees with 2 and 1 wanted tokens; targets (1, -), (3, 5), (0, 2) against values of 1 at each: 0, 4 + 16, 1 + 1."""

    class Ones(torch.nn.Module):
        def forward(self, ids, mask, positions):
            return torch.ones(*ids.shape, 2)

    from equipoise.forests.packing import Pack
    from equipoise.models.trees import TokenTree

    rows = [
        Row(Pack(0, TokenTree([3, 4, 5], [-1, 0, 0], [1, 2]), np.array([0, 1]), np.array([1, 1])), np.array([[1.0, NAN], [3.0, 5.0]])),
        Row(Pack(1, TokenTree([3, 4], [-1, 0], [1]), np.array([2]), np.array([1])), np.array([[0.0, 2.0]])),
    ]
    found = make_loss(2.5)(Ones(), collate(rows))
    assert found.loss.item() == pytest.approx(22 / 2 / 2.5)
    assert found.logged["mse"].item() == pytest.approx(22 / 5)
    # Weighted by their rows over the mean number of rows, batches of 1 make the same as one of 2.
    apart = [make_loss(2.5)(Ones(), collate([row])).loss.item() for row in rows]
    assert sum(apart) / 2 == pytest.approx(22 / 2 / 2.5)


def test_an_unscored_target_gives_no_gradient():
    net = ValueNet(torch.nn.Identity(), torch.ones(2, 3), torch.zeros(2))
    net.forward = lambda ids, mask, positions: torch.nn.functional.linear(torch.ones(*ids.shape, 3), net.weight_KD, net.bias_K)
    from equipoise.forests.packing import Pack
    from equipoise.models.trees import TokenTree

    row = Row(Pack(0, TokenTree([3], [-1], [0]), np.array([0]), np.array([1])), np.array([[NAN, 1.0]]))
    make_loss(1.0)(net, collate([row])).loss.backward()
    assert net.weight_KD.grad[0].tolist() == [0, 0, 0]
    assert net.weight_KD.grad[1].tolist() == [4, 4, 4]  # 2 (3 - 1)


def test_the_ridge_start_is_the_textbook_solution():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 4)) * [1, 2, 0.1, 5] + 3, rng.normal(size=(60, 2))
    y[:7, 1] = NAN
    weight, bias = ridge_start(x, y, 0.3)
    for k, rows in ((0, slice(None)), (1, slice(7, None))):
        z = (x - x.mean(0)) / x.std(0)
        A = np.concatenate([z[rows], np.ones((len(z[rows]), 1))], axis=1)
        solved = np.linalg.solve(A.T @ A + len(A) * np.diag([0.3] * 4 + [1e-9]), A.T @ y[rows, k])
        np.testing.assert_allclose(x @ weight[k] + bias[k], np.concatenate([z, np.ones((60, 1))], axis=1) @ solved, atol=1e-8)


def test_r2_by_hand():
    """Targets 0 2 4 6 in two groups, predicted 1 1 5 5: residuals 4, spread 20; within groups 4 of 4 are left."""
    y, v = np.array([[0.0], [2], [4], [6], [NAN]]), np.array([[1.0], [1], [5], [5], [9]])
    (found,) = r2_table(y, v, np.array([0, 0, 1, 1, 1]), np.array([1, 2, 3, 4, 5]), bins=2)
    assert (found["n"], found["r2"], found["r2_within"]) == (4, pytest.approx(0.8), pytest.approx(0.0))
    assert [(b["tokens"], b["n"]) for b in found["by_position"]] == [([1, 2], 2), ([3, 4], 2)]
    assert [b["r2"] for b in found["by_position"]] == [pytest.approx(0.0), pytest.approx(0.0)]


# --- training


@pytest.mark.parametrize("rank", [4, 0])
def test_training_learns_and_what_is_saved_is_what_was_trained(policy, forest, targets, tiny_folder, tmp_path, rank):
    config = replace(QUICK, lora=replace(QUICK.lora, rank=rank), fit=replace(QUICK.fit, epochs=30))
    lesson, run = lesson_of(policy, forest, targets, config), manifest(tmp_path / "run")
    folder = train(lesson, policy, SAMPLING, str(tiny_folder), None, config, run)
    history = read_json(run.folder / "history.json")
    assert history[-1]["mse"] < 0.8 * history[0]["mse"]
    assert sorted(p.name for p in folder.iterdir()) == ["adapter" if rank else "backbone", "heads.safetensors"]
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} <= {".json", ".safetensors"}
    saved = load_value_model(folder)
    assert saved.objectives == ("even", "low")
    assert saved.heads.normaliser == SCALE
    value_SK = np.concatenate(saved.predict([row.pack.tree for row in lesson.train]))
    half = load_value_model(folder, dtype="bfloat16")
    assert {p.dtype for p in half.lm.model.parameters()} == {torch.bfloat16}
    half_SK = np.concatenate(half.predict([row.pack.tree for row in lesson.train]))
    # Eight bits of mantissa, over a few layers.
    assert 0 < np.abs(half_SK - value_SK).max() < 0.05 * np.abs(value_SK).max()
    target_SK = np.concatenate([row.target_SK for row in lesson.train])
    assert np.mean((value_SK - target_SK) ** 2) < 0.8 * history[0]["mse"]
    quality = read_json(run.folder / "quality.json")
    assert len(quality["held_out"]) == 2
    assert quality["held_out"][0]["n"] == sum(len(r.target_SK) for r in lesson.held)
    assert all(p.exists() for p in run.outputs)
    assert not (run.folder / "checkpoints").exists()
    table = saved.heads.calibration["prefix"]
    np.testing.assert_allclose(np.exp(table.logprobs_SC).sum(axis=1), 1, atol=1e-6)
    assert table.q_SCK.shape[1:] == (12, 2)
    assert table.steps == pytest.approx(forest.end_N[forest.leaf_N].mean())


@pytest.mark.parametrize("rank", [4, 0])
def test_another_architecture_under_the_policys_tokens(policy, forest, targets, tmp_path, rank):
    """A GPT-2 values a Llama's prefixes: what it says of packed nodes is what a plain forward of each path says, and it steers."""
    kind = GPT2Config(
        vocab_size=len(FOLDER_WORDS), n_positions=128, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=2, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        GPT2LMHeadModel(kind).save_pretrained(tmp_path / "gpt2")
    build_tokenizer(FOLDER_WORDS).save_pretrained(tmp_path / "gpt2")
    config = replace(QUICK, lora=replace(QUICK.lora, rank=rank))
    lesson = lesson_of(policy, forest, targets, config)
    saved = load_value_model(train(lesson, policy, SAMPLING, str(tmp_path / "gpt2"), None, config, manifest(tmp_path / "run")))
    pack = lesson.train[0].pack
    (said,) = saved.predict([pack.tree])
    asked = asked_of(policy, forest)[pack.index]
    for node, value_K in list(zip(pack.nodes, said, strict=True))[::3]:
        with torch.no_grad():
            state = saved.lm.model(input_ids=torch.tensor([[*asked, *path_to(forest, node)]])).last_hidden_state[0, -1].double().numpy()
        by_hand = saved.heads.tensors["prefix_KPI"][:, 0].astype(float) @ state + saved.heads.tensors["bias_K"]
        np.testing.assert_allclose(value_K, by_hand, atol=1e-4)
    request = Request(id="r", prompt=PROMPTS[0], seed=0, weights=(0.5, 0.5))
    [steered] = PolicySampler(policy, SAMPLING, ValueModelGuide(policy, [saved], beta=0.05))([request])
    assert steered.kl > 0.05


def test_calibration_is_read_off_plain_forwards(policy, forest, targets, tiny_folder, tmp_path):
    config = replace(QUICK, fit=replace(QUICK.fit, max_steps=1))
    lesson = lesson_of(policy, forest, targets, config)
    saved = load_value_model(train(lesson, policy, SAMPLING, str(tiny_folder), None, config, manifest(tmp_path / "run")))
    table, held = saved.heads.calibration["prefix"], lesson.held[0].pack
    asked = asked_of(policy, forest)[held.index]
    # The first state is the prompt's own, where a response may not end.
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([asked])).logits[0, -1].double()
        logits[list(policy.eos_ids)] = -torch.inf
        top = torch.topk(logits, 12)
        np.testing.assert_allclose(table.logprobs_SC[0], torch.log_softmax(top.values, 0), atol=1e-4)
        for c, token in enumerate(top.indices.tolist()):
            state = saved.lm.model(input_ids=torch.tensor([[*asked, token]])).last_hidden_state[0, -1].numpy()
            wanted = saved.heads.tensors["prefix_KPI"][:, 0] @ state + saved.heads.tensors["bias_K"]
            np.testing.assert_allclose(table.q_SCK[0, c], wanted, atol=1e-3)


def test_a_value_model_is_continued_from_where_it_was(policy, forest, targets, tiny_folder, tmp_path):
    """With a learning rate of next to nothing the continued model says what the first one said; with another it moves."""
    lesson = lesson_of(policy, forest, targets)
    first = train(lesson, policy, SAMPLING, str(tiny_folder), None, QUICK, manifest(tmp_path / "first"))
    still = replace(QUICK, fit=replace(QUICK.fit, learning_rate=1e-12, max_steps=1))
    trees = [row.pack.tree for row in lesson.train]
    one, two, three = (
        np.concatenate(load_value_model(folder).predict(trees))
        for folder in (
            first,
            train(lesson, policy, SAMPLING, "unused", first, still, manifest(tmp_path / "second")),
            train(lesson, policy, SAMPLING, "unused", first, QUICK, manifest(tmp_path / "third")),
        )
    )
    np.testing.assert_allclose(two, one, atol=1e-5)
    assert np.abs(three - one).max() > 0.01
    swapped = replace(lesson, normaliser=replace(SCALE, objectives=("low", "even")))
    with pytest.raises(UserError, match="values even, low, the targets are low, even"):
        train(swapped, policy, SAMPLING, "unused", first, QUICK, manifest(tmp_path / "fourth"))


def test_one_model_is_distilled_from_two(policy, forest, targets, tiny_folder, tmp_path):
    teachers = []
    for k, name in enumerate(SCALE.objectives):
        scale = Normaliser(objectives=(name,), mean_K=SCALE.mean_K[k : k + 1], sd_K=SCALE.sd_K[k : k + 1])
        lesson = label_lesson(policy.tokenizer, {p.id: p for p in PROMPTS}, forest, targets[:, k : k + 1], scale, QUICK)
        teachers.append(load_value_model(train(lesson, policy, SAMPLING, str(tiny_folder), None, QUICK, manifest(tmp_path / name))))
    config = replace(QUICK, fit=replace(QUICK.fit, epochs=30))
    lesson = distil_lesson(policy.tokenizer, {p.id: p for p in PROMPTS}, forest, teachers, config)
    assert lesson.normaliser == SCALE
    assert sum(len(r.target_SK) for r in (*lesson.train, *lesson.held)) == len(forest.token_T), "a target at every response token"
    for k, teacher in enumerate(teachers):
        (said,) = teacher.predict([lesson.train[0].pack.tree])
        np.testing.assert_allclose(lesson.train[0].target_SK[:, k], said[:, 0], atol=1e-9)
    student = load_value_model(train(lesson, policy, SAMPLING, str(tiny_folder), None, config, manifest(tmp_path / "student")))
    assert student.objectives == SCALE.objectives
    quality = read_json(tmp_path / "student" / "quality.json")["held_out"]
    assert min(found["r2"] for found in quality) > 0.5, "it follows its teachers on prompts that it never saw"
    with pytest.raises(UserError, match="share an objective: even, even"):
        distil_lesson(policy.tokenizer, {p.id: p for p in PROMPTS}, forest, [teachers[0], teachers[0]], config)


def test_bad_input(policy, forest, targets, tiny_folder, tmp_path):
    lesson = lesson_of(policy, forest, targets)
    build_llama(len(FOLDER_WORDS), layers=1, max_position=64, seed=3).save_pretrained(tmp_path / "other")
    build_tokenizer((*FOLDER_WORDS[:-2], FOLDER_WORDS[-1], FOLDER_WORDS[-2])).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"has another tokenizer than .*: token \d+ is 'money' here"):
        train(lesson, policy, SAMPLING, str(tmp_path / "other"), None, QUICK, manifest(tmp_path / "a"))
    unscored = targets.copy()
    unscored[:, 1] = NAN
    with pytest.raises(UserError, match="no node of the training prompts has a target for 'low'"):
        train(lesson_of(policy, forest, unscored), policy, SAMPLING, str(tiny_folder), None, QUICK, manifest(tmp_path / "b"))
    with pytest.raises(UserError, match="no value model at"):
        load_value_model(tmp_path)
    one = replace(QUICK, validation_share=0.5)
    alone = grow(PolicySampler(policy, SAMPLING), [Root(id="p0", prompt=PROMPTS[0])], Growth(layers=2), CAP, seed=1)
    with pytest.raises(UserError, match="trees of 1 prompts are too few"):
        lesson_of(policy, alone, np.zeros((len(alone), 2)), one)
    for bad in ({"bottom_fraction": 0.0}, {"validation_share": 1.0}, {"start_l2": 0.0}, {"tree_tokens": 0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            Config(**bad)
