"""A token tree's states against each root-to-node path run alone; what batching and order may not change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import MistralConfig

from conftest import build_llama
from equipoise.models.loading import LanguageModel
from equipoise.models.trees import TokenTree, early_exit, tree_states
from equipoise.types import UserError


def path_of(tree: TokenTree, node: int) -> list[int]:
    """Tokens from the root down to the node."""
    path: list[int] = []
    while node >= 0:
        path.insert(0, tree.tokens[node])
        node = tree.parents[node]
    return path


def states_alone(lm, path: list[int]) -> dict[int, np.ndarray]:
    """Layer -> state of the path's last token, read off the layers themselves; the last layer's after the norm."""
    seen: dict[int, np.ndarray] = {}

    def keep(layer: int):
        def hook(module, args, output):
            states = output[0] if isinstance(output, tuple) else output
            seen[layer] = states[0, -1].numpy().copy()

        return hook

    hooks = [block.register_forward_hook(keep(index)) for index, block in enumerate(lm.backbone.layers[:-1], start=1)]
    hooks.append(lm.backbone.embed_tokens.register_forward_hook(keep(0)))
    hooks.append(lm.backbone.norm.register_forward_hook(keep(lm.num_layers)))
    try:
        with torch.no_grad():
            lm.model(input_ids=torch.tensor([path]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def random_tree(seed: int, prompt: int, branches: int) -> TokenTree:
    """A prompt, and chains of random length hung under random nodes of what is already there."""
    rng = np.random.default_rng(seed)
    tree = TokenTree()
    tree.chain(-1, rng.integers(3, 8, prompt).tolist())
    for _ in range(branches):
        tree.chain(int(rng.integers(len(tree))), rng.integers(1, 8, rng.integers(1, 5)).tolist())
    tree.wanted = rng.permutation(len(tree)).tolist()
    return tree


@pytest.fixture(scope="module")
def forest() -> list[TokenTree]:
    return [random_tree(seed, prompt, branches) for seed, (prompt, branches) in enumerate([(5, 6), (1, 0), (3, 3), (9, 1), (2, 8)])]


@pytest.fixture(scope="module")
def alone(tiny_lm, forest) -> list[list[dict[int, np.ndarray]]]:
    return [[states_alone(tiny_lm, path_of(tree, node)) for node in tree.wanted] for tree in forest]


def test_a_tree_by_hand():
    tree = TokenTree()
    assert tree.chain(-1, [5, 6]) == [0, 1]
    assert tree.chain(1, [7]) == [2]
    assert tree.chain(0, [8, 9]) == [3, 4]
    assert (tree.tokens, tree.parents) == ([5, 6, 7, 8, 9], [-1, 0, 1, 0, 3])
    assert tree.chain(4, []) == []
    sees, depth = tree.ancestors()
    assert depth.tolist() == [0, 1, 2, 1, 2]
    assert [np.flatnonzero(row).tolist() for row in sees] == [[0], [0, 1], [0, 1, 2], [0, 3], [0, 3, 4]]


@pytest.mark.parametrize("layers", [(1,), (2,), (3,), (1, 3), (3, 1), (1, 2), (2, 1, 3), (0, 2)])
def test_states_equal_those_of_each_path_alone(tiny_lm, forest, alone, layers):
    for tree, states, expected in zip(forest, tree_states(tiny_lm, forest, layers), alone, strict=True):
        assert states.dtype == np.float32
        assert states.shape == (len(tree.wanted), len(layers), tiny_lm.hidden_size)
        for got, want in zip(states, expected, strict=True):
            np.testing.assert_allclose(got, np.stack([want[layer] for layer in layers]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 40, 100_000])
def test_batching_changes_nothing(tiny_lm, forest, budget):
    usual = tree_states(tiny_lm, forest, (1, 3))
    for got, want in zip(tree_states(tiny_lm, forest, (1, 3), tokens_per_batch=budget), usual, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    turned = tree_states(tiny_lm, forest[::-1], (1, 3), tokens_per_batch=budget)[::-1]
    for got, want in zip(turned, usual, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_wanted_nodes_come_in_the_order_asked_for(tiny_lm, forest):
    tree = forest[0]
    [usual] = tree_states(tiny_lm, [tree], (2,))
    some = TokenTree(tree.tokens, tree.parents, [tree.wanted[3], tree.wanted[0], tree.wanted[3]])
    none = TokenTree(tree.tokens, tree.parents, [])
    picked, empty = tree_states(tiny_lm, [some, none], (2,))
    np.testing.assert_allclose(picked, usual[[3, 0, 3]], atol=1e-5)
    assert empty.shape == (0, 1, tiny_lm.hidden_size)


def test_no_trees_no_states(tiny_lm):
    assert tree_states(tiny_lm, [], (1,)) == []


def test_a_node_does_not_see_its_siblings(tiny_lm):
    def end_state(sibling: int) -> np.ndarray:
        tree = TokenTree()
        root = tree.chain(-1, [3, 4])[-1]
        tree.chain(root, [sibling])
        tree.wanted = tree.chain(root, [5])
        return tree_states(tiny_lm, [tree], (1, 3))[0]

    np.testing.assert_allclose(end_state(6), end_state(7), atol=1e-6)


def test_progress_counts_every_token_once(tiny_lm, forest):
    seen: list[int] = []
    tree_states(tiny_lm, forest, (3,), tokens_per_batch=30, progress=seen.append)
    assert len(seen) > 1
    assert sum(seen) == sum(len(tree) for tree in forest)


def test_early_exit_leaves_the_model_as_it_was(tiny_lm):
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = tiny_lm.model(input_ids=ids).logits
        shallow = early_exit(tiny_lm.backbone, 1)
        assert len(shallow.layers) == 1
        shallow(input_ids=ids)
        after = tiny_lm.model(input_ids=ids).logits
    assert len(tiny_lm.backbone.layers) == tiny_lm.num_layers
    assert torch.equal(before, after)
    assert shallow.layers[0].mlp.up_proj.weight.data_ptr() == tiny_lm.backbone.layers[0].mlp.up_proj.weight.data_ptr()


def test_an_early_exit_does_not_disturb_later_asks_for_several_layers(tiny_tokenizer):
    """A reward reads one layer of a model whose inner layers a value head reads next."""
    lm = LanguageModel(model=build_llama(8, layers=3, max_position=64, seed=4), tokenizer=tiny_tokenizer, name="fresh", revision="4")
    tree = TokenTree()
    tree.wanted = tree.chain(-1, [3, 4, 5])
    expected = [states_alone(lm, path_of(tree, node)) for node in tree.wanted]
    for layers in [(1,), (2,), (1,), (1, 2), (1, 2, 3), (2,), (2, 3)]:
        [states] = tree_states(lm, [tree], layers)
        want = np.stack([[state[layer] for layer in layers] for state in expected])
        np.testing.assert_allclose(states, want, atol=1e-5, rtol=1e-5, err_msg=str(layers))
    with torch.no_grad():
        hidden = lm.backbone(input_ids=torch.tensor([[3, 4, 5]]), output_hidden_states=True).hidden_states
    assert len(hidden) == lm.num_layers + 1
    np.testing.assert_allclose(hidden[2][0, -1], expected[-1][2], atol=1e-5)


def test_a_path_longer_than_a_sliding_window_is_refused(tiny_tokenizer):
    model = build_llama(8, layers=2, max_position=64, seed=5, config_class=MistralConfig, sliding_window=4)
    lm = LanguageModel(model=model, tokenizer=tiny_tokenizer, name="narrow", revision="5")
    tree = TokenTree()
    stem = tree.chain(-1, [3, 4])[-1]
    tree.wanted = [tree.chain(stem, [token, 7])[-1] for token in (3, 5, 6)]
    [states] = tree_states(lm, [tree], (1, 2))  # eight tokens, but no path of more than four
    for got, node in zip(states, tree.wanted, strict=True):
        alone = states_alone(lm, path_of(tree, node))
        np.testing.assert_allclose(got, np.stack([alone[1], alone[2]]), atol=1e-5, rtol=1e-5)
    tree.chain(tree.wanted[0], [5])
    with pytest.raises(UserError, match=r"'narrow'.*at most 4 tokens, not 5"):
        tree_states(lm, [tree], (1, 2))
