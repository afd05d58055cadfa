"""The commands `palette` (what an ask costs) and `palette apply` (serve solved palettes on held-out prompts)."""

from __future__ import annotations

import json as jsonlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.progress import bar
from equipoise.runs import file_digest, manifest_of, plain, read_json, stage, write_json, write_text
from equipoise.stages import common
from equipoise.stages.steering import model_for, sampler_of, steering_of, weighted_way
from equipoise.stages.ways import Way
from equipoise.types import Sampler, UserError

if TYPE_CHECKING:
    from equipoise.models.loading import LanguageModel
    from equipoise.palette.banks import Bank
    from equipoise.palette.dual import Problem
    from equipoise.palette.quote import Quote


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Ask for outcomes instead of weights: whether they can be had, at what price, with how many candidates."""

    bank: Path
    """A `sample` folder that was scored, or a CSV(.gz) or Parquet file with a column of numbers per objective."""
    ask: str
    """What is wanted, as 'humor>=q70 helpful>=keep harmless>=+0.3 length<=5 safe>=+10%'."""
    dual: str = "auto"
    """grouped (choosing among n candidates of a prompt), per-prompt, pooled (MAP), or auto: grouped where prompts have several samples."""
    n: int = 0
    """Candidates per response of the grouped dual; 0 for as many samples as the bank's prompts have."""
    reference: str = ""
    """Bank that quantiles and means refer to, where --bank is of a steered sampler: gives the residual dual."""
    prompt_column: str = "prompt_id"
    """Column of a table that says which rows answer the same prompt."""
    sequential: int = 0
    """Rounds of solving one objective at a time, shown beside the joint solution."""
    explore: bool = False
    """Draw the region of levels that can be had and that of multipliers that improve every objective."""
    draws: int = 400
    """Random multipliers to explore with."""
    n_boot: int = 200
    """Bootstrap replicates of the intervals; 0 for none. Banks of over 100,000 rows take fewer, at least 20: their intervals are narrow."""
    seed: int = 0
    """Of the groups, the bootstrap and the exploration."""
    out: str = ""
    """Folder for palette.json and the figures; with --explore it is runs/palette if none is given."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        for name, low in (("sequential", 0), ("draws", 1), ("n_boot", 0)):
            if getattr(self, name) < low:
                raise UserError(f"{name} must be at least {low}, got {getattr(self, name)}")


def palette(config: Palette) -> str:
    """Quote an ask: a table, or one JSON object; with `out` also palette.json and figures."""
    from equipoise.evaluation.palette_text import palette_table
    from equipoise.palette.explore import explore
    from equipoise.palette.quote import as_json, problem_of, quote

    bank = bank_of(config.bank, config.prompt_column)
    reference = bank_of(Path(config.reference), config.prompt_column) if config.reference else None
    boots = min(config.n_boot, max(20, 20_000_000 // len(bank.reward_NK))) if len(bank.starts_P) > 1 else 0
    with bar(f"bootstrap over {len(bank.starts_P)} prompts", boots) as advance:
        found = quote(bank, config.ask, dual=config.dual, n=config.n, reference=reference, n_boot=boots, seed=config.seed, progress=advance)
    record = as_json(found, bank, config.seed)
    record |= {"bank": str(config.bank), "reference": config.reference or None}
    record["cost"] = _cost(config.bank, found)
    problem = problem_of(bank.scored(found.targets.objectives), found.dual, found.n, seed=config.seed)
    if config.sequential:
        record["sequential"] = _sequential(problem, found, config.sequential)
    explored = explore(problem, config.draws, seed=config.seed) if config.explore else None
    if explored is not None:
        meets = (explored.level_DK >= found.targets.floor_K) & (explored.level_DK <= found.targets.ceiling_K)
        record["explored"] = {"draws": config.draws, "improve_all": explored.improves_D.mean(), "meet": meets.all(axis=1).mean()}
    if config.out or config.explore:
        from equipoise.evaluation.palettes import palette_figures

        folder = Path(config.out or "runs/palette")
        record["files"] = [str(folder / "palette.json")]
        for name, text in palette_figures(found, bank, problem, explored).items():
            write_text(folder / name, text)
            record["files"].append(str(folder / name))
        record["serve"] = _serving(config.bank)
        record["multiplier_replicates"] = found.multiplier_BK
        write_json(folder / "palette.json", record)
        del record["multiplier_replicates"]  # for `palette apply`, not for the eye
    if config.json:
        return jsonlib.dumps(plain(record), allow_nan=False)
    return palette_table(record)


def bank_of(path: Path, prompt_column: str = "prompt_id") -> Bank:
    """The bank of a scored `sample` folder or of a table."""
    from equipoise.data.banks import read_bank
    from equipoise.palette.banks import Bank
    from equipoise.rewards.scoring import read_rewards
    from equipoise.rollouts import read_rollouts

    if not path.is_dir():
        return read_bank(path, prompt_column)
    manifest_of(path, "sample")
    rollouts = read_rollouts(path / "rollouts")
    rewards = read_rewards(path / "rewards", rollouts)
    return Bank.of(rewards.objectives, rewards.reward_NK, [r.prompt_id for r in rollouts])


def _cost(path: Path, found: Quote) -> dict[str, float | int | None]:
    """What serving one response takes: candidates, scores, and backbone tokens where the bank's rollouts say."""
    n = found.n if found.dual == "grouped" else None
    cost: dict[str, float | int | None] = {"candidates": n, "scores": n * len(found.targets.objectives) if n else None}
    if path.is_dir() and n:
        from equipoise.rollouts import read_rollouts

        rollouts = read_rollouts(path / "rollouts")
        tokens = sum(r.base_forwards + r.guide_forwards for r in rollouts) / len(rollouts)
        prompt = sum(r.prompt_tokens for r in rollouts) / len(rollouts)
        if tokens:  # a server may not count them
            cost |= {"backbone_tokens": n * (tokens - prompt) + prompt, "backbone_tokens_of_one": tokens}
    return cost


def _sequential(problem: Problem, found: Quote, rounds: int) -> dict[str, Any]:
    from equipoise.palette.dual import sequential

    reached, missed = sequential(problem, found.targets.floor_K, found.targets.ceiling_K, rounds)
    names = found.targets.objectives
    return {"shortfall": missed.tolist(), "multipliers": dict(zip(names, reached.multiplier_K.tolist(), strict=True))}


def _serving(path: Path) -> dict[str, Any] | None:
    """What `palette apply` needs of the bank: the sampler, its scorers, and the prompts that are spoken for."""
    if not path.is_dir():
        return None
    return {
        "sample": manifest_of(path, "sample")["config"],
        "score": manifest_of(path / "rewards", "score")["config"],
        "bank": _digests(path),
    }


def _digests(bank: Path) -> list[str]:
    return [file_digest(bank / "manifest.json"), file_digest(bank / "rewards" / "manifest.json")]


@dataclass(frozen=True, kw_only=True)
class Apply:
    """Serve solved palettes on prompts that they weren't solved on: realised levels beside the targets."""

    out: Path
    """Run folder to write."""
    palettes: tuple[Path, ...]
    """Folders that `palette --out` wrote, all on one bank."""
    prompts: str = "equipoise"
    """"equipoise", KIND:FILE of pairs such as hh:FILE, or a JSON-lines FILE."""
    split: str = "test"
    """Split of the prompts; never the one the bank was sampled from."""
    limit: int = 0
    """Most prompts; 0 for all."""
    responses: int = 1
    """Responses per prompt, each from candidates of its own."""
    n: int = 0
    """Candidates of palettes that say no number themselves (pooled ones); 0 for the most that another one has."""
    closed_loop: bool = False
    """Also serve each palette with a confidence sequence that corrects its multipliers on the way."""
    n_boot: int = 2000
    """Bootstrap resamples of the prompts."""
    seed: int = 1
    """Fixes every candidate and every choice."""


def apply(config: Apply) -> str:
    """Sample and score the candidates once, choose by each palette, write applied.json and figures; returns a table."""
    from equipoise.data.prompts import prompts_file
    from equipoise.decoding.choosing import candidate_requests
    from equipoise.evaluation.palette_text import applied_table
    from equipoise.evaluation.palettes import applied, applied_figures
    from equipoise.rewards import load_rewards, needs_model
    from equipoise.rewards.scoring import score_shards
    from equipoise.rollouts import SHARD_BATCHES, collect, make_requests

    records = [solved(folder) for folder in config.palettes]
    most = _candidates(config, records)
    serve = records[0]["serve"]
    prompts = common.prompts_of(config.prompts, config.split, config.limit)
    trained = {p.text for p in common.prompts_of_run(Path(records[0]["bank"]), "sample")}
    leaked = [p.id for p in prompts if p.text in trained]
    if leaked:
        raise UserError(f"prompt {leaked[0]!r} and {len(leaked) - 1} more are in the bank; apply the palettes to another split")
    parents = {f"palette {i}": folder / "palette.json" for i, folder in enumerate(config.palettes)}
    parents["prompts"] = prompts_file(config.prompts)
    with stage(config.out, "palette apply", common.settings_of(config), parents) as run:
        if run.done:
            return applied_table(read_json(run.folder / "applied.json"))
        steering = steering_of(serve["sample"])
        sampler = sampler_of(model_for(serve["sample"]), serve["sample"], steering)
        requests = make_requests(prompts, config.responses, config.seed, steering.weights if steering else None)
        candidates = candidate_requests(requests, most)
        with bar(f"sampling {most} candidates for {len(requests)} responses", len(candidates)) as advance:
            size = SHARD_BATCHES * serve["sample"]["sampling"]["batch_size"]
            rollouts = collect(sampler, candidates, run.folder / "rollouts", size, advance)
        scorers = serve["score"]["rewards"]
        rewards = load_rewards(scorers, common.model_of(serve["score"]["model"]) if needs_model(scorers) else None)
        with bar(f"scoring {', '.join(serve['score']['rewards'])}", len(rollouts)) as advance:
            scored = score_shards(rewards, {p.id: p for p in prompts}, rollouts, run.folder / "rewards", serve["score"]["shard"], advance)
        reward_QNK = scored.reward_NK.reshape(len(requests), most, -1)
        result = applied(records, requests, reward_QNK, scored.objectives, config.closed_loop, config.n_boot, config.seed)
        write_json(run.folder / "applied.json", result)
        figures = applied_figures(result, bank_of(Path(records[0]["bank"])))
        for name, text in figures.items():
            write_text(run.folder / name, text)
        run.outputs += sorted(run.folder.glob("r*/*.parquet")) + [run.folder / name for name in ("applied.json", *figures)]
        run.facts |= {"responses": len(requests), "candidates": len(candidates), "prompts": len(prompts)}
    return applied_table(result)


def solved(folder: Path) -> dict[str, Any]:
    """A palette.json that can be served. Raises `UserError` for one that can't be had, or of a table instead of a run."""
    record: dict[str, Any] = read_json(folder / "palette.json")
    if not record.get("serve"):
        raise UserError(f"{folder} was solved on {record.get('bank')}, a table without a sampler; solve it on a scored `sample` folder")
    if not record["feasible"]:
        raise UserError(f"{folder} can't be had (margin {record['margin_sd']:.3f} sd); ask for the nearest levels that it names")
    bank = Path(record["bank"])
    if _digests(bank) != record["serve"]["bank"]:
        raise UserError(f"{bank} was sampled or scored again since {folder} was solved on it; run `palette` again")
    return record | {"folder": str(folder)}


_SLACK = 1e-6
"""Share of all pull below which an objective's is the solver's rounding."""


def palette_way(folder: Path, objectives: tuple[str, ...], n: int, model: str) -> Way:
    """A solved palette over the reference as one point of a comparison: j ~ softmax(v . R_j) among n candidates of a prompt.

    Its place is w_k = v_k sd_k / sum_j v_j sd_j, sd_k of its bank's rewards and 0 for an objective that wasn't asked for: softmax of v . R
    is that of beta^-1 w . z, z the standardised rewards, with beta^-1 = sum_j v_j sd_j. `n` is for a palette that has no number itself.

    Raises `UserError` for one that can't be served, was solved on steered responses or those of another model, asks for other
    objectives, or has no place: a multiplier below 0, which asks for less of something, or none above.
    """
    import numpy as np

    from equipoise.decoding.palette import PaletteSampler
    from equipoise.rewards import artefacts, load_rewards, parse_name

    record = solved(folder)
    v, sampled, n = record["multipliers"], record["serve"]["sample"], record["n"] or n
    if record["reference"] or weighted_way(sampled):
        raise UserError(f"{folder} was solved on steered responses; a comparison draws its candidates from the reference")
    if sampled["model"] != model:
        raise UserError(f"{folder} was solved on responses of {sampled['model']}, and the comparison is of {model}")
    if not set(v) <= set(objectives):
        raise UserError(f"{folder} asks for {', '.join(v)}; the rewards are {', '.join(objectives)}")
    if not n:
        raise UserError(f"{folder} says no number of candidates: set palette_n, or solve it with --dual grouped")
    strength = {name: v[name] * record["sd"][name] for name in v}
    total = sum(abs(s) for s in strength.values())
    less = [name for name, s in strength.items() if s < -_SLACK * total]
    if less or not total:
        why = f"{less[0]} has the multiplier {v[less[0]]:.3g}" if less else "all its multipliers are 0"
        raise UserError(f"{folder} has no place among weights of at least 0: {why}")
    pull = {name: s for name, s in strength.items() if s > _SLACK * total}
    scorers = [entry for entry in record["serve"]["score"]["rewards"] if parse_name(entry)[0] in v]

    def over(lm: LanguageModel, inner: Sampler) -> Sampler:
        rewards = load_rewards(scorers, lm)
        return PaletteSampler(inner, rewards, np.array([v[reward.name] for reward in rewards]), n)

    bank = Path(record["bank"])
    files = [folder / "palette.json", bank / "manifest.json", bank / "rewards" / "manifest.json", *artefacts(scorers)]
    return Way(
        objectives=objectives,
        parents={f"palette {folder}: {file}": file for file in files},
        guide=lambda lm: None,
        fixed=tuple(pull.get(name, 0.0) / sum(pull.values()) for name in objectives),
        over=over,
    )


def _candidates(config: Apply, records: list[dict[str, Any]]) -> int:
    """The most candidates that a palette needs; fills in the number where a palette has none."""
    if not records:
        raise UserError("no palettes given; give the folders that `equipoise palette --out` wrote")
    if len({record["bank"] for record in records}) > 1:
        raise UserError(f"{records[0]['folder']} and another palette were solved on different banks; apply them one by one")
    known = [record["n"] for record in records if record["n"]]
    default = config.n or max(known, default=0)
    if not default:
        raise UserError("none of the palettes says how many candidates to draw; give --n, or solve one with --dual grouped")
    for record in records:
        record["n"] = record["n"] or default
    return max(record["n"] for record in records)
