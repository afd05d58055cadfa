"""Tiny models and tokenizers, built in code: nothing is downloaded, and every number is fixed by a seed."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import pytest
import torch
from jaxtyping import install_import_hook

# Axes and types of the public array signatures are checked at every call, from the first import on; float takes an int.
install_import_hook(
    [
        "equipoise.decoding.logit_mixing",
        "equipoise.decoding.resampling",
        "equipoise.decoding.reward_guided",
        "equipoise.evaluation.between",
        "equipoise.evaluation.budgets",
        "equipoise.evaluation.front",
        "equipoise.evaluation.front_metrics",
        "equipoise.evaluation.pairwise",
        "equipoise.evaluation.palette_figures",
        "equipoise.evaluation.realised",
        "equipoise.evaluation.rewardbench",
        "equipoise.forests.backups",
        "equipoise.goals",
        "equipoise.models.logprobs",
        "equipoise.models.value_heads",
        "equipoise.objectives",
        "equipoise.palette.banks",
        "equipoise.palette.confidence",
        "equipoise.palette.dual",
        "equipoise.palette.explore",
        "equipoise.palette.feasibility",
        "equipoise.palette.quote",
        "equipoise.palette.targets",
        "equipoise.training.autoregressive",
        "equipoise.training.dpo",
        "equipoise.training.gating",
        "equipoise.training.held_out",
        "equipoise.training.linear",
        "equipoise.training.map_ppo",
        "equipoise.training.modpo",
        "equipoise.training.online_dpo",
        "equipoise.training.ppo",
        "equipoise.training.rewards_in_context",
        "equipoise.training.ridge",
        "equipoise.training.scored_round",
        "equipoise.training.sft",
        "equipoise.training.sipo",
        "equipoise.training.sipo_report",
        "equipoise.training.sipo_scores",
        "equipoise.training.soup",
        "equipoise.training.trl_policy",
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

from equipoise.models.loading import LanguageModel, eos_ids  # noqa: E402 after the hook
from equipoise.tiny import SPECIAL, build_llama, build_tokenizer  # noqa: E402
from equipoise.types import Message, Prompt  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def unchecked(monkeypatch) -> None:
    """Turns the hook off: what a function itself says about arrays of the wrong shape."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


@pytest.fixture
def apart(monkeypatch, tmp_path) -> None:
    """No keys, no proxies, and a cache folder of the test's own."""
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    for name in ("EQUIPOISE_API_KEY", "OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


TINY_WORDS = (*SPECIAL, "a", "b", "c", "d", ".")
FOLDER_WORDS = (
    *SPECIAL,
    *". , ! ? : ' user assistant system the a an and or but not no yes i you we it is are was be do does can".split(),  # noqa: SIM905
    *"how what why when where to of in on for with from please help me my your good bad safe make bread water".split(),  # noqa: SIM905
    *"time day people work car money home".split(),  # noqa: SIM905
)


def prompt(id: str, text: str) -> Prompt:
    """A conversation of one user turn."""
    return Prompt(id=id, messages=(Message(role="user", content=text),))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Eight tokens: <pad>, <unk>, </s>, a, b, c, d and the full stop."""
    return build_tokenizer(TINY_WORDS)


@pytest.fixture(scope="session")
def tiny_lm(tiny_tokenizer) -> LanguageModel:
    """Three layers, sixteen dimensions, eight tokens, 64 positions."""
    model = build_llama(len(TINY_WORDS), layers=3, max_position=64, seed=0)
    return LanguageModel(model=model, tokenizer=tiny_tokenizer, name="tiny", revision="seed 0", eos_ids=eos_ids(model, tiny_tokenizer))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A model folder that `load_model(str(folder))` reads: two layers, some 70 words, 256 positions."""
    folder = tmp_path_factory.mktemp("tiny-model")
    build_llama(len(FOLDER_WORDS), layers=2, max_position=256, seed=1).save_pretrained(folder)
    build_tokenizer(FOLDER_WORDS).save_pretrained(folder)
    return folder
