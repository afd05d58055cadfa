"""The stage `compare`: any methods along the same weights, on the same held-out prompts, against one reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from equipoise.models.generation import Sampling
from equipoise.progress import bar, say
from equipoise.runs import (
    EXECUTION,
    Manifest,
    begun,
    digest_of,
    file_digest,
    manifest_of,
    plain,
    read_json,
    recorded,
    stage,
    write_json,
    write_text,
)
from equipoise.stages import common
from equipoise.stages.methods import Method, MethodPoint, Weights, points_of, said
from equipoise.stages.provenance import making_seconds
from equipoise.stages.steering import sampler_of
from equipoise.stages.winning import WinRates, rubrics_of, win_rates
from equipoise.stages.workers import LOGS, each_once, run_workers
from equipoise.types import Prompt, UserError

_JUDGED = "win_rates.json"
_OF_POINTS = ("model", "prompts", "split", "limit", "rewards", "judges", "sampling", "seed", "trust_remote_code")
"""Settings that all points share. Methods may be added to a comparison, and all else be evaluated anew, without sampling again."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Run methods along the whole trade-off on the same prompts, and report them side by side."""

    out: Path
    """Run folder to write: rollouts and rewards of every point, evaluation.json (settings and statistics), responses.parquet (a row
    per response), report.html, table.md (a row per method: price and gains, two objectives at a time, beside best-of-n), front.svg."""
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
    weights: tuple[str, ...] = ()
    """Weight vectors in place of the grid, as helpful=0.7,harmless=0.3 or 0.7,0.3 each, for best-of-n and methods without their own."""
    samples: int = 2
    """Responses per prompt and weight vector of each method."""
    reference_samples: int = 8
    """Responses of the reference per prompt; best-of-n chooses among them."""
    rewards: tuple[str, ...] = ("helpful", "harmless")
    """The objectives, in the order of every method's weights."""
    judges: tuple[str, ...] = ("judge_helpful", "judge_harmless")
    """Scorers that nothing was trained on, for the report."""
    judge: WinRates = field(default_factory=WinRates)
    """A chat model that says which response is better, each method's or the reference's."""
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
    workers: int = field(default=1, metadata=EXECUTION)
    """Processes that share the points, each with the model; a second command on the same folder joins in too."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise UserError("there is nothing to compare: name at least one method, as in recipes/compare.yaml")
        common.check_counts(samples=self.samples, reference_samples=self.reference_samples, workers=self.workers)
        if not 0 < self.kl_budget < float("inf"):
            raise UserError(f"kl_budget is a number of nats above 0, not {self.kl_budget}; 1 is usual")
        common.check_counts(n_boot=self.n_boot, best_of=min((*self.best_of, 1)), each_best_of=min((*self.each_best_of, 1)))
        if not isfinite(self.ref_point):
            raise UserError(f"ref_point is a number of standard deviations, not {self.ref_point}; -1 is usual")
        most = max((*self.best_of, 1))
        if most > self.reference_samples:
            raise UserError(f"best-of-{most} needs reference_samples of at least {most}, not {self.reference_samples}")
        if self.each_best_of and max(self.each_best_of) > self.samples:
            raise UserError(f"each_best_of {max(self.each_best_of)} needs samples of at least as many, not {self.samples}")


def compare(config: Compare) -> Path:
    """Run what is missing, evaluate, draw, and return the page."""
    job = _job(config)
    rubrics_of(config.judge, job.objectives)  # what is wrong with them is said before hours of sampling
    with stage(config.out, "compare", job.settings, job.shared):
        points = [job.manifest(entry) for entry in job.todo]
        for point in points:
            point.check()
        if not all(point.done for point in points):
            title = f"sampling {len(job.todo)} points on {len(job.prompts)} prompts"
            with bar(title, len(job.prompts) * sum(count for *_, count in job.todo)) as advance:
                if config.workers > 1:
                    say(f"{config.workers} workers, whose logs are in {config.out / LOGS}")
                    run_workers(config.workers, config.out / LOGS, _worker, [config], _Counted(config.out, advance))
                else:
                    _sample(config, job, advance)
        _judge(config, job)
    return _evaluate(config, job)


Entry = tuple[str, MethodPoint | None, int]


@dataclass(frozen=True)
class _Job:
    """What a config asks for, before anything is loaded."""

    out: Path
    objectives: tuple[str, ...]
    grid: list[Weights]
    plan: dict[str, list[MethodPoint]]
    prompts: list[Prompt]
    todo: list[Entry]
    """(method, point, samples per prompt), the reference first."""
    settings: dict[str, Any]
    """Of every point."""
    shared: dict[str, Path]
    """Files that every point rests on."""
    digests: dict[Path, str] = field(default_factory=dict)
    """Of files that were read before: points share most."""

    def manifest(self, entry: Entry) -> Manifest:
        """What identifies a point; other points, and how all are evaluated, are no part of it."""
        _, point, count = entry
        parents = {**self.shared, **(point.steering.way.parents if point else {})}
        for path in parents.values():
            if path not in self.digests:
                self.digests[path] = file_digest(path)
        # The other points of its method come with the folders that are listed; its own is among the parents.
        method = {k: v for k, v in point.sampled.items() if k not in ("recipe", "policies", "palettes")} if point else None
        settings = plain({**self.settings, "samples": count, "method": method})
        return Manifest(self.place(entry), "compare point", settings, {name: self.digests[path] for name, path in parents.items()})

    def place(self, entry: Entry) -> Path:
        """Where a point's files lie."""
        from equipoise.evaluation.sweep import point_folder

        name, point, _ = entry
        return point_folder(self.out, name, point.weights if point else None)


def _job(config: Compare) -> _Job:
    from equipoise.data.prompts import prompts_file
    from equipoise.rewards import artefacts, parse_name

    objectives = tuple(parse_name(entry)[0] for entry in config.rewards)
    grid, settings = _grid(config, objectives), common.settings_of(config)
    plan = {name: points_of(name, method, objectives, grid, settings) for name, method in config.methods.items()}
    todo: list[Entry] = [("reference", None, config.reference_samples)]
    todo += [(name, point, config.samples) for name, points in plan.items() for point in points]
    prompts = common.prompts_of(config.prompts, config.split, config.limit)
    shared = {"prompts": prompts_file(config.prompts)} | {str(file): file for file in artefacts([*config.rewards, *config.judges])}
    return _Job(config.out, objectives, grid, plan, prompts, todo, {name: settings[name] for name in _OF_POINTS}, shared)


def _worker(config: Compare) -> None:
    """What a process of its own does: like every other one, the points that are left."""
    _sample(config, _job(config), lambda count: None)


def _sample(config: Compare, job: _Job, advance: Callable[[int], None]) -> None:
    """Sample and score every point that no other process is at."""
    from equipoise.evaluation.sweep import sweep_point
    from equipoise.rewards import load_rewards

    lm, settings = common.model_of(config.model, config.trust_remote_code), common.settings_of(config)
    rewards = load_rewards([*config.rewards, *config.judges], lm)

    def work(entry: Entry) -> None:
        name, at, count = entry
        weights, size = at.weights if at else None, config.sampling.batch_size
        with begun(job.manifest(entry)) as run:
            if run.done:
                advance(len(job.prompts) * count)
                return
            sampler = sampler_of(lm, at.sampled, at.steering) if at else sampler_of(lm, settings, None)
            sweep_point(config.out, name, sampler, weights, job.prompts, count, config.seed, rewards, size, sampled=advance)
            run.outputs = sorted(run.folder.glob("*/*.parquet"))

    each_once(job.todo, job.place, work)


class _Counted:
    """Tells a bar of the rollouts that other processes have written since it was last called."""

    def __init__(self, folder: Path, advance: Callable[[int], None]) -> None:
        self.folder, self.advance = folder, advance
        self.seen: set[Path] = set()

    def __call__(self) -> None:
        from pyarrow.parquet import read_metadata

        fresh = set(self.folder.glob("*/*/rollouts/*.parquet")) - self.seen
        self.seen |= fresh
        if fresh:
            self.advance(sum(read_metadata(path).num_rows for path in fresh))


def _judge(config: Compare, job: _Job) -> None:
    """Write the win rates, if there is a judge and something that it hasn't been asked; replies that can't be read are not kept."""
    if not config.judge.engine:
        return
    points = [manifest_of(job.place(entry), "compare point")["outputs"] for entry in job.todo]
    asked = digest_of([recorded(config.judge), config.n_boot, config.seed, points])
    if (config.out / _JUDGED).exists() and read_json(config.out / _JUDGED)["asked"] == asked:
        return
    lm = common.model_of(config.model, config.trust_remote_code) if config.judge.engine == f"local:{config.model}" else None
    weights = {name: [point.weights for point in points] for name, points in job.plan.items()}
    found = win_rates(config.judge, config.out, job.objectives, weights, job.prompts, config.n_boot, config.seed, lm)
    write_json(config.out / _JUDGED, found | {"asked": asked})


def _grid(config: Compare, objectives: tuple[str, ...]) -> list[Weights]:
    """The weight vectors of best-of-n and of methods without their own. Raises `UserError` for one that is none, or given twice."""
    from equipoise.objectives import parse_weights, simplex_grid

    if not config.weights:
        return simplex_grid(len(objectives), config.steps)
    found = [parse_weights(text, objectives) for text in config.weights]
    for index, weights in enumerate(found):
        if weights in found[:index]:
            raise UserError(f"the weights {config.weights[index]!r} are there twice: name each vector once")
    return found


def _evaluate(config: Compare, job: _Job) -> Path:
    from equipoise.evaluation.comparison import comparison_of
    from equipoise.evaluation.figures import front_figure
    from equipoise.evaluation.log import response_table, write_table
    from equipoise.evaluation.report import render_report
    from equipoise.evaluation.responses import responses_of
    from equipoise.evaluation.sweep import read_point
    from equipoise.evaluation.table import markdown_tables

    manifest = manifest_of(config.out, "compare")
    weights = {name: [point.weights for point in points] for name, points in job.plan.items()}
    measured = {name for name, points in job.plan.items() if all(point.steering.way.reference_measures for point in points)}
    # An end of a method is set beside best-of-n at the same end, which weights of one's own may leave out.
    ends = dict.fromkeys(w for found in weights.values() for w in found if max(w) == 1.0)
    grid = [*job.grid, *(end for end in ends if end not in job.grid)]
    settings = common.settings_of(config)
    shown = settings | {"methods": {name: said(method) for name, method in config.methods.items()}}
    result = comparison_of(config.out, job.objectives, {p.id: p for p in job.prompts}, weights, grid, settings, measured)
    result |= {"model": config.model, "settings": plain(shown), "versions": manifest["versions"]}
    result["files"] = [
        {"path": str(job.place(entry) / name), "sha256": digest, "what": entry[0]}
        for entry in job.todo
        for name, digest in manifest_of(job.place(entry), "compare point")["outputs"].items()
    ]
    made = {
        name: making_seconds(path for point in points for path in point.steering.way.parents.values()) for name, points in job.plan.items()
    }
    for row in result["methods"]:
        row["training_seconds"] = made.get(row["method"].partition(", best-of-")[0])
    if config.judge.engine:
        result["win_rates"] = read_json(config.out / _JUDGED)
    write_json(config.out / "evaluation.json", result)
    points = [
        read_point(config.out, "reference", None),
        *(read_point(config.out, name, w) for name, found in weights.items() for w in found),
    ]
    write_table(config.out / "responses.parquet", response_table(points))
    write_text(config.out / "table.md", markdown_tables(result))
    page = config.out / "report.html"
    write_text(page, render_report(result, responses_of(points, {p.id: p for p in job.prompts})))
    if len(job.objectives) >= 2:
        write_text(config.out / "front.svg", front_figure(result, job.objectives[0], job.objectives[1]))
    return page
