"""The stages behind the commands: each reads files, writes a run folder and can be killed and run again.

Every stage is a config (what the recipe and the command line hold) and a function of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.models.generation import Sampling
from equipoise.progress import bar, say
from equipoise.runs import file_digest, manifest_of, read_json, stage, write_json, write_text
from equipoise.training import reward_head, value
from equipoise.types import Pair, Prompt, UserError

if TYPE_CHECKING:
    from equipoise.models.loading import LanguageModel

_LOADED: dict[str, Any] = {}


def model_of(name: str, trust_remote_code: bool = False) -> LanguageModel:
    """The model of this name, loaded once per process."""
    if name not in _LOADED:
        from equipoise.models.loading import load_model

        say(f"loading {name}")
        _LOADED[name] = load_model(name, trust_remote_code=trust_remote_code)
    return _LOADED[name]


def prompts_of(source: str, split_name: str, limit: int) -> list[Prompt]:
    """Prompts of a split, at most `limit` (0: all), evenly spaced over the file."""
    from equipoise.data.prompts import load_prompts, split

    chosen = load_prompts(source)
    if split_name:
        chosen = split(chosen, split_name)
    if not chosen:
        raise UserError(f"{source} has no prompts in the split {split_name!r}")
    if limit and limit < len(chosen):
        chosen = [chosen[i * len(chosen) // limit] for i in range(limit)]
    return chosen


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sample responses to prompts, plain or steered."""

    out: Path
    """Run folder to write."""
    model: str = "smollm2"
    """"smollm2", a Hub id, a folder or a .gguf file."""
    prompts: str = "equipoise"
    """"equipoise", hh:FILE or a JSON-lines FILE."""
    split: str = "train"
    """Split of the prompts; empty for all."""
    limit: int = 0
    """Most prompts; 0 for all."""
    samples: int = 8
    """Responses per prompt."""
    seed: int = 0
    """Fixes every response."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are drawn."""
    values: str = ""
    """Value heads to steer with (a `train value` folder); empty for the reference."""
    form: str = "single-pass"
    """Value form: single-pass or prefix."""
    weights: str = ""
    """Point of the simplex, as helpful=0.7,harmless=0.3."""
    kl_budget: float = 1.0
    """Nats per response that steering may spend."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


def sample(config: Sample) -> Path:
    """Sample and return the run folder."""
    from equipoise.data.prompts import prompts_file
    from equipoise.decoding.value_guided import PolicySampler, make_guide
    from equipoise.models.value_heads import ValueHeads
    from equipoise.objectives import parse_weights
    from equipoise.rollouts import collect, make_requests

    if bool(config.values) != bool(config.weights):
        raise UserError("steering needs both values and weights; sampling the reference needs neither")
    prompts = prompts_of(config.prompts, config.split, config.limit)
    heads = ValueHeads.load(Path(config.values) / "values.safetensors") if config.values else None
    weights = parse_weights(config.weights, heads.objectives) if heads else None
    parents = {"prompts": prompts_file(config.prompts)} | ({"values": Path(config.values) / "manifest.json"} if heads else {})
    with stage(config.out, "sample", _settings(config), parents) as run:
        if run.done:
            return config.out
        lm = model_of(config.model, config.trust_remote_code)
        guide = make_guide(lm, heads, config.form, config.sampling.top_k, kl_budget=config.kl_budget) if heads else None
        requests = make_requests(prompts, config.samples, config.seed, weights)
        with bar(f"sampling {len(prompts)} prompts x {config.samples}", len(requests)) as advance:
            sampler = PolicySampler(lm, config.sampling, guide)
            rollouts = collect(sampler, requests, run.folder / "rollouts", config.sampling.batch_size, advance)
        run.outputs += sorted((run.folder / "rollouts").glob("*.parquet"))
        run.facts |= {"rollouts": len(rollouts), "tokens": sum(len(r.tokens) for r in rollouts), "prompts": len(prompts)}
        run.facts |= {"model_revision": lm.revision}
    return config.out


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score sampled responses on every objective."""

    run: Path
    """A `sample` folder; scores go into its `rewards` folder."""
    rewards: tuple[str, ...] = ("helpful", "harmless")
    """Scorers by name (`rewards/__init__.py` lists them); objective=SCORER renames one."""
    model: str = "smollm2"
    """Model behind heads on hidden states."""
    shard: int = 256
    """Responses per shard."""


def score(config: Score) -> Path:
    """Score and return the folder of the scores."""
    from equipoise.rewards import load_rewards
    from equipoise.rewards.scoring import score_shards
    from equipoise.rollouts import read_rollouts

    rollouts = read_rollouts(config.run / "rollouts")
    prompts = {p.id: p for p in _prompts_of_run(config.run, "sample")}
    with stage(config.run / "rewards", "score", _settings(config), {"rollouts": config.run / "manifest.json"}) as run:
        if run.done:
            return run.folder
        rewards = load_rewards(config.rewards, model_of(config.model))
        with bar(f"scoring {', '.join(config.rewards)}", len(rollouts)) as advance:
            scored = score_shards(rewards, prompts, rollouts, run.folder, config.shard, advance)
        import numpy as np

        run.outputs += sorted(run.folder.glob("*.parquet"))
        run.facts |= {"unscored": {n: int(np.isnan(scored.reward_NK[:, k]).sum()) for k, n in enumerate(scored.objectives)}}
    return run.folder


def _prompts_of_run(folder: Path, command: str) -> list[Prompt]:
    """The prompts that a `sample` or `sweep` folder was made from. Raises `UserError` where their file has changed since."""
    from equipoise.data.prompts import prompts_file

    record = manifest_of(folder, command)
    config, path = record["config"], prompts_file(record["config"]["prompts"])
    if file_digest(path) != record["parents"].get("prompts"):
        raise UserError(f"{path} has changed since {folder} was made from it; put it back or run `{command}` again in another folder")
    return prompts_of(config["prompts"], config["split"], config["limit"])


@dataclass(frozen=True, kw_only=True)
class TrainRewardHead:
    """Train a linear Bradley-Terry reward on preference pairs."""

    out: Path
    """Run folder to write."""
    pairs: tuple[str, ...]
    """Files of pairs: hh:FILE, moderation:FILE or hahackathon:FILE."""
    model: str = "smollm2"
    """Model behind states:LAYER features."""
    head: reward_head.Config
    """Settings of the head."""


def load_pairs(sources: Sequence[str], objective: str) -> list[Pair]:
    """Pairs of several files; prompts of different files keep different ids."""
    from equipoise.data.pairwise import PAIRS

    pairs: list[Pair] = []
    for index, source in enumerate(sources):
        kind, _, path = source.partition(":")
        if kind not in PAIRS or not path:
            raise UserError(f"unknown pairs {source!r}; write KIND:FILE with one of {', '.join(PAIRS)}")
        pairs += PAIRS[kind](Path(path).expanduser(), f"{objective}{index}" if len(sources) > 1 else objective)
    if not pairs:
        raise UserError(f"no usable pairs in {', '.join(sources)}")
    return pairs


def train_reward_head(config: TrainRewardHead) -> Path:
    """Train and return the head's path."""
    from equipoise.rewards.features import load_features

    pairs = load_pairs(config.pairs, config.head.objective)
    parents = {source: Path(source.partition(":")[2]).expanduser() for source in config.pairs}
    with stage(config.out, "train reward_head", _settings(config), parents) as run:
        if run.done:
            return config.out / "head.safetensors"
        featuriser = load_features(config.head.features, model_of(config.model) if "states:" in config.head.features else None)
        with bar(f"features of {len(pairs)} pairs", len(pairs)) as advance:
            path = reward_head.train(pairs, featuriser, config.head, run, advance)
    card = read_json(config.out / "card.json")
    low, high = card["test_interval"]
    say(f"{config.head.objective}: held-out accuracy {card['test_accuracy']:.3f} [{low:.3f}, {high:.3f}] on {card['test_pairs']} pairs")
    return path


@dataclass(frozen=True, kw_only=True)
class TrainValue:
    """Train value heads on rollouts of the reference and their scores."""

    out: Path
    """Run folder to write."""
    run: Path
    """A `sample` folder that was scored."""
    value: value.Config = field(default_factory=value.Config)
    """Settings of the heads."""


def train_value(config: TrainValue) -> Path:
    """Train and return the run folder."""
    from equipoise.rewards.scoring import read_rewards
    from equipoise.rollouts import read_rollouts

    sampled = manifest_of(config.run, "sample")["config"]
    if sampled["values"]:
        raise UserError(f"{config.run} was sampled from a steered policy; values are trained on the reference's rollouts")
    rollouts = read_rollouts(config.run / "rollouts")
    rewards = read_rewards(config.run / "rewards", rollouts)
    prompts = {p.id: p for p in _prompts_of_run(config.run, "sample")}
    parents = {"rollouts": config.run / "manifest.json", "rewards": config.run / "rewards" / "manifest.json"}
    with stage(config.out, "train value", _settings(config), parents) as run:
        if run.done:
            return config.out
        lm = model_of(sampled["model"], sampled["trust_remote_code"])
        with bar(f"learning values of {', '.join(rewards.objectives)}", len(rollouts)) as advance:
            value.train(lm, prompts, rollouts, rewards, config.value, sampled["sampling"], run, advance)
    return config.out


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Steer along the whole trade-off on held-out prompts, beside the reference."""

    out: Path
    """Run folder to write."""
    values: Path
    """A `train value` folder."""
    prompts: str = "equipoise"
    """"equipoise", hh:FILE or a JSON-lines FILE."""
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


def sweep(config: Sweep) -> Path:
    """Run the sweep and return its folder."""
    from equipoise.data.prompts import prompts_file
    from equipoise.decoding.value_guided import PolicySampler, make_guide
    from equipoise.evaluation.sweep import sweep_point
    from equipoise.models.value_heads import ValueHeads
    from equipoise.objectives import simplex_grid
    from equipoise.rewards import load_rewards, parse_name

    heads = ValueHeads.load(config.values / "values.safetensors")
    objectives = tuple(parse_name(entry)[0] for entry in config.rewards)
    if objectives != heads.objectives:
        raise UserError(f"the values are for {', '.join(heads.objectives)}, in this order; rewards are {', '.join(objectives)}")
    trained_on = _rollouts_of(config.values)
    sampled = manifest_of(trained_on, "sample")["config"]
    sampling = Sampling(**sampled["sampling"])
    prompts = prompts_of(config.prompts, config.split, config.limit)
    seen = {p.text for p in _prompts_of_run(trained_on, "sample")}
    leaked = [p.id for p in prompts if p.text in seen]
    if leaked:
        raise UserError(f"prompt {leaked[0]!r} and {len(leaked) - 1} more were used to train the values; sweep another split")
    parents = {"values": config.values / "manifest.json", "prompts": prompts_file(config.prompts)}
    with stage(config.out, "sweep", _settings(config), parents) as run:
        if run.done:
            return config.out
        lm = model_of(sampled["model"], sampled["trust_remote_code"])
        rewards = load_rewards([*config.rewards, *config.judges], lm)
        grid = simplex_grid(len(heads.objectives), config.steps)
        few = prompts[:: max(1, len(prompts) // config.prefix_prompts)][: config.prefix_prompts] if config.prefix_prompts else []
        plan: list[tuple[str, tuple[float, ...] | None, list[Prompt], int]] = [("reference", None, prompts, config.reference_samples)]
        plan += [("single-pass", w, prompts, config.samples) for w in grid]
        plan += [("prefix", w, few, 1) for w in grid if few and max(w) == 1.0]
        with bar(f"sweeping {len(plan)} points on {len(prompts)} unseen prompts", sum(len(p) * n for _, _, p, n in plan)) as advance:
            for method, weights, chosen, count in plan:
                guide = make_guide(lm, heads, method, sampling.top_k, kl_budget=config.kl_budget) if weights else None
                sampler = PolicySampler(lm, sampling, guide)
                point = sweep_point(
                    run.folder, method, sampler, weights, chosen, count, config.seed, rewards, sampling.batch_size, sampled=advance
                )
                run.outputs += sorted((run.folder / point.source).glob("*/*.parquet"))
    return config.out


def _rollouts_of(values: Path) -> Path:
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
    """Write evaluation.json and front.json into the sweep's folder and return the former."""
    from equipoise.evaluation.evaluate import evaluation_of

    manifest = manifest_of(config.sweep, "sweep")
    values = Path(manifest["config"]["values"])
    if file_digest(values / "manifest.json") != manifest["parents"]["values"]:
        raise UserError(f"{values} was trained again since {config.sweep} was made; run the sweep again in another folder")
    sampled = manifest_of(_rollouts_of(values), "sample")["config"]
    swept = manifest["config"]
    prompts = {p.id: p for p in _prompts_of_run(config.sweep, "sweep")}
    result = evaluation_of(config.sweep, values, prompts, swept, _settings(config))
    result |= {"model": sampled["model"], "sampling": sampled["sampling"], "versions": manifest["versions"]}
    result["files"] = _files(config.sweep, values, manifest)
    path = config.sweep / "evaluation.json"
    front = {"points": result.pop("front"), "ref_point_K": result["ref_point_K"], "hypervolume": result["hypervolume"]}
    write_json(config.sweep / "front.json", front)
    write_json(path, result)
    return path


def _files(folder: Path, values: Path, manifest: dict[str, Any]) -> list[dict[str, str]]:
    """Every file a number rests on, with its digest."""
    trained = manifest_of(values, "train value")
    rollouts = _rollouts_of(values)
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


def _settings(config: Any) -> dict[str, Any]:
    """The config as the manifest keeps it, without where it is written."""
    return {k: v for k, v in asdict(config).items() if k != "out"}
