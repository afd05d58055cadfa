"""The stages `sipo sample` and `sipo refine`: candidates for pairs in conflict, and their rewrites after a review.

    sipo sample   labelled pairs -> pairs.jsonl (those in conflict), rollouts/ (a response per prompt and weight vector)
    sipo refine   that folder    -> reviews/ (three suggestions per sample), rewrites/ (at the sample's weights)

A rollout's `parent_id` is the sample that it reviews or rewrites, its `prompt_id` the prompt of the pair, whatever the policy
was given to read. `sipo score` and `sipo select` (`stages/sipo_select.py`) follow; what it is all for is in `training/sipo.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.models.generation import Sampling
from equipoise.progress import bar, say
from equipoise.runs import manifest_of, stage
from equipoise.stages import common
from equipoise.stages.steering import Steer, Steering, sampler_of, way_of
from equipoise.stages.ways import Way
from equipoise.types import LabelledPair, Prompt, Request, Rollout, Sampler, UserError

if TYPE_CHECKING:
    from equipoise.models.loading import LanguageModel
    from equipoise.runs import Manifest
    from equipoise.training.sipo import Text

PAIRS_FILE = "pairs.jsonl"


@dataclass(frozen=True, kw_only=True)
class SipoSample(Steer):
    """Answer the prompts of pairs in conflict along a grid of weights."""

    out: Path
    """Run folder to write."""
    pairs: tuple[str, ...]
    """Labelled pairs, as [KIND:FILE,OBJECTIVE=KIND:FILE]; those that the objectives disagree on are taken."""
    model: str = "smollm2"
    """The reference that the policies were tuned from."""
    weights: tuple[str, ...] = ()
    """Weight vectors, as ["0.8,0.2","helpful=0.2,harmless=0.8"]; empty for all multiples of 1/steps."""
    steps: int = 4
    """Of the grid."""
    limit: int = 0
    """Most pairs, drawn by the seed; 0 for all."""
    samples: int = 1
    """Responses per prompt and weight vector."""
    seed: int = 0
    """Of the pairs' draw and of every response."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=256, greedy=True))
    """How tokens are drawn."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.limit < 0:
            raise UserError(f"samples must be at least 1 and limit not negative, got {self.samples} and {self.limit}")
        if self.sampling.greedy and self.samples > 1:
            raise UserError(f"greedy responses to one prompt are all the same: set samples to 1, not {self.samples}")


def sipo_sample(config: SipoSample) -> Path:
    """Sample and return the run folder."""
    from equipoise.data.labelled import load_labelled, source_files, write_labelled
    from equipoise.rollouts import collect, make_requests

    settings = common.settings_of(config)
    way = _way(settings)
    found = load_labelled(config.pairs, way.objectives)
    with stage(config.out, "sipo sample", settings, {**source_files(config.pairs), **way.parents}) as run:
        if run.done:
            return config.out
        pairs = _conflicts(found.pairs, config.limit, config.seed)
        grid = weights_of(settings, way.objectives)
        lm = common.model_of(config.model, config.trust_remote_code)
        prompts = list({p.prompt.id: p.prompt for p in pairs}.values())
        fitting = [p for p in prompts if fits(lm, p, config.sampling)]
        if not fitting:
            raise UserError(f"none of {len(prompts)} prompts leaves room for {config.sampling.max_new_tokens} tokens: lower max_new_tokens")
        by_weight = [make_requests(fitting, config.samples, config.seed, weights) for weights in grid]
        requests = list(itertools.chain.from_iterable(zip(*by_weight, strict=True)))  # the same prompt in one shard: it is encoded once
        sampler = _sampler(lm, settings, settings["sampling"])
        title = f"sampling {len(fitting)} prompts in conflict at {len(grid)} weights"
        with bar(title, len(requests)) as advance:
            collect(sampler, requests, run.folder / "rollouts", config.sampling.batch_size, advance)
        write_labelled(run.folder / PAIRS_FILE, pairs)
        run.outputs += [run.folder / PAIRS_FILE, *sorted((run.folder / "rollouts").glob("*.parquet"))]
        run.facts |= {"found": found.facts(), "pairs": len(pairs), "prompts": len(prompts), "too_long": len(prompts) - len(fitting)}
        run.facts |= {"objectives": way.objectives, "weights": grid, "model_revision": lm.revision}
    return config.out


@dataclass(frozen=True, kw_only=True)
class SipoRefine:
    """Review every sample on all objectives, and rewrite it at its own weights."""

    out: Path
    """Run folder to write."""
    samples: Path
    """A `sipo sample` folder."""
    review_weights: str = ""
    """Weights of the policy that reviews, such as "correctness=1"; empty for the sample's own."""
    phrases: dict[str, str] = field(default_factory=dict)
    """Objective -> what a response becomes more of, as {safer: harmless}; the field's objectives are known."""
    one_shot: bool = True
    """Whether a worked example comes first."""
    reviewing: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=128, greedy=True))
    """How the tokens of reviews are drawn."""
    rewriting: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=256, greedy=True))
    """How those of rewrites are."""
    seed: int = 0
    """Of every review and rewrite."""


def sipo_refine(config: SipoRefine) -> Path:
    """Review, rewrite and return the run folder."""
    from equipoise.objectives import parse_weights
    from equipoise.rollouts import read_rollouts
    from equipoise.training.sipo_prompts import SHOT, parse_review, phrases_of, review_prompt, rewrite_prompt

    sampled = manifest_of(config.samples, "sipo sample")
    settings, objectives = sampled["config"], tuple(sampled["facts"]["objectives"])
    phrases = phrases_of(objectives, config.phrases)
    reviewer = parse_weights(config.review_weights, objectives) if config.review_weights else None
    shot = SHOT if config.one_shot else None
    with stage(config.out, "sipo refine", common.settings_of(config), {"samples": config.samples / "manifest.json"}) as run:
        if run.done:
            return config.out
        prompts = {p.prompt.id: p.prompt for p in pairs_of(config.samples)}
        lm = common.model_of(settings["model"], settings["trust_remote_code"])
        samples = {r.id: r for r in read_rollouts(config.samples / "rollouts")}
        asked = {id: review_prompt(prompts[r.prompt_id], r.text, phrases, shot) for id, r in samples.items() if r.text.strip()}
        reviews = _ask(lm, settings, config.reviewing, config.seed, samples, asked, "review", reviewer, run)
        said = {str(r.parent_id): parse_review(r.text) for r in reviews}
        asked = {
            id: rewrite_prompt(prompts[samples[id].prompt_id], samples[id].text, review, phrases, shot)
            for id, review in said.items()
            if review
        }
        rewrites = _ask(lm, settings, config.rewriting, config.seed, samples, asked, "rewrite", None, run)
        run.facts |= {"samples": len(samples), "reviews": len(reviews), "empty_reviews": len(said) - len(asked), "rewrites": len(rewrites)}
        run.facts |= {"capped_reviews": sum(r.finish_reason == "length" for r in reviews)}
    return config.out


def _ask(
    lm: LanguageModel,
    settings: Mapping[str, Any],
    sampling: Sampling,
    seed: int,
    samples: Mapping[str, Rollout],
    asked: Mapping[str, Prompt],
    what: str,
    weights: tuple[float, ...] | None,
    run: Manifest,
) -> list[Rollout]:
    """A review or a rewrite of each sample that is asked about, at the given weights or the sample's own, kept in shards.

    Questions that leave no room for an answer are counted; their samples stay as they are.
    """
    from equipoise.rollouts import collect, request_seed

    fitting = [id for id, prompt in asked.items() if fits(lm, prompt, sampling)]
    run.facts[f"too_long_to_{what}"] = len(asked) - len(fitting)
    if len(fitting) < len(asked):
        say(f"{len(asked) - len(fitting)} samples are too long to {what} within the context of {lm.context_length} tokens: they stay")
    ids = {id: f"{id}/{what}" for id in fitting}
    requests = [
        Request(id=ids[id], prompt=asked[id], seed=request_seed(seed, ids[id]), weights=weights or samples[id].weights) for id in fitting
    ]
    plain = _sampler(lm, settings, asdict(sampling))
    folder = run.folder / f"{what}s"
    with bar(f"{len(requests)} {what}s", len(requests)) as advance:
        found = collect(_Children(plain, {made: id for id, made in ids.items()}), requests, folder, sampling.batch_size, advance)
    run.outputs += sorted(folder.glob("*.parquet"))
    return found


class _Children:
    """A sampler whose rollouts know what they were made from."""

    def __init__(self, sampler: Sampler, parents: Mapping[str, str]) -> None:
        self.objectives, self._sampler, self._parents = sampler.objectives, sampler, parents

    def __call__(self, requests: Sequence[Request]) -> list[Rollout]:
        return [replace(rollout, parent_id=self._parents[rollout.id]) for rollout in self._sampler(requests)]


def pairs_of(samples: Path) -> list[LabelledPair]:
    """The pairs in conflict of a `sipo sample` folder."""
    from equipoise.data.labelled import load_labelled

    return list(load_labelled([f"labelled:{samples / PAIRS_FILE}"]).pairs)


def candidates_of(samples: Path, refined: Path | None) -> tuple[list[Text], list[Text]]:
    """(samples, rewrites) of the folders, as texts that know their stage, weights and parents."""
    from equipoise.rollouts import read_rollouts
    from equipoise.training.sipo import Text, rewritten
    from equipoise.training.sipo_prompts import parse_rewrite

    first = {
        r.id: Text(id=r.id, prompt_id=r.prompt_id, stage="sample", text=r.text, finished=r.finish_reason == "stop", weights=r.weights)
        for r in read_rollouts(samples / "rollouts")
    }
    second = []
    if refined is not None and any((refined / "rewrites").glob("*.parquet")):
        for r in read_rollouts(refined / "rewrites"):
            text, went_on = parse_rewrite(r.text)
            second.append(rewritten(first[str(r.parent_id)], r.id, text, finished=went_on or r.finish_reason == "stop"))
    return list(first.values()), second


def weights_of(settings: Mapping[str, Any], objectives: Sequence[str]) -> list[tuple[float, ...]]:
    """The weight vectors of a `sipo sample` run. Raises `UserError` for one that is given twice."""
    from equipoise.objectives import parse_weights, simplex_grid

    grid = [parse_weights(text, objectives) for text in settings["weights"]] or simplex_grid(len(objectives), settings["steps"])
    if len(set(grid)) < len(grid):
        raise UserError(f"two of the weights {list(settings['weights'])} are the same: give each once")
    return grid


def fits(lm: LanguageModel, prompt: Prompt, sampling: Sampling) -> bool:
    """Whether the prompt leaves room for the longest response."""
    from equipoise.models.chat import prompt_ids

    return len(prompt_ids(lm.tokenizer, prompt)) + sampling.max_new_tokens <= lm.context_length


def _way(settings: Mapping[str, Any]) -> Way:
    """What the candidates are steered by. Raises `UserError` where nothing steers."""
    way = way_of(settings)
    if way is None or way.fixed is not None:
        raise UserError("candidates come from steered policies: name them, as --mixing '[helpful=ADAPTER,harmless=ADAPTER]'")
    return way


def _sampler(lm: LanguageModel, settings: Mapping[str, Any], sampling: Mapping[str, Any]) -> Sampler:
    """Of a `sipo sample` run's policies; every request has its own weights."""
    way = _way(settings)
    return sampler_of(lm, {**settings, "sampling": sampling}, Steering(way=way, weights=weights_of(settings, way.objectives)[0]))


def _conflicts(pairs: Sequence[LabelledPair], limit: int, seed: int) -> list[LabelledPair]:
    """The pairs in conflict by id, at most `limit` of them by the seed. Raises `UserError` where there are none."""
    from equipoise.data.splits import shuffled_ranks

    found = sorted((p for p in pairs if p.conflict), key=lambda p: p.id)
    if not found:
        raise UserError(f"none of {len(pairs)} pairs is in conflict: nothing to improve, train on them as they are")
    rank_N = shuffled_ranks([p.id for p in found], seed)
    return [pair for pair, rank in zip(found, rank_N, strict=True) if not limit or rank < limit]
