"""The stages `sample` and `score`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from equipoise.models.engines import Calls
from equipoise.models.generation import Sampling
from equipoise.progress import bar, say
from equipoise.runs import EXECUTION, stage
from equipoise.stages import common
from equipoise.stages.choosing import Choice
from equipoise.stages.steering import Steer, model_for, sampler_of, steering_of
from equipoise.stages.upstream import Upstream
from equipoise.stages.ways import WAYS
from equipoise.types import Prompt, Response, UserError


@dataclass(frozen=True, kw_only=True)
class Sample(Steer):
    """Sample responses to prompts, plain or steered."""

    out: Path
    """Run folder to write."""
    model: str = "smollm2"
    """"smollm2", a Hub id, a folder or a .gguf file."""
    prompts: str = "equipoise"
    """"equipoise", KIND:FILE of pairs such as hh:FILE, or a JSON-lines FILE."""
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
    choice: Choice = field(default_factory=Choice)
    """How a response is chosen among proposals."""
    weights: str = ""
    """Point of the simplex, as helpful=0.7,harmless=0.3, or 0.7,,0.3 in the objectives' order: an empty place weighs nothing."""
    goals: Literal["", "released", "simplex"] = ""
    """in_context without weights: scores that each response is asked for, drawn as RiC's code does (released), or along the simplex."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    upstream: Upstream = field(default_factory=Upstream)
    """A server that draws in the model's place; the choice among its responses, best_of or resampling, is made here."""

    def __post_init__(self) -> None:
        common.check_counts(samples=self.samples)
        if self.upstream.source:
            self.upstream.check(self.sampling, self.choice.how, [name for name in WAYS if getattr(self, name)])


def sample(config: Sample) -> Path:
    """Sample and return the run folder."""
    from equipoise.data.prompts import prompts_file
    from equipoise.rollouts import SHARD_BATCHES, collect, make_requests

    if (config.sampling.greedy or config.choice.how == "beam") and config.samples > 1:
        kind = "greedy" if config.sampling.greedy else "searched"
        raise UserError(f"{kind} responses to one prompt are all the same: set samples to 1, not {config.samples}")
    prompts = common.prompts_of(config.prompts, config.split, config.limit)
    settings = common.settings_of(config)
    if not config.upstream.source:
        del settings["upstream"]  # so that runs of before there were any go on
    steering = steering_of(settings)
    parents = {"prompts": prompts_file(config.prompts), **(steering.way.parents if steering else {})}
    with stage(config.out, "sample", settings, parents) as run:
        if run.done:
            return config.out
        lm = model_for(settings)
        requests = make_requests(prompts, config.samples, config.seed, steering.weights if steering else None)
        if steering and steering.way.goal:
            requests = [replace(request, weights=steering.way.goal(request)) for request in requests]
        sampler = sampler_of(lm, settings, steering, config.upstream)
        with bar(f"sampling {len(prompts)} prompts x {config.samples}", len(requests)) as advance:
            rollouts = collect(sampler, requests, run.folder / "rollouts", SHARD_BATCHES * config.sampling.batch_size, advance)
        run.outputs += sorted((run.folder / "rollouts").glob("*.parquet"))
        run.facts |= {"rollouts": len(rollouts), "tokens": sum(r.length for r in rollouts), "prompts": len(prompts)}
        run.facts |= {"model_revision": lm.revision if lm else None, "reward_calls": sum(r.reward_calls for r in rollouts)}
    return config.out


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score sampled responses, or those of pairs, on every objective."""

    run: Path
    """A `sample` folder, or a new one for pairs; scores go into its `rewards` folder."""
    pairs: tuple[str, ...] = ()
    """Sources of pairs, such as hh:FILE, whose responses are scored in place of sampled ones."""
    rewards: tuple[str, ...] = ("helpful", "harmless")
    """Scorers by name (`rewards/__init__.py` lists them); objective=SCORER renames one."""
    model: str = "smollm2"
    """Model behind heads on hidden states."""
    shard: int = 256
    """Responses per shard."""
    calls: Calls = field(default_factory=Calls)
    """How judges are asked (`judge:SOURCE#OBJECTIVE`)."""
    cache: Path | None = field(default=None, metadata=EXECUTION)
    """Folder of scores that are kept between runs; judges keep theirs in any case, there or in $EQUIPOISE_CACHE."""

    def __post_init__(self) -> None:
        if self.shard < 1:
            raise UserError(f"shard must be at least 1, got {self.shard}")


def score(config: Score) -> Path:
    """Score and return the folder of the scores."""
    from equipoise.rollouts import read_rollouts

    if config.pairs:
        from equipoise.data.labelled import source_files

        if (config.run / "rollouts").exists():
            raise UserError(f"{config.run} holds sampled responses: score pairs in another folder")
        prompts, texts = common.texts_of_pairs(config.pairs)
        return score_responses(texts, prompts, config, common.settings_of(config), source_files(config.pairs))
    rollouts = read_rollouts(config.run / "rollouts")
    prompts = {p.id: p for p in common.prompts_of_run(config.run, "sample")}
    return score_responses(rollouts, prompts, config, common.settings_of(config), {"rollouts": config.run / "manifest.json"})


def score_responses(
    rollouts: Sequence[Response], prompts: Mapping[str, Prompt], config: Score, settings: Mapping[str, Any], parents: Mapping[str, Path]
) -> Path:
    """Score the responses of a folder into its `rewards`, and return that."""
    from equipoise.rewards import artefacts, load_rewards, needs_model, parse_name
    from equipoise.rewards.scoring import score_shards, truncated

    parents = {**parents, **{str(file): file for file in artefacts(config.rewards)}}
    with stage(config.run / "rewards", "score", settings, parents) as run:
        if run.done:
            return run.folder
        lm = common.model_of(config.model) if needs_model(config.rewards) else None
        rewards = load_rewards(config.rewards, lm, config.cache, config.calls)
        with bar(f"scoring {', '.join(config.rewards)}", len(rollouts)) as advance:
            scored = score_shards(rewards, prompts, rollouts, run.folder, config.shard, advance)
        import numpy as np

        run.outputs += sorted(run.folder.glob("*.parquet"))
        cut = truncated(run.folder, scored.objectives)
        for name in (name for name, count in cut.items() if count):
            say(f"{name}: {cut[name]} of {len(rollouts)} texts were longer than its model allows and were cut")
        run.facts |= {
            "truncated": cut,
            "unscored": {n: int(np.isnan(scored.reward_NK[:, k]).sum()) for k, n in enumerate(scored.objectives)},
            "cached": {r.name: r.n_cached for r in rewards if hasattr(r, "n_cached")},
            "judges": {r.name: r.counts for r in rewards if hasattr(r, "counts")},
            "scorers": {r.name: getattr(r, "identity", parse_name(entry)[1]) for entry, r in zip(config.rewards, rewards, strict=True)},
        }
    return run.folder
