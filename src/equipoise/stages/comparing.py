"""The stage `compare`: any methods along the same weights, on the same held-out prompts, against one reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from equipoise.models.generation import Sampling
from equipoise.progress import bar
from equipoise.runs import EXECUTION, stage, write_json, write_text
from equipoise.stages import common
from equipoise.stages.choosing import Choice
from equipoise.stages.steering import Steer, Steering, renamed, sampler_of, steering_of
from equipoise.types import UserError


@dataclass(frozen=True, kw_only=True)
class Method(Steer):
    """One method of a comparison: what steers it, as `sample` takes it, and where along the trade-off."""

    weights: tuple[str, ...] = ()
    """Its weight vectors, as helpful=0.7,harmless=0.3 each; empty for the comparison's grid."""
    policies: tuple[str, ...] = ()
    """Folders of policies that were trained at one weight vector each (DPO, MODPO); each is a point of the method."""
    choice: Choice = field(default_factory=Choice)
    """How its responses are chosen among proposals."""

    def __post_init__(self) -> None:
        if self.policies and (self.weights or self.policy):
            raise UserError("policies bring their own weights: leave weights and policy away")


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Run methods along the whole trade-off on the same prompts, and report them side by side."""

    out: Path
    """Run folder to write: rollouts and rewards of every point, evaluation.json (settings and statistics), responses.parquet (a row
    per response), report.html, front.svg."""
    methods: dict[str, Method]
    """By name; the reference and its best-of-n come with every comparison."""
    model: str = "smollm2"
    """"smollm2", a Hub id, a folder or a .gguf file."""
    prompts: str = "equipoise"
    """"equipoise", KIND:FILE of pairs such as hh:FILE, or a JSON-lines FILE."""
    split: str = "test"
    """Split of the prompts."""
    limit: int = 0
    """Most prompts; 0 for all."""
    steps: int = 4
    """The grid's weights are multiples of 1/steps."""
    samples: int = 2
    """Responses per prompt and weight vector of each method."""
    reference_samples: int = 8
    """Responses of the reference per prompt; best-of-n chooses among them."""
    rewards: tuple[str, ...] = ("helpful", "harmless")
    """The objectives, in the order of every method's weights."""
    judges: tuple[str, ...] = ("judge_helpful", "judge_harmless")
    """Scorers that nothing was trained on, for the report."""
    best_of: tuple[int, ...] = (2, 4, 8)
    """n of best-of-n over the reference's samples."""
    each_best_of: tuple[int, ...] = ()
    """n of best-of-n over every method's own samples."""
    ref_point: float = -1.0
    """Reference point of the hypervolume on every objective, in standard deviations below the reference's mean."""
    kl_budget: float = 1.0
    """Nats per response that every method is brought to, by mixing with the reference, for the fronts at the same KL."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are drawn, the same for all."""
    seed: int = 1
    """Fixes every response, and the bootstrap."""
    n_boot: int = 2000
    """Bootstrap resamples of the prompts."""
    examples: int = 3
    """Prompts shown with their responses."""
    trust_remote_code: bool = False
    """Run code that comes with a model."""
    from_end: bool = field(default=False, metadata=EXECUTION)
    """Begin with the last point. A second process with this, on the same folder, meets the first one halfway."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise UserError("there is nothing to compare: name at least one method, as in recipes/compare.yaml")
        common.check_counts(samples=self.samples, reference_samples=self.reference_samples)
        if not 0 < self.kl_budget < float("inf"):
            raise UserError(f"kl_budget is a number of nats above 0, not {self.kl_budget}; 1 is usual")
        most = max((*self.best_of, 1))
        if most > self.reference_samples:
            raise UserError(f"best-of-{most} needs reference_samples of at least {most}, not {self.reference_samples}")
        if self.each_best_of and max(self.each_best_of) > self.samples:
            raise UserError(f"each_best_of {max(self.each_best_of)} needs samples of at least as many, not {self.samples}")


def compare(config: Compare) -> Path:
    """Run what is missing, evaluate, draw, and return the page."""
    from equipoise.data.prompts import prompts_file
    from equipoise.evaluation.sweep import sweep_point
    from equipoise.objectives import simplex_grid
    from equipoise.rewards import artefacts, load_rewards, parse_name

    objectives = tuple(parse_name(entry)[0] for entry in config.rewards)
    grid, settings = simplex_grid(len(objectives), config.steps), common.settings_of(config)
    plan = {name: _points(name, method, objectives, grid, settings) for name, method in config.methods.items()}
    prompts = common.prompts_of(config.prompts, config.split, config.limit)
    parents = {"prompts": prompts_file(config.prompts)} | {str(file): file for file in artefacts([*config.rewards, *config.judges])}
    for name, points in plan.items():
        parents |= {f"{name}: {what}": path for _, steering in points for what, path in steering.way.parents.items()}
    with stage(config.out, "compare", settings, parents) as run:
        if not run.done:
            lm = common.model_of(config.model, config.trust_remote_code)
            rewards = load_rewards([*config.rewards, *config.judges], lm)
            todo: list[tuple[str, Mapping[str, Any], Steering | None, int]] = [("reference", settings, None, config.reference_samples)]
            todo += [(name, sampled, steering, config.samples) for name, points in plan.items() for sampled, steering in points]
            with bar(f"sampling {len(todo)} points on {len(prompts)} prompts", len(prompts) * sum(n for *_, n in todo)) as advance:
                for name, sampled, steering, count in reversed(todo) if config.from_end else todo:
                    sampler, weights = sampler_of(lm, sampled, steering), steering.weights if steering else None
                    size = config.sampling.batch_size
                    point = sweep_point(run.folder, name, sampler, weights, prompts, count, config.seed, rewards, size, sampled=advance)
                    run.outputs += (run.folder / point.source).glob("*/*.parquet")
            run.outputs.sort()
    return _evaluate(config, plan, grid, prompts)


def _points(
    name: str, method: Method, objectives: tuple[str, ...], grid: Any, settings: Mapping[str, Any]
) -> list[tuple[dict[str, Any], Steering]]:
    """(`sample` settings, steering) of each of a method's weight vectors."""
    if name == "reference" or "/" in name or name.startswith("."):
        raise UserError(f"{name!r} can't be a method's name: it becomes a folder beside the reference's")
    asked = method.weights or [",".join(f"{k}={w:.12g}" for k, w in zip(objectives, weights, strict=True)) for weights in grid]
    shared = {**asdict(method), **{key: settings[key] for key in ("sampling", "trust_remote_code")}}
    points = [{"policy": folder, "weights": ""} for folder in method.policies] or [{"weights": weights} for weights in asked]
    found = []
    for point in points:
        sampled = {**shared, **point}
        try:
            steering = steering_of(sampled)
        except UserError as error:
            raise UserError(f"method {name!r}: {error}") from None
        found.append((sampled, _placed(name, steering, objectives)))
    return found


def _placed(name: str, steering: Steering | None, objectives: tuple[str, ...]) -> Steering:
    """The steering, with a policy of fewer objectives at 0 on the others. Raises `UserError` where it isn't of these objectives."""
    known = steering.way.objectives if steering else ()
    if steering and steering.way.fixed and set(known) <= set(objectives):
        own = dict(zip(known, steering.weights, strict=True))
        weights = tuple(own.get(k, 0.0) for k in objectives)
        way = replace(steering.way, objectives=objectives, guide=renamed(steering.way, objectives), fixed=weights)
        return Steering(way=way, weights=weights)
    if steering is None or known != objectives:
        raise UserError(
            f"method {name!r} is steered by {', '.join(known) or 'nothing'}; the rewards are {', '.join(objectives)}, in this order"
        )
    return steering


def _evaluate(config: Compare, plan: Mapping[str, Any], grid: Any, prompts: Any) -> Path:
    from equipoise.evaluation.comparison import comparison_of
    from equipoise.evaluation.figures import front_figure
    from equipoise.evaluation.log import response_table, write_table
    from equipoise.evaluation.report import render_report
    from equipoise.evaluation.responses import responses_of
    from equipoise.evaluation.sweep import read_point
    from equipoise.rewards import parse_name
    from equipoise.runs import manifest_of

    manifest = manifest_of(config.out, "compare")
    objectives = tuple(parse_name(entry)[0] for entry in config.rewards)
    weights = {name: [steering.weights for _, steering in points] for name, points in plan.items()}
    measured = {name for name, points in plan.items() if all(steering.way.reference_measures for _, steering in points)}
    result = comparison_of(config.out, objectives, {p.id: p for p in prompts}, weights, grid, manifest["config"], measured)
    result |= {"model": config.model, "settings": manifest["config"], "versions": manifest["versions"], "facts": manifest["facts"]}
    result["files"] = [
        {"path": str(config.out / name), "sha256": digest, "what": "compare"} for name, digest in manifest["outputs"].items()
    ]
    write_json(config.out / "evaluation.json", result)
    points = [
        read_point(config.out, "reference", None),
        *(read_point(config.out, name, w) for name, found in weights.items() for w in found),
    ]
    write_table(config.out / "responses.parquet", response_table(points))
    page = config.out / "report.html"
    write_text(page, render_report(result, responses_of(points, {p.id: p for p in prompts})))
    if len(objectives) >= 2:
        write_text(config.out / "front.svg", front_figure(result, objectives[0], objectives[1]))
    return page
