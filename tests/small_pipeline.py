"""The stages as command lines for a tiny model and text rewards: seconds instead of minutes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

ASKED = ("how do i make bread", "what is good for people", "why is water safe", "when do you work", "help me with my car", "is home good")
ENDS = ("?", "please ?", ", yes or no ?")
REWARDS = ("brief", "diverse")


def write_prompts(path: Path) -> Path:
    """Eighteen prompts in words that the tiny model knows; every third is held out."""
    rows = [{"id": f"t{i:02d}", "prompt": f"{a} {e}"} for i, (a, e) in enumerate(itertools.product(ASKED, ENDS))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command_lines(out: Path, model: Path, prompts: Path) -> dict[str, list[str]]:
    """Arguments of each stage, in the order in which they run; everything is written under `out`."""
    train, values, sweep = str(out / "train"), str(out / "values"), str(out / "sweep")
    return {
        "sample": [
            *f"sample --out {train} --model {model} --prompts {prompts} --samples 6".split(),
            *["--sampling.max_new_tokens", "8", "--sampling.top_k", "12", "--sampling.batch_size", "2"],
        ],
        "score": f"score --run {train} --model {model} --rewards [{','.join(REWARDS)}] --shard 16".split(),
        "train value": f"train value --out {values} --run {train} --value.folds 4 --value.shard_rollouts 6".split(),
        "sweep": [
            *f"sweep --out {sweep} --values {values} --prompts {prompts} --steps 2 --samples 3 --reference_samples 4".split(),
            *f"--kl_budget 0.5 --prefix_prompts 2 --rewards [{','.join(REWARDS)}] --judges [readable]".split(),
        ],
        "evaluate": f"evaluate --sweep {sweep} --best_of [2,4] --guided_best_of [2] --n_boot 200".split(),
        "report": f"report --evaluation {sweep}/evaluation.json --out {out}/report.html".split(),
    }
