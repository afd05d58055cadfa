"""How an engine is started on what `export` wrote, and asked: the README.md beside it, made of export.json alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PORTS = {"vllm": 8000, "sglang": 30000, "lorax": 8080, "llama.cpp": 8080}
_ON_GPU = 8
"""Adapters that vLLM and SGLang keep on the accelerator at once; the others wait in memory."""


def lora_folders(record: Mapping[str, Any]) -> dict[str, str]:
    """What is served -> its LoRA folder, in the order in which an engine is given them."""
    if "parts" in record:
        return {name: part["folder"] for name, part in record["parts"].items()}
    if "adapter" in record:
        return {record["adapter"]["folder"]: record["adapter"]["folder"]}
    return {name: one["folder"] for name, one in record["served"].items() if "folder" in one}


def readme(record: Mapping[str, Any], out: Path) -> str:
    """The page: what is here, how it is started, how it is asked."""
    engine, label = record["engine"], next(iter(record["served"]))
    loras = {name: str(out.absolute() / folder) for name, folder in lora_folders(record).items()}
    prepare, start = _START[engine](record, loras)
    lines = [f"# {', '.join(record['objectives'])} in {engine}", "", _what(record), ""]
    lines += [
        "The commands below are text: nobody ran them when this was written, and engines change. Paths are those of this machine.",
        "",
    ]
    if prepare:
        lines += ["## Prepare", "", *_block(prepare), ""]
    lines += ["## Start", "", *_block([start]), "", "## Ask", "", f"At {_said(record['served'][label]['weights'])}:", ""]
    request = {**_request(record, label), "messages": [{"role": "user", "content": "How do I bake bread?" + _suffix(record, label)}]}
    body = json.dumps(request, ensure_ascii=False)
    url = f"http://localhost:{_PORTS[engine]}/v1/chat/completions"
    lines += [*_block([f"curl {url} -H 'Content-Type: application/json' -d {shlex.quote(body)}"]), ""]
    lines += _notes(record)
    rows = [f"| {name} | {_said(one['weights'])} | {_serves(one)} |" for name, one in record["served"].items()]
    return "\n".join([*lines, "", "| name | weights | served by |", "|---|---|---|", *rows, ""])


def _what(record: Mapping[str, Any]) -> str:
    if "guarded" in record:
        return (
            "The policy reads its prompt: the text `suffix` of export.json is put behind the last user turn, exactly as it stands. One of "
            "the strings `guarded` in a user's own text, in any case, would be read as part of it: `equipoise.models.conditions.encode` "
            "escapes them as in training; elsewhere refuse such texts."
        )
    cut = max(one["error"] for one in (record.get("parts") or record["served"]).values())
    exact = f"cut by {cut:.1%} of its norm at most" if cut else "exact"
    if "parts" in record:
        return f"Each folder is a term of the update, {exact}, and the scales that a request names make their sum, at any weights."
    return f"Each folder is one LoRA, the policy at its weights, {exact}; rows of zeros bring its rank to one that vLLM takes."


def _notes(record: Mapping[str, Any]) -> list[str]:
    notes = []
    if record["engine"] == "llama.cpp" and "parts" in record:
        notes.append("Adapters that a request leaves out have scale 0, and requests of other scales run in batches of their own.")
    elif "guarded" not in record:
        notes.append("Weights that aren't listed need a folder of their own: run `equipoise export` with them.")
    if record["engine"] == "lorax" and "guarded" not in record:
        notes.append("LoRAX's own merging (`merged_adapters`) averages the factors, which is another model than their sum.")
    if record["engine"] == "vllm" and lora_folders(record):
        notes.append("While vLLM runs, /v1/load_lora_adapter adds a folder where VLLM_ALLOW_RUNTIME_LORA_UPDATING=True is set.")
    return notes


def _request(record: Mapping[str, Any], label: str) -> dict[str, Any]:
    """What a request names besides its messages."""
    engine, one, loras = record["engine"], record["served"][label], lora_folders(record)
    model = record["model"]
    if engine == "llama.cpp":
        return {"lora": one["lora"]} if "lora" in one else {}
    if not loras:
        return {"model": model}
    name = label if label in loras else next(iter(loras))
    if engine == "sglang":
        return {"model": f"{model}:{name}"}
    return {"model": f"/data/{loras[name]}" if engine == "lorax" else name}


def _vllm(record: Mapping[str, Any], loras: Mapping[str, str]) -> tuple[list[str], str]:
    words = ["vllm", "serve", record["model"]]
    if loras:
        words += ["--enable-lora", "--max-lora-rank", str(record["max_lora_rank"])]
        words += ["--max-loras", str(min(len(loras), _ON_GPU)), "--max-cpu-loras", str(len(loras))]
        words += ["--lora-modules", *(f"{name}={folder}" for name, folder in loras.items())]
    return [], shlex.join(words)


def _sglang(record: Mapping[str, Any], loras: Mapping[str, str]) -> tuple[list[str], str]:
    words = ["python", "-m", "sglang.launch_server", "--model-path", record["model"]]
    if loras:
        words += ["--enable-lora", "--max-lora-rank", str(record["max_lora_rank"]), "--lora-target-modules", *record["modules"]]
        words += ["--max-loras-per-batch", str(min(len(loras), _ON_GPU))]
        words += ["--lora-paths", *(f"{name}={folder}" for name, folder in loras.items())]
    return [], shlex.join(words)


def _lorax(record: Mapping[str, Any], loras: Mapping[str, str]) -> tuple[list[str], str]:
    image = "ghcr.io/predibase/lorax:main"
    words = ["docker", "run", "--gpus", "all", "--shm-size", "1g", "-p", f"{_PORTS['lorax']}:80"]
    if loras:
        words += ["-v", f"{Path(next(iter(loras.values()))).parent}:/data"]
    model = record["model"]
    if Path(model).is_absolute():
        words, model = [*words, "-v", f"{model}:/model"], "/model"
    return [], shlex.join([*words, image, "--model-id", model, *(["--default-adapter-source", "local"] if loras else [])])


def _llama_cpp(record: Mapping[str, Any], loras: Mapping[str, str]) -> tuple[list[str], str]:
    prepare, gguf = [], record.get("gguf", "model.gguf")
    if "gguf" not in record:
        prepare.append(shlex.join(["python", "convert_hf_to_gguf.py", record["model"], "--outfile", gguf, "--outtype", "f16"]))
    for folder in loras.values():
        words = ["python", "convert_lora_to_gguf.py", "--base", record["model"], "--outfile", f"{folder}.gguf", "--outtype", "f32", folder]
        prepare.append(shlex.join(words))
    words = ["llama-server", "-m", gguf, "--port", str(_PORTS["llama.cpp"])]
    words += [word for folder in loras.values() for word in ("--lora", f"{folder}.gguf")]
    return prepare, shlex.join([*words, *(["--lora-init-without-apply"] if "parts" in record else [])])


_START = {"vllm": _vllm, "sglang": _sglang, "lorax": _lorax, "llama.cpp": _llama_cpp}


def _block(lines: Sequence[str]) -> list[str]:
    return ["```", *lines, "```"]


def _said(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in weights.items())


def _suffix(record: Mapping[str, Any], label: str) -> str:
    return str(record["served"][label].get("suffix", ""))


def _serves(one: Mapping[str, Any]) -> str:
    if "suffix" in one:
        return f"`{json.dumps(one['suffix'])}`"
    if "lora" in one:
        return ", ".join(f"{part['id']}: {part['scale']:g}" for part in one["lora"])
    return f"{one['folder']}, rank {one['rank']} in {one['padded']}" + (", extrapolated" if one["extrapolated"] else "")
