"""The stages of MAVIS whole: `grow`, `label nodes`, `train value_model` and `distil`; growing with the values again iterates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from equipoise.forests.growing import Growth
from equipoise.models.engines import Calls
from equipoise.models.generation import Sampling
from equipoise.progress import bar, say
from equipoise.runs import EXECUTION, manifest_of, read_json, stage
from equipoise.stages import common
from equipoise.training import value_model
from equipoise.types import Prompt, UserError

if TYPE_CHECKING:
    import numpy as np

    from equipoise.forests.growing import Root
    from equipoise.forests.labelling import Labels
    from equipoise.forests.records import Forest
    from equipoise.objectives import Normaliser
    from equipoise.stages.ways import Way

MIXED = "mixed"


@dataclass(frozen=True, kw_only=True)
class Grow:
    """Grow rollout trees of the reference, or of the policy that values steer."""

    out: Path
    """Run folder to write; several collectors may write to one."""
    model: str = "smollm2"
    """"smollm2", a Hub id, a folder or a .gguf file."""
    prompts: str = "equipoise"
    """"equipoise", hh:FILE or a JSON-lines FILE."""
    split: str = "train"
    """Split of the prompts; empty for all."""
    limit: int = 0
    """Most prompts; 0 for all."""
    trees: int = 1
    """Trees per prompt."""
    seed: int = 0
    """Fixes every tree."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are drawn."""
    growth: Growth = field(default_factory=Growth)
    """The shape of the trees."""
    values: str = ""
    """Values to steer with, as for `sample`; empty for the reference."""
    form: str = "single-pass"
    """Form of value heads: single-pass or prefix."""
    weights: str = ""
    """Point of the simplex, as helpful=0.7,harmless=0.3, or "mixed": each tree draws its own, uniform on the simplex."""
    kl_budget: float | None = None
    """Nats per response that steering may spend; null to divide the values by beta instead."""
    beta: float = 1.0
    """Divides the values. A soft target's price of a nat is matched to it, or to what the budget makes of it."""
    skip_above: float = 1.0
    """Value models are not asked where the likeliest candidate has more than this share of the candidates' mass."""
    shard: int = 32
    """Trees that are grown together and written as one file."""
    collector: int = field(default=0, metadata=EXECUTION)
    """Which of the collectors this is, from 0."""
    collectors: int = field(default=1, metadata=EXECUTION)
    """How many processes write to this run; each grows its share of the shards."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    def __post_init__(self) -> None:
        if self.trees < 1 or self.shard < 1:
            raise UserError(f"trees and shard must be at least 1, got {self.trees} and {self.shard}")
        if not 0 <= self.collector < self.collectors:
            raise UserError(f"collector must be 0 to collectors - 1, got {self.collector} of {self.collectors}")


def grow(config: Grow) -> Path:
    """Grow what is missing of this collector's share and return the run folder."""
    from equipoise.data.prompts import prompts_file
    from equipoise.decoding.value_guided import PolicySampler
    from equipoise.forests.growing import collect
    from equipoise.forests.records import read_forest, shards_of
    from equipoise.objectives import parse_weights
    from equipoise.stages.steering import weighted_way

    settings, prompts = common.settings_of(config), common.prompts_of(config.prompts, config.split, config.limit)
    way = weighted_way(settings)
    fixed = parse_weights(config.weights, way.objectives) if way and config.weights != MIXED else None
    parents = {"prompts": prompts_file(config.prompts), **(way.parents if way else {})}
    with stage(config.out, "grow", settings, parents) as run:
        if run.done:
            return config.out
        lm, folder = common.model_of(config.model, config.trust_remote_code), run.folder / "trees"
        guide = way.guide(lm) if way else None
        roots = _roots(config, prompts, way, fixed, guide)
        share, cap = (config.collector, config.collectors), config.sampling.max_new_tokens
        starts = range(config.collector * config.shard, len(roots), config.collectors * config.shard)
        own = sum(len(roots[at : at + config.shard]) for at in starts)
        with bar(f"growing {own} trees", own) as advance:
            sampler, name = PolicySampler(lm, config.sampling, guide), f"c{config.collector}"
            whole = collect(sampler, roots, config.growth, cap, config.seed, folder, config.shard, name, share, advance)
        run.pending = not whole
        if whole:
            forest = read_forest(folder)
            run.outputs += shards_of(folder).values()
            run.facts |= {"trees": len(forest.tree_ids), "left_out": len(roots) - len(forest.tree_ids), "nodes": len(forest)}
            run.facts |= {"leaves": int(forest.leaf_N.sum()), "tokens": len(forest.token_T), "model_revision": lm.revision}
            run.facts |= {"kl_per_leaf": _mean_kl(forest)}
        else:
            say(f"other collectors' shards are missing in {folder}: the last one to finish closes the run")
    return config.out


def _mean_kl(forest: Forest) -> float:
    from equipoise.forests.backups import path_sums

    return float(path_sums(forest.parent_N, forest.segment_sums(forest.kl_T))[forest.leaf_N].mean())


def _roots(config: Grow, prompts: Sequence[Prompt], way: Way | None, fixed: tuple[float, ...] | None, guide: Any) -> list[Root]:
    """Every tree of the run, with its weights, drawn where they aren't `fixed`, and the beta that they are steered with."""
    from equipoise.forests.growing import Root

    roots = []
    for prompt in prompts:
        for number in range(config.trees):
            name = f"{prompt.id}/{number}"
            if way is None:
                roots.append(Root(id=name, prompt=prompt))
                continue
            weights = fixed or draw_weights(len(way.objectives), config.seed, name)
            roots.append(Root(id=name, prompt=prompt, weights=weights, beta=guide.tilt.beta(weights)))
    return roots


def draw_weights(count: int, seed: int, tree: str) -> tuple[float, ...]:
    """A point that is uniform on the simplex, fixed by the seed and the tree's id."""
    import numpy as np

    from equipoise.models.generation import row_uniforms
    from equipoise.rollouts import request_seed

    spacing = -np.log1p(-row_uniforms(request_seed(seed, f"{tree}:weights"), count))
    return tuple(float(w) for w in spacing / spacing.sum())


@dataclass(frozen=True, kw_only=True)
class Label:
    """Score the leaves of trees and back their rewards up to every node."""

    out: Path
    """Run folder to write; the leaves' scores go into the trees' own `rewards` folder, and are kept for other targets."""
    trees: Path
    """A `grow` folder."""
    rewards: tuple[str, ...] = ("helpful", "harmless")
    """Scorers, as for `score`."""
    target: Literal["soft", "hard", "total", "log_mean_exp"] = "soft"
    """soft: less the price of the KL still to come; hard: the mean; total: as MAVIS's released code; log_mean_exp: soft maxima."""
    zeta: float | None = None
    """Price of a nat in sd of the reward; null for each tree's own beta, with which policy iteration is exact."""
    model: str = "smollm2"
    """Model behind heads on hidden states."""
    shard: int = 256
    """Responses per shard of scores."""
    calls: Calls = field(default_factory=Calls)
    """How judges are asked."""
    cache: Path | None = field(default=None, metadata=EXECUTION)
    """Folder of scores that are kept between runs."""


def label(config: Label) -> Path:
    """Label and return the run folder."""
    import numpy as np

    from equipoise.forests.labelling import label as back_up
    from equipoise.forests.labelling import leaves_of, write_labels
    from equipoise.objectives import Normaliser
    from equipoise.rewards.scoring import read_rewards
    from equipoise.stages.sampling import Score, score_responses
    from equipoise.stages.ways import value_scale

    grown, forest, prompts = grown_in(config.trees)
    score = Score(run=config.trees, rewards=config.rewards, model=config.model, shard=config.shard, calls=config.calls, cache=config.cache)
    leaves = leaves_of(forest)
    scored = score_responses(leaves, prompts, score, common.settings_of(score), {"trees": config.trees / "manifest.json"})
    rewards = read_rewards(scored, leaves)
    parents = {"trees": config.trees / "manifest.json", "rewards": scored / "manifest.json"}
    with stage(config.out, "label nodes", common.settings_of(config), parents) as run:
        if run.done:
            return config.out
        if grown["values"]:  # later iterations stay on the reference's scale, which beta is in
            scale = value_scale([Path(folder.strip()).expanduser() for folder in grown["values"].split(",")])
            if scale.objectives != rewards.objectives:
                raise UserError(f"the trees were steered for {', '.join(scale.objectives)}; rewards are {', '.join(rewards.objectives)}")
        else:
            scale = Normaliser.fit(rewards.objectives, rewards.reward_NK)
        found = back_up(forest, rewards.reward_NK, scale, config.target, config.zeta)
        write_labels(run.folder / "labels.parquet", forest, found)
        run.outputs.append(run.folder / "labels.parquet")
        unscored = {name: int(np.isnan(column).sum()) for name, column in zip(scale.objectives, rewards.reward_NK.T, strict=True)}
        run.facts |= {"nodes": len(forest), "unscored_leaves": unscored}
        run.facts |= {"nodes_without_target": int(np.isnan(found.target_NK).any(axis=1).sum())}
    return config.out


def grown_in(folder: Path) -> tuple[dict[str, Any], Forest, dict[str, Prompt]]:
    """(settings, trees, prompts by id) of a finished `grow` folder."""
    from equipoise.forests.records import read_forest

    grown = manifest_of(folder, "grow")["config"]
    return grown, read_forest(folder / "trees"), {p.id: p for p in common.prompts_of_run(folder, "grow")}


@dataclass(frozen=True, kw_only=True)
class TrainValueModel:
    """Train a value model on labelled trees."""

    out: Path
    """Run folder to write."""
    labels: Path
    """A `label nodes` folder."""
    base: str = ""
    """The backbone: any causal model with the policy's tokens; empty for the policy's own."""
    objectives: tuple[str, ...] = ()
    """Which of the labels' objectives are learned, in this order; empty for all."""
    start_from: Path | None = None
    """A `train value_model` folder to continue, as the next policy iteration does."""
    value: value_model.Config = field(default_factory=value_model.Config)
    """How it is trained."""


def train_value_model(config: TrainValueModel) -> Path:
    """Train and return the run folder."""
    from equipoise.forests.labelling import read_labels
    from equipoise.models.loading import load_tokenizer

    if config.base and config.start_from:
        raise UserError(f"base {config.base!r} and start_from {config.start_from} are two beginnings: give one")
    trees = Path(manifest_of(config.labels, "label nodes")["config"]["trees"])
    grown, forest, prompts = grown_in(trees)
    parents = {"labels": config.labels / "manifest.json", "trees": trees / "manifest.json"}
    parents |= {"start_from": config.start_from / "manifest.json"} if config.start_from else {}
    with stage(config.out, "train value_model", common.settings_of(config), parents) as run:
        if run.done:
            return config.out
        found = read_labels(config.labels / "labels.parquet", forest)
        tokenizer = load_tokenizer(grown["model"])
        target_NK, scale = _chosen(found, config.objectives)
        lesson = value_model.label_lesson(tokenizer, prompts, forest, target_NK, scale, config.value)
        begin = config.start_from / "model" if config.start_from else None
        policy = common.model_of(grown["model"], grown["trust_remote_code"])
        base = config.base or grown["model"]
        value_model.train(lesson, policy, Sampling(**grown["sampling"]), base, begin, config.value, run)
        run.facts |= lesson.facts
    _say_quality(config.out)
    return config.out


def _chosen(labels: Labels, names: Sequence[str]) -> tuple[np.ndarray, Normaliser]:
    """Targets and scale of some of the objectives."""
    from equipoise.objectives import Normaliser

    scale, known = labels.normaliser, labels.normaliser.objectives
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"unknown objective {unknown[0]!r}; the labels have {', '.join(known)}")
    columns = [known.index(name) for name in names or known]
    picked = [tuple(of[c] for c in columns) for of in (scale.mean_K, scale.sd_K)]
    return labels.target_NK[:, columns], Normaliser(objectives=tuple(names or known), mean_K=picked[0], sd_K=picked[1])


@dataclass(frozen=True, kw_only=True)
class Distil:
    """Train one value model to say what several say."""

    out: Path
    """Run folder to write."""
    trees: Path
    """A `grow` folder, labelled or not: where the models are asked."""
    values: tuple[Path, ...]
    """`train value_model` folders, whose objectives follow one another."""
    base: str = ""
    """The backbone: any causal model with the policy's tokens; empty for the policy's own."""
    value: value_model.Config = field(default_factory=value_model.Config)
    """How it is trained; every response token is learned from, whatever bottom_fraction says."""


def distil(config: Distil) -> Path:
    """Train and return the run folder."""
    from equipoise.models.companions import same_tokens
    from equipoise.models.value_models import load_value_model

    grown, forest, prompts = grown_in(config.trees)
    parents = {"trees": config.trees / "manifest.json"}
    parents |= {f"values {i}": folder / "manifest.json" for i, folder in enumerate(config.values)}
    with stage(config.out, "distil", common.settings_of(config), parents) as run:
        if run.done:
            return config.out
        policy = common.model_of(grown["model"], grown["trust_remote_code"])
        teachers = [load_value_model(folder / "model") for folder in config.values]
        for teacher in teachers:
            same_tokens(policy, teacher.lm)
        lesson = value_model.distil_lesson(policy.tokenizer, prompts, forest, teachers, config.value)
        sampling, base = Sampling(**grown["sampling"]), config.base or grown["model"]
        value_model.train(lesson, policy, sampling, base, None, config.value, run)
        run.facts |= lesson.facts
    _say_quality(config.out)
    return config.out


def _say_quality(out: Path) -> None:
    quality = read_json(out / "quality.json")
    for name, found in zip(quality["objectives"], quality["held_out"], strict=True):
        r2, within = (cast("float | None", found[key]) for key in ("r2", "r2_within"))
        figures = " and ".join("–" if v is None else f"{v:.3f}" for v in (r2, within))
        say(f"{name}: R2 {figures} within prompts, on {found['n']} nodes of unseen prompts")
