"""The stage `export`: what peft loads is what we serve at those weights, prompts are those of training, commands name what is there."""

from __future__ import annotations

import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

from conftest import prompt
from equipoise.cli import main
from equipoise.goals import Targets, target
from equipoise.models.adapters import served_rank, write_adapter
from equipoise.models.conditions import Wording, decode, weights_in_prompt
from equipoise.models.in_context import InContext, Scale
from equipoise.models.loading import Base, as_base, load_model, load_tokenizer, write_base
from equipoise.models.lora import WeightedLora
from equipoise.models.weighted_lora import add_weighted_lora, conditioned, folded, route_adapters, save_weighted, terms
from equipoise.objectives import Normaliser
from equipoise.runs import read_json
from equipoise.training.soup import Config, solve_tensors
from equipoise.types import Request
from peft_folders import edit, peft_folder, updates

IDS = torch.tensor([[3, 9, 20, 31, 8], [40, 7, 7, 30, 12]])
ENGINES = ("vllm", "sglang", "lorax", "llama.cpp")


@pytest.fixture(scope="module")
def parts(tiny_folder, tmp_path_factory):
    """Adapters x, y and z of ranks 2, 3 and 4 with layers of their own, `reads` whose adapters read weights; policies that read prompts."""
    root = tmp_path_factory.mktemp("export")
    lm = load_model(str(tiny_folder))
    base = as_base(lm)
    kinds = {"x": (2, ["q_proj", "down_proj"], False), "y": (3, ["q_proj", "v_proj"], True), "z": (4, ["q_proj", "v_proj"], False)}
    for seed, (name, (rank, layers, root_scale)) in enumerate(kinds.items()):
        plain = load_model(str(tiny_folder)).model
        folder, _ = peft_folder(root / name, rank, seed, base=plain, task_type="CAUSAL_LM", target_modules=layers, use_rslora=root_scale)
        edit(folder / "adapter_config.json", base_model_name_or_path="")
        write_base(folder, base)
    for name, shared in (("reads", 3), ("unshared", 0)):
        weighted = add_weighted_lora(lm, WeightedLora(shared_rank=shared, rank=2, targets=("q_proj", "v_proj")), ("a", "b"), seed=3)
        generator = torch.Generator().manual_seed(9)
        for parameter in weighted.model.parameters():
            if parameter.requires_grad:
                parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
        save_weighted(weighted, root / name)
    shutil.copytree(root / "x", root / "says")
    (root / "says" / "card.json").write_text(json.dumps({"objectives": ["a", "b"], "reads": "prompt"}))
    shutil.copytree(root / "says", root / "orphan")
    (root / "orphan" / "base.json").unlink()
    shutil.copytree(tiny_folder, root / "whole")
    shutil.copy(root / "says" / "card.json", root / "whole")
    shutil.copytree(root / "y", root / "ric" / "adapter")
    scale = Scale(normaliser=Normaliser(objectives=("a", "b"), mean_K=(0.0, 1.0), sd_K=(1.0, 2.0)), scorers={"a": "s1", "b": "s2"})
    rows = np.random.default_rng(0).normal(size=(40, 2))
    InContext(scale=scale, names=("good", "safe"), wording=Wording(specials=("</s>",)), rows_NK=rows).write(root / "ric")
    return root


def words(parts, out, engine: str, *more: str) -> list[str]:
    return ["export", "--out", str(out), "--engine", engine, *(word.format(p=parts) for word in more)]


SOUP = ("--soup", "[x={p}/x,y={p}/y,z={p}/z]")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def loaded(tiny_folder, folder):
    return PeftModel.from_pretrained(load_model(str(tiny_folder)).model, str(folder)).eval()


def refused(argv, capsys) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("equipoise: ")]
    assert len(said) == 1
    return said[0]


def test_a_soup_is_a_lora_per_weight_vector_and_peft_computes_what_we_serve(parts, tiny_folder, tmp_path):
    asked = {"w0.7_0.3_0": (5, 8), "w0.25_0.25_0.5": (9, 16), "w1.5_0_-0.5": (6, 8), "w0_0_1": (4, 8)}
    texts = json.dumps([name[1:].replace("_", ",") for name in asked])
    assert main(words(parts, tmp_path / "out", "vllm", *SOUP, "--weights", texts)) == 0
    record = read_json(tmp_path / "out" / "export.json")
    routed = route_adapters(load_model(str(tiny_folder)), {name: parts / name for name in "xyz"})
    assert list(record["served"]) == list(asked)
    for label, (rank, padded) in asked.items():
        folder, one = tmp_path / "out" / label, record["served"][label]
        weights = [one["weights"][name] for name in "xyz"]
        assert label == "w" + "_".join(f"{w:g}" for w in weights)
        assert (one["rank"], one["padded"], one["error"], one["folder"]) == (rank, padded, 0, label)
        assert read_json(folder / "adapter_config.json")["r"] == padded
        assert {t.shape["lora_B" in k] for k, t in load_file(folder / "adapter_model.safetensors").items()} == {padded}
        assert one["extrapolated"] is (label == "w1.5_0_-0.5")
        with conditioned(routed.model, torch.tensor([weights])):
            torch.testing.assert_close(logits(loaded(tiny_folder, folder)), logits(routed.model), atol=2e-5, rtol=1e-5)
    assert (record["max_lora_rank"], record["modules"]) == (16, ["down_proj", "q_proj", "v_proj"])
    assert record["model"] == str(tiny_folder)


def test_adapters_that_read_weights_are_plain_at_each(parts, tiny_folder, tmp_path):
    assert main(words(parts, tmp_path / "out", "sglang", "--policy", "{p}/reads", "--weights", '["0.3,0.7","1,0"]')) == 0
    weighted = load_model(str(parts / "reads")).model
    seen = []
    for label, weights in (("w0.3_0.7", [0.3, 0.7]), ("w1_0", [1.0, 0.0])):
        with conditioned(weighted, torch.tensor([weights])):
            seen.append(logits(weighted))
        torch.testing.assert_close(logits(loaded(tiny_folder, tmp_path / "out" / label)), seen[-1], atol=2e-5, rtol=1e-5)
        assert read_json(tmp_path / "out" / "export.json")["served"][label]["rank"] == 5
    assert (seen[0] - seen[1]).abs().max() > 0.05


numbers = st.floats(-2, 2, allow_nan=False, width=32)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.integers(1, 3), st.lists(numbers, min_size=1, max_size=3), st.integers(0, 999))
def test_folding_and_terms_are_the_bilinear_update(shared, mixed, weights, seed):
    """s B [C_0, sum_k w_k C_k] A written out in numpy, for any weights: one LoRA of it, and one for each weight."""
    rng = np.random.default_rng(seed)
    down, up = rng.normal(size=(shared + mixed, 5)), rng.normal(size=(4, shared + mixed))
    fixed, cores = rng.normal(size=(shared, shared)), rng.normal(size=(len(weights), mixed, mixed))
    core = np.zeros((shared + mixed, shared + mixed))
    core[:shared, :shared], core[shared:, shared:] = fixed, sum(w * c for w, c in zip(weights, cores, strict=True))
    want = 1.7 * up @ core @ down
    tensors = (torch.from_numpy(down), torch.from_numpy(up), torch.from_numpy(fixed), torch.from_numpy(cores))
    a, b = folded(tensors, 1.7, weights)
    np.testing.assert_allclose((b @ a).numpy(), want, atol=1e-9)
    pieces = terms(tensors, 1.7)
    assert [len(a) for a, _ in pieces] == [shared, *[mixed] * len(weights)]
    np.testing.assert_allclose(sum(w * b @ a for w, (a, b) in zip((1.0, *weights), pieces, strict=True)).numpy(), want, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.one_of(st.just(0.0), st.floats(0.01, 2)), min_size=3, max_size=3).filter(any))
def test_any_soup_read_back_is_the_sum_and_has_no_rank_for_nothing(tmp_path_factory, weights):
    """dW read from the padded file, in float64, against sum_k w_k B_k A_k; ranks 2, 3 and 4 count where the weight isn't 0."""
    generator = torch.Generator().manual_seed(1)
    adapters = [{"q": (torch.randn(r, 6, generator=generator), torch.randn(5, r, generator=generator))} for r in (2, 3, 4)]
    layers, _ = solve_tensors(adapters, weights, Config())
    rank = sum(r for r, w in zip((2, 3, 4), weights, strict=True) if w)
    assert layers["q"][0].shape == (rank, 6)
    folder = tmp_path_factory.mktemp("any")
    assert write_adapter(folder, layers, base=Base(), task=None, least=served_rank(rank)) == (16 if rank == 9 else 8)
    want = sum(w * (a["q"][1].double() @ a["q"][0].double()).numpy() for w, a in zip(weights, adapters, strict=True))
    np.testing.assert_allclose(updates(folder, 1.0)["q"], want, atol=1e-5)


def test_ranks_that_vllm_takes():
    assert [served_rank(r) for r in (1, 2, 8, 9, 257, 321, 512, 513)] == [1, 8, 8, 16, 320, 512, 512, None]


@pytest.mark.parametrize(("policy", "names"), [("reads", ["what all weights share", "a", "b"]), ("unshared", ["a", "b"])])
def test_llama_cpp_gets_the_terms_and_each_request_their_scales(parts, tmp_path, policy, names):
    assert main(words(parts, tmp_path / "out", "llama.cpp", "--policy", f"{{p}}/{policy}", "--weights", '["0.3,0.7"]')) == 0
    record = read_json(tmp_path / "out" / "export.json")
    assert list(record["parts"]) == names
    assert [part["id"] for part in record["parts"].values()] == list(range(len(names)))
    scales = {one["id"]: one["scale"] for one in record["served"]["w0.3_0.7"]["lora"]}
    assert list(scales.values()) == [*[1.0] * (len(names) - 2), 0.3, 0.7]
    got = [{n: scales[p["id"]] * m for n, m in updates(tmp_path / "out" / p["folder"], 1.0).items()} for p in record["parts"].values()]
    tensors = {k: t.double().numpy() for k, t in load_file(parts / policy / "adapter_model.safetensors").items()}
    for layer in got[0]:
        down, up, fixed, cores = (tensors[f"{layer}.{part}"] for part in ("down_rI", "up_Or", "fixed", "cores_K"))
        r1 = len(fixed)
        want = up[:, :r1] @ fixed @ down[:r1] + up[:, r1:] @ (0.3 * cores[0] + 0.7 * cores[1]) @ down[r1:]
        np.testing.assert_allclose(sum(one[layer] for one in got), 8.0 / 2 * want, atol=1e-5)  # s = alpha / r2


def test_llama_cpp_serves_a_soup_by_scales(parts, tmp_path, capsys):
    assert main(words(parts, tmp_path / "out", "llama.cpp", *SOUP, "--weights", '["0.5,0.2,0.3"]')) == 0
    assert "llama.cpp reads adapters as GGUF, which its convert_lora_to_gguf.py makes" in capsys.readouterr().err
    record = read_json(tmp_path / "out" / "export.json")
    assert record["served"]["w0.5_0.2_0.3"]["lora"] == [{"id": 0, "scale": 0.5}, {"id": 1, "scale": 0.2}, {"id": 2, "scale": 0.3}]
    for name, scale in (("x", 6 / 2), ("y", 6 / np.sqrt(3)), ("z", 6 / 4)):
        got, want = updates(tmp_path / "out" / record["parts"][name]["folder"], 1.0), updates(parts / name, scale)
        assert got.keys() == want.keys()
        for layer in want:
            np.testing.assert_allclose(got[layer], want[layer], atol=1e-6)
    page = (tmp_path / "out" / "README.md").read_text()
    assert page.count("convert_lora_to_gguf.py --base") == 3
    start = next(line for line in page.splitlines() if line.startswith("llama-server"))
    assert shlex.split(start).count("--lora") == 3
    assert start.endswith("--lora-init-without-apply")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_is_what_training_writes(parts, tiny_folder, tmp_path, engine):
    """The suffix behind a user's text is the prompt of the policy, as `sample` and training write it; the policy is an adapter."""
    assert main(words(parts, tmp_path / "out", engine, "--policy", "{p}/says", "--weights", '["0.3,0.7","b=1"]')) == 0
    record = read_json(tmp_path / "out" / "export.json")
    written = weights_in_prompt(load_tokenizer(str(tiny_folder)), ("a", "b"))
    for one in record["served"].values():
        weights = (one["weights"]["a"], one["weights"]["b"])
        want = written(Request(id="", prompt=prompt("p", "how do i help ?"), seed=0, weights=weights))
        assert "how do i help ?" + one["suffix"] == want.text
    assert record["served"]["w0.3_0.7"]["suffix"] == "\n\n<a> 0.30 <b> 0.70"
    assert {"<a>", "<b>", "</s>"} <= set(record["guarded"])
    assert record["adapter"] == {"folder": "policy", "rank": 2, "padded": 2 if engine == "llama.cpp" else 8, "error": 0}
    got, want = updates(tmp_path / "out" / "policy", 1.0), updates(parts / "x", 6 / 2)
    for layer in want:
        np.testing.assert_allclose(got[layer], want[layer], atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_whole_model_that_reads_its_prompt_is_served_as_it_is(parts, tmp_path, engine):
    assert main(words(parts, tmp_path / "out", engine, "--policy", "{p}/whole", "--steps", "1")) == 0
    record, page = read_json(tmp_path / "out" / "export.json"), (tmp_path / "out" / "README.md").read_text()
    assert record["model"] == str(parts / "whole")
    assert [one["suffix"] for one in record["served"].values()] == ["\n\n<a> 1.00 <b> 0.00", "\n\n<a> 0.00 <b> 1.00"]
    assert "lora" not in page.replace("lorax", "")
    assert "adapter" not in record
    assert ("convert_hf_to_gguf.py" in page) is (engine == "llama.cpp")


def test_a_policy_that_is_asked_for_scores(parts, tmp_path):
    words_ = words(parts, tmp_path / "out", "vllm", "--in_context", "{p}/ric", "--steps", "2", "--targets.rule", "lp:2")
    assert main(words_) == 0
    record, policy = read_json(tmp_path / "out" / "export.json"), InContext.read(parts / "ric")
    assert list(record["served"]) == ["w1_0", "w0.5_0.5", "w0_1"]
    for one in record["served"].values():
        want = target(np.array(list(one["weights"].values())), policy.rows_NK, Targets(rule="lp:2"))
        assert list(one["scores"].values()) == pytest.approx(want)
        plain, said = decode(prompt("p", "help" + one["suffix"]), policy.wording)
        assert plain.text == "help"
        assert list(said) == ["good", "safe"]
        assert list(said.values()) == pytest.approx(want, abs=0.05001)
    assert record["guarded"] == ["<good>", "<safe>", "</s>"]


@pytest.mark.parametrize("policy", [SOUP, ("--policy", "{p}/reads"), ("--policy", "{p}/says")])
@pytest.mark.parametrize("engine", ENGINES[:3])
def test_commands_name_what_was_written(parts, tmp_path, engine, policy):
    out = tmp_path / "out"
    assert main(words(parts, out, engine, *policy, "--steps", "2")) == 0
    record, page = read_json(out / "export.json"), (out / "README.md").read_text()
    assert "nobody ran them" in page
    blocks = [block.strip().splitlines() for block in page.split("```")[1::2]]
    start, ask = shlex.split(blocks[-2][0]), shlex.split(blocks[-1][0])
    body = json.loads(ask[ask.index("-d") + 1])
    label = next(iter(record["served"]))
    name = "policy" if "says" in policy[1] else label
    if engine == "lorax":
        mounts = [start[i + 1] for i, word in enumerate(start) if word == "-v"]
        assert f"{out}:/data" in mounts
        assert body["model"] == f"/data/{name}"
    else:
        assert body["model"] == (name if engine == "vllm" else f"{record['model']}:{name}")
        entries = dict(word.split("=", 1) for word in start if "=" in word)
        assert start[start.index("--max-lora-rank") + 1] == str(record["max_lora_rank"])
        assert all((out / name / "adapter_config.json").samefile(f"{folder}/adapter_config.json") for name, folder in entries.items())
        assert list(entries) == (["policy"] if name == "policy" else list(record["served"]))
    assert body["messages"][-1]["content"].endswith(record["served"][label].get("suffix", "?"))


def test_a_killed_export_is_finished_to_the_same_bytes(parts, tmp_path):
    argv = words(parts, tmp_path / "out", "vllm", *SOUP, "--steps", "1")
    assert main(argv) == 0
    files = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file() and p.name != "manifest.json"}
    outputs = read_json(tmp_path / "out" / "manifest.json")["outputs"]
    assert {str(p.relative_to(tmp_path / "out")) for p in files} == {*outputs, "started.json"}
    for gone in ("manifest.json", "export.json", "w0_1_0/adapter_model.safetensors"):
        (tmp_path / "out" / gone).unlink()
    assert main(argv) == 0
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file() and p.name != "manifest.json"} == files


def test_an_adapter_of_too_high_a_rank_is_refused_and_cut_on_request(parts, tiny_folder, tmp_path, capsys):
    lm = load_model(str(tiny_folder))
    generator = torch.Generator().manual_seed(0)
    size = lm.hidden_size
    layers = {"model.layers.0.self_attn.q_proj": (torch.randn(513, size, generator=generator), torch.randn(size, 513, generator=generator))}
    write_adapter(tmp_path / "wide", layers, base=as_base(lm), task="CAUSAL_LM")
    argv = words(parts, tmp_path / "out", "vllm", "--soup", f"[x={tmp_path}/wide]", "--weights", '["1"]')
    assert "the adapter has rank 513, and engines take 512 at most: cut it with --rank 512" in refused(argv, capsys)
    assert main([*words(parts, tmp_path / "cut", "vllm", *argv[5:]), "--rank", "5"]) == 0
    one = read_json(tmp_path / "cut" / "export.json")["served"]["w1"]
    assert (one["rank"], one["padded"]) == (5, 8)
    dense = (layers["model.layers.0.self_attn.q_proj"][1].double() @ layers["model.layers.0.self_attn.q_proj"][0].double()).numpy()
    singular = np.linalg.svd(dense, compute_uv=False)
    assert one["error"] == pytest.approx(np.sqrt((singular[5:] ** 2).sum() / (singular**2).sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "one of soup, policy and in_context"),
        ([*SOUP, "--policy", "{p}/reads"], "one of soup, policy and in_context"),
        ([*SOUP, "--weights", '["x=0.5,q=0.5"]'], "unknown objective 'q' in the weights; known: x, y, z"),
        ([*SOUP, "--weights", '["0.5,0.5"]'], "2 weights (0.5, 0.5) for 3 objectives (x, y, z)"),
        ([*SOUP, "--weights", '["0,0,0"]'], "all weights are 0"),
        (["--policy", "{p}/reads", "--weights", '["a=1,x=0"]'], "unknown objective 'x' in the weights; known: a, b"),
        (["--policy", "{p}/reads", "--weights", '["a=0.9,b=0.3"]'], "sum to 1.2, not 1"),
        (["--policy", "{p}/says", "--weights", '["1.5,-0.5"]'], "weights are at least 0"),
        (["--policy", "{p}/x"], "{p}/x reads no weights"),
        (["--policy", "{p}/absent"], "no policy folder at {p}/absent"),
        (["--policy", "{p}/orphan"], "the adapters don't say which model they are for: give --model"),
        ([*SOUP, "--targets.rule", "linear"], "targets are read beside in_context alone"),
        ([*SOUP, "--rank", "-1"], "rank must be at least 0, got -1"),
        (["--in_context", "{p}/x"], "{p}/x has no in_context.json"),
        (["--soup", "[x={p}/reads]"], "holds adapters that read weights"),
        ([*SOUP, "--model", "{p}/nowhere"], "no model folder at {p}/nowhere"),
    ],
)
def test_bad_exports_are_one_line(parts, tmp_path, capsys, more, says):
    assert says.format(p=parts) in refused(words(parts, tmp_path / "out", "vllm", *more), capsys)


def test_adapters_of_other_models_are_refused(parts, tiny_folder, tmp_path, capsys):
    other = shutil.copytree(parts / "y", tmp_path / "other")
    write_base(other, Base(name="elsewhere", key="0123456789abcdef"))
    mixed = words(parts, tmp_path / "a", "vllm", "--soup", f"[x={{p}}/x,y={other}]")
    assert "trained on different models" in refused(mixed, capsys)
    changed = shutil.copytree(tiny_folder, tmp_path / "changed")
    tensors = (changed / "model.safetensors").read_bytes()
    (changed / "model.safetensors").write_bytes(tensors[:-1] + bytes([tensors[-1] ^ 1]))
    said = refused(words(parts, tmp_path / "b", "vllm", *SOUP, "--model", str(changed)), capsys)
    assert f"the adapters were trained on '{tiny_folder}'" in said
    assert "not on the weights of" in said
    assert refused(words(parts, tmp_path / "c", "tgi", *SOUP), capsys)
