"""The stages `sweep`, `evaluate` and `report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.models.generation import Sampling
from equipoise.progress import bar
from equipoise.runs import file_digest, manifest_of, read_json, stage, write_json, write_text
from equipoise.stages import common
from equipoise.types import Prompt, UserError


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Steer along the whole trade-off on held-out prompts, beside the reference."""

    out: Path
    """Run folder to write."""
    values: Path
    """A `train value` folder; `compare` takes value models, as any other method."""
    prompts: str = "equipoise"
    """"equipoise", KIND:FILE of pairs such as hh:FILE, or a JSON-lines FILE."""
    split: str = "test"
    """Split of the prompts; never the one the values saw."""
    limit: int = 0
    """Most prompts; 0 for all."""
    steps: int = 4
    """The weights are multiples of 1/steps."""
    samples: int = 4
    """Responses per prompt and weight vector."""
    reference_samples: int = 8
    """Responses of the reference per prompt; best-of-n and resampling choose among them."""
    kl_budget: float = 1.0
    """Nats per response that steering may spend."""
    prefix_prompts: int = 0
    """Prompts on which the prefix form is run at the ends of the simplex; 0 for none."""
    rewards: tuple[str, ...] = ("helpful", "harmless")
    """The objectives, as the values were trained on them."""
    judges: tuple[str, ...] = ("judge_helpful", "judge_harmless")
    """Scorers that nothing was trained on, for the report."""
    seed: int = 1
    """Fixes every response."""

    def __post_init__(self) -> None:
        common.check_counts(samples=self.samples, reference_samples=self.reference_samples)


def sweep(config: Sweep) -> Path:
    """Run the sweep and return its folder."""
    from equipoise.data.prompts import prompts_file
    from equipoise.data.splits import refuse_leaks
    from equipoise.decoding.value_guided import PolicySampler, make_guide
    from equipoise.evaluation.sweep import sweep_point
    from equipoise.models.steps import branches
    from equipoise.models.value_heads import ValueHeads
    from equipoise.models.value_models import is_value_model
    from equipoise.objectives import simplex_grid
    from equipoise.rewards import artefacts, load_rewards, parse_name
    from equipoise.rollouts import SHARD_BATCHES

    if is_value_model(config.values / "model"):
        raise UserError(f"{config.values} is a value model, which `compare` takes as a method; a sweep steers by heads of `train value`")
    heads = ValueHeads.load(config.values / "values.safetensors")
    objectives = tuple(parse_name(entry)[0] for entry in config.rewards)
    if objectives != heads.objectives:
        raise UserError(f"the values are for {', '.join(heads.objectives)}, in this order; rewards are {', '.join(objectives)}")
    trained_on = rollouts_of(config.values)
    sampled = manifest_of(trained_on, "sample")["config"]
    sampling = Sampling(**sampled["sampling"])
    prompts = common.prompts_of(config.prompts, config.split, config.limit)
    refuse_leaks(prompts, common.prompts_of_run(trained_on, "sample"), "to train the values", "sweep another split")
    parents = {"values": config.values / "manifest.json", "prompts": prompts_file(config.prompts)}
    parents |= {str(file): file for file in artefacts([*config.rewards, *config.judges])}
    with stage(config.out, "sweep", common.settings_of(config), parents) as run:
        if run.done:
            return config.out
        lm = common.model_of(sampled["model"], sampled["trust_remote_code"])
        rewards = load_rewards([*config.rewards, *config.judges], lm)
        grid = simplex_grid(len(heads.objectives), config.steps)
        few = prompts[:: max(1, len(prompts) // config.prefix_prompts)][: config.prefix_prompts] if config.prefix_prompts else []
        plan: list[tuple[str, tuple[float, ...] | None, list[Prompt], int]] = [("reference", None, prompts, config.reference_samples)]
        plan += [("single-pass", w, prompts, config.samples) for w in grid]
        plan += [("prefix", w, few, 1) for w in grid if few and max(w) == 1.0]
        with bar(f"sweeping {len(plan)} points on {len(prompts)} unseen prompts", sum(len(p) * n for _, _, p, n in plan)) as advance:
            for method, weights, chosen, count in plan:
                guide = make_guide(lm, heads, method, branches(lm, sampling), kl_budget=config.kl_budget) if weights else None
                sampler = PolicySampler(lm, sampling, guide)
                size = SHARD_BATCHES * sampling.batch_size
                point = sweep_point(run.folder, method, sampler, weights, chosen, count, config.seed, rewards, size, sampled=advance)
                run.outputs += sorted((run.folder / point.source).glob("*/*.parquet"))
    return config.out


def rollouts_of(values: Path) -> Path:
    """The `sample` folder that value heads were trained on."""
    return Path(manifest_of(values, "train value")["config"]["run"])


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Turn a sweep into fronts, intervals and comparisons."""

    sweep: Path
    """A `sweep` folder."""
    best_of: tuple[int, ...] = (2, 4, 8)
    """n of best-of-n over the reference's samples."""
    guided_best_of: tuple[int, ...] = (2, 4)
    """n of best-of-n over the steered samples."""
    resampling_beta: float = 0.5
    """beta of Monte-Carlo resampling over all reference samples, in standard deviations of the reward."""
    ref_point: float = -1.0
    """Reference point of the hypervolume on every objective, in standard deviations below the reference's mean."""
    n_boot: int = 2000
    """Bootstrap resamples of the prompts."""
    examples: int = 3
    """Prompts shown with their responses."""
    seed: int = 0
    """Of the bootstrap and the resampling."""


def evaluate(config: Evaluate) -> Path:
    """Write evaluation.json, front.json and responses.parquet into the sweep's folder and return the first."""
    from equipoise.evaluation.evaluate import evaluation_of, points_of
    from equipoise.evaluation.log import response_table, write_table

    manifest = manifest_of(config.sweep, "sweep")
    values = Path(manifest["config"]["values"])
    if file_digest(values / "manifest.json") != manifest["parents"]["values"]:
        raise UserError(f"{values} was trained again since {config.sweep} was made; run the sweep again in another folder")
    sampled = manifest_of(rollouts_of(values), "sample")["config"]
    swept = manifest["config"]
    prompts = {p.id: p for p in common.prompts_of_run(config.sweep, "sweep")}
    result = evaluation_of(config.sweep, values, prompts, swept, common.settings_of(config))
    result |= {"model": sampled["model"], "sampling": sampled["sampling"], "versions": manifest["versions"]}
    result["files"] = _files(config.sweep, values, manifest)
    path = config.sweep / "evaluation.json"
    front = {"points": result.pop("front"), "ref_point_K": result["ref_point_K"], "hypervolume": result["hypervolume"]}
    write_json(config.sweep / "front.json", front)
    write_table(config.sweep / "responses.parquet", response_table(points_of(config.sweep, len(result["objectives"]), swept["steps"])))
    write_json(path, result)
    return path


def _files(folder: Path, values: Path, manifest: dict[str, Any]) -> list[dict[str, str]]:
    """Every file a number rests on, with its digest."""
    trained = manifest_of(values, "train value")
    rollouts = rollouts_of(values)
    rows = [{"path": str(folder / name), "sha256": digest, "what": "sweep"} for name, digest in manifest["outputs"].items()]
    rows += [{"path": str(values / name), "sha256": digest, "what": "value heads"} for name, digest in trained["outputs"].items()]
    for part in (folder, values, rollouts, rollouts / "rewards"):
        rows.append({"path": str(part / "manifest.json"), "sha256": file_digest(part / "manifest.json"), "what": "manifest"})
    return rows


@dataclass(frozen=True, kw_only=True)
class Report:
    """Draw an evaluation as one self-contained page."""

    evaluation: Path
    """An evaluation.json."""
    out: Path
    """HTML file to write."""


def report(config: Report) -> Path:
    """Write the page and, beside it, the front as an SVG file; returns the page's path."""
    from equipoise.evaluation.figures import front_figure
    from equipoise.evaluation.report import render_report

    found = read_json(config.evaluation)
    if not isinstance(found, dict) or not {"title", "model", "objectives"} <= set(found):
        raise UserError(f"{config.evaluation} is not an evaluation; give the evaluation.json that `equipoise evaluate` writes")
    write_text(config.out, render_report(found))
    if len(found["objectives"]) >= 2:
        # The picture that stands alone shows what costs about one or two plain responses; the page has them all.
        cheap = found | {"points": [p for p in found["points"] if p["cost"] < 2.5]}
        write_text(config.out.with_name("front.svg"), front_figure(cheap, *found["objectives"][:2]))
    return config.out
