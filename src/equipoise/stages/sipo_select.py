"""The stages `sipo score` and `sipo select`: what every scorer thinks of every response, and the pairs that come of it.

    sipo score    samples, rewrites -> logprobs/ (each policy and soup, the reference first), rewards/ (scorers by name)
    sipo select   those scores      -> pairs.jsonl (labelled, for `train dpo --model`), accepted.jsonl, summary.json

Scoring is what takes time; `sipo select` is done in a moment, so that other rules and margins cost nothing. A line of
accepted.jsonl leads from the new pairs back to the candidate, its weights and sample, the prompt and the pair. Each of several
scorers may take part in `combine`, the filter and the choice, or in none of them and only in the report (`held_out`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from equipoise.models.engines import Calls
from equipoise.progress import bar, say
from equipoise.runs import EXECUTION, manifest_of, read_json, stage, write_json, write_text
from equipoise.stages import common
from equipoise.stages.sipo import PAIRS_FILE, candidates_of, pairs_of
from equipoise.stages.ways import named, parents_of
from equipoise.types import LabelledPair, UserError

if TYPE_CHECKING:
    from equipoise.models.loading import LanguageModel
    from equipoise.training.sipo import Accepted, Proposals, Text
    from equipoise.training.sipo_scores import Panel, Table


@dataclass(frozen=True, kw_only=True)
class SipoScore:
    """Score the pairs' responses, the samples and the rewrites."""

    out: Path
    """Run folder to write."""
    samples: Path
    """A `sipo sample` folder."""
    refined: Path | None = None
    """A `sipo refine` folder of it; empty where there are no rewrites."""
    policies: tuple[str, ...] = ()
    """Adapters, or models, whose implicit rewards score, as [helpful=ADAPTER,harmless=ADAPTER]; their scorers are implicit:OBJECTIVE."""
    soups: tuple[str, ...] = ()
    """Weight vectors at which soups of these adapters score too, as soup:WEIGHTS."""
    rewards: tuple[str, ...] = ()
    """More scorers by name; objective=SCORER renames one."""
    held_out: tuple[str, ...] = ()
    """Scorers for the report alone."""
    shard: int = 256
    """Responses per shard."""
    calls: Calls = field(default_factory=Calls)
    """How judges are asked (`judge:SOURCE#OBJECTIVE`)."""
    cache: Path | None = field(default=None, metadata=EXECUTION)
    """Folder of scores by name that are kept between runs."""

    def __post_init__(self) -> None:
        if not self.policies and not self.rewards:
            raise UserError("nothing scores: give policies, for their implicit rewards, or rewards by name")
        if self.soups and not self.policies:
            raise UserError("soups are of the policies' adapters: give policies too")


def sipo_score(config: SipoScore) -> Path:
    """Score and return the run folder."""
    from equipoise.rewards import artefacts, load_rewards, needs_model
    from equipoise.rewards.scoring import score_shards
    from equipoise.training.embeddings import encode_shards

    sampled = manifest_of(config.samples, "sipo sample")["config"]
    policies = named("policies", config.policies)
    parents = {"samples": config.samples / "manifest.json"} | parents_of(policies)
    parents |= {"refined": config.refined / "manifest.json"} if config.refined else {}
    scorers = [*config.rewards, *config.held_out]
    parents |= {str(file): file for file in artefacts(scorers)}
    with stage(config.out, "sipo score", common.settings_of(config), parents) as run:
        if run.done:
            return config.out
        texts = texts_of(config.samples, config.refined)
        prompts = {p.prompt.id: p.prompt for p in pairs_of(config.samples)}
        run.facts |= {"texts": len(texts), "objectives": list(policies)}
        lm = common.model_of(sampled["model"], sampled["trust_remote_code"])
        if policies:
            panel = _panel(lm, policies, config.soups, sampled["trust_remote_code"])
            with bar(f"log-probabilities of {len(texts)} responses under {len(panel.voices)} policies", len(texts)) as advance:
                encode_shards(texts, lambda part: panel(prompts, part), config.shard, run.folder / "logprobs", advance, panel)
            run.outputs += sorted((run.folder / "logprobs").glob("*.safetensors"))
        if scorers:
            rewards = load_rewards(scorers, lm if needs_model(scorers) else None, config.cache, config.calls)
            with bar(f"scoring {', '.join(scorers)}", len(texts)) as advance:
                score_shards(rewards, prompts, texts, run.folder / "rewards", config.shard, advance)
            run.outputs += sorted((run.folder / "rewards").glob("*.parquet"))
    return config.out


def _panel(lm: LanguageModel, policies: Mapping[str, str], soups: Sequence[str], trust_remote_code: bool) -> Panel:
    from equipoise.models.loading import ADAPTER_CONFIG
    from equipoise.models.weighted_lora import route_adapters
    from equipoise.objectives import parse_weights
    from equipoise.training.sipo_scores import voices_of

    folders = {name: Path(model).expanduser() for name, model in policies.items()}
    if all((folder / ADAPTER_CONFIG).exists() for folder in folders.values()):
        return voices_of(lm, route_adapters(lm, folders), [parse_weights(text, tuple(policies)) for text in soups])
    if soups:
        raise UserError(f"soups are of adapters, and {', '.join(policies.values())} are not all adapters' folders")
    return voices_of(lm, {name: common.model_of(model, trust_remote_code) for name, model in policies.items()}, [])


def texts_of(samples: Path, refined: Path | None) -> list[Text]:
    """All that is scored, the responses to one prompt next to each other: of the pairs, samples, rewrites."""
    from equipoise.training.sipo import human_texts

    first, second = candidates_of(samples, refined)
    everything = [*human_texts(pairs_of(samples)), *first, *second]
    order = {prompt: i for i, prompt in enumerate(dict.fromkeys(t.prompt_id for t in everything))}
    return sorted(everything, key=lambda t: order[t.prompt_id])


@dataclass(frozen=True, kw_only=True)
class SipoSelect:
    """Combine, filter and relabel."""

    out: Path
    """Run folder to write."""
    scores: Path
    """A `sipo score` folder."""
    combine: Literal["not_dominated", "no_worse", "weighted_sum", "both"] = "no_worse"
    """When a rewrite replaces its sample; both keeps the two as candidates. The released code has not_dominated."""
    combine_by: tuple[str, ...] = ()
    """Scorers that it compares; empty for the objectives' implicit rewards, or all rewards where there are none."""
    filter_by: tuple[str, ...] = ()
    """Scorers on which a candidate must be above both responses; empty for all that aren't held out."""
    margin: float = 0.0
    """By how much it must be above them, in standard deviations of the human responses."""
    margins: dict[str, float] = field(default_factory=dict)
    """Scorer -> margin, for those with another one."""
    choose_by: tuple[str, ...] = ()
    """Scorers that choose among accepted candidates; empty for those of the filter."""
    choose: Literal["mean", "worst"] = "mean"
    """By their mean gain, or by the smallest."""
    per_token: bool = False
    """Whether implicit rewards are divided by the response's tokens."""
    beta: float = 0.1
    """Of the implicit rewards."""
    unfinished: Literal["exclude", "keep"] = "exclude"
    """What becomes of candidates that ran into the length cap."""
    replay: float = 0.0
    """Share of the training pairs that are pairs without a conflict."""
    replay_pairs: tuple[str, ...] = ()
    """Labelled pairs from which these are drawn."""
    seed: int = 0
    """Of the replay and the bootstrap."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"beta must be positive, got {self.beta:g}")
        if not 0 <= self.replay < 1:
            raise UserError(f"replay is a share of the training pairs, 0 to less than 1, got {self.replay:g}")
        if bool(self.replay) != bool(self.replay_pairs):
            raise UserError("replay needs both a share and the pairs to draw from: --replay 0.2 --replay_pairs '[KIND:FILE]'")


def sipo_select(config: SipoSelect) -> Path:
    """Write the new pairs and return their file."""
    from equipoise.data.labelled import load_labelled, source_files, write_labelled
    from equipoise.training.sipo import relabelled, replayed

    scored = manifest_of(config.scores, "sipo score")["config"]
    parents = {"scores": config.scores / "manifest.json", **source_files(config.replay_pairs)}
    files = [config.out / name for name in (PAIRS_FILE, "accepted.jsonl", "summary.json")]
    with stage(config.out, "sipo select", common.settings_of(config), parents) as run:
        if run.done:
            return files[0]
        samples, refined = Path(scored["samples"]), Path(scored["refined"]) if scored["refined"] else None
        table = read_table(config.scores, scored, texts_of(samples, refined), beta=config.beta, per_token=config.per_token)
        found = _selected(config, judges_of(scored), table, pairs_of(samples), *candidates_of(samples, refined))
        new = relabelled(found.accepted)
        known = load_labelled(config.replay_pairs, found.pairs[0].objectives).pairs if config.replay else ()
        old = replayed(known, len(new), config.replay, config.seed)
        lines = [_lineage(a, found.scorers["filter"]) for a in found.accepted]
        summary = _summary(found, table, config.seed) | {"training_pairs": {"new": len(new), "replayed": len(old)}}
        write_labelled(files[0], [*new, *old])
        write_text(files[1], "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        write_json(files[2], summary)
        run.outputs += files
        run.facts |= {key: summary[key] for key in ("pairs", "accepted_pairs", "training_pairs")}
    _tell(config.out)
    return files[0]


@dataclass(frozen=True)
class Selection:
    """What became of the candidates."""

    pairs: list[LabelledPair]
    stages: Mapping[str, list[Text]]
    """The responses by stage: human, samples, rewrites, combined, kept (not blank, nor capped where these are out), accepted."""
    proposed: Proposals
    accepted_N: np.ndarray
    accepted: list[Accepted]
    scorers: Mapping[str, tuple[str, ...]]
    """Of combine, filter, choose and those held out."""
    margin_S: np.ndarray


def _selected(
    config: SipoSelect, judges: Judges, table: Table, pairs: list[LabelledPair], samples: list[Text], rewrites: list[Text]
) -> Selection:
    """Combine, filter and choose. Raises `UserError` for scorers that the table or the filter hasn't."""
    from equipoise.training.sipo import choose, combined, human_texts, proposals

    filter_by = config.filter_by or judges.taking_part
    scorers = {"combine": config.combine_by or judges.objectives, "filter": filter_by, "choose": config.choose_by or filter_by}
    for name in (n for n in [*config.margins, *scorers["choose"]] if n not in filter_by):
        raise UserError(f"{name!r} is no scorer of the filter; those are {', '.join(filter_by)}")
    candidates = combined(samples, rewrites, table.by_id(scorers["combine"]), config.combine)
    kept = [c for c in candidates if c.text.strip() and (c.finished or config.unfinished == "keep")]
    proposed = proposals(pairs, kept, table.by_id(filter_by))
    margin_S = np.array([config.margins.get(name, config.margin) for name in filter_by])
    accepted, accepted_N = choose(proposed, margin_S, np.array([filter_by.index(n) for n in scorers["choose"]]), config.choose)
    stages = {"human": human_texts(pairs), "samples": samples, "rewrites": rewrites, "combined": candidates, "kept": kept}
    stages["accepted"] = [a.candidate for a in accepted]
    return Selection(pairs, stages, proposed, accepted_N, accepted, scorers | {"held_out": judges.held_out}, margin_S)


def _summary(found: Selection, table: Table, seed: int) -> dict[str, Any]:
    """Accept rates, gains, lengths and duplicates at every stage, and by whom it was decided."""
    from equipoise.training.sipo_report import accept_rates, stage_facts

    return {
        "pairs": len(found.pairs),
        "accepted_pairs": len(found.accepted),
        "replaced_by_rewrites": sum(c.stage == "rewrite" for c in found.stages["combined"]),
        "candidates": accept_rates(found.proposed, found.accepted_N, found.pairs[0].objectives),
        "stages": {name: stage_facts(texts) for name, texts in found.stages.items()},
        "gains": _gains(table, found, seed),
        "scorers": found.scorers,
        "margins": dict(zip(found.scorers["filter"], found.margin_S.tolist(), strict=True)),
    }


@dataclass(frozen=True)
class Judges:
    """The scorers of a `sipo score` run by what they are for."""

    objectives: tuple[str, ...]
    """The policies' implicit rewards, or the rewards by name where there are none."""
    taking_part: tuple[str, ...]
    held_out: tuple[str, ...]


def judges_of(scored: Mapping[str, Any]) -> Judges:
    """From the settings of the run."""
    from equipoise.rewards import parse_name

    rewards, held_out = (tuple(parse_name(entry)[0] for entry in scored[key]) for key in ("rewards", "held_out"))
    implicit = tuple(f"implicit:{name}" for name in named("policies", scored["policies"]))
    soups = tuple(f"soup:{text}" for text in scored["soups"])
    return Judges(implicit or rewards, (*implicit, *soups, *rewards), held_out)


def read_table(folder: Path, scored: Mapping[str, Any], texts: Sequence[Text], *, beta: float, per_token: bool) -> Table:
    """The z of a finished `sipo score` folder."""
    from equipoise.rewards.scoring import read_rewards
    from equipoise.training.embeddings import open_shards
    from equipoise.training.sipo_scores import implicit_rewards, standardised

    judges, columns = judges_of(scored), []
    if scored["policies"]:
        shards = open_shards(folder / "logprobs", len(texts))
        columns.append(implicit_rewards(shards["logprob"][:].astype(float), beta, shards["tokens"][:].astype(float) if per_token else None))
    if scored["rewards"] or scored["held_out"]:
        columns.append(read_rewards(folder / "rewards", texts).reward_NK)
    return standardised(texts, (*judges.taking_part, *judges.held_out), np.concatenate(columns, axis=1))


def _gains(table: Table, found: Selection, seed: int) -> dict[str, Any]:
    """By stage and scorer, held-out ones too, over all (pair, candidate) rows of the stage; of the accepted, over those chosen."""
    from equipoise.training.sipo import chosen_rows, proposals
    from equipoise.training.sipo_report import gain_facts

    z = table.by_id(table.scorers)
    rows = {name: proposals(found.pairs, found.stages[name], z) for name in ("samples", "rewrites", "combined", "kept")}
    rows["accepted"] = chosen_rows(found.accepted, z)
    return {
        name: gain_facts(part.gain_NS, [p.prompt.id for p in part.pairs], table.scorers, seed) for name, part in rows.items() if part.pairs
    }


def _lineage(accepted: Accepted, scorers: Sequence[str]) -> dict[str, Any]:
    """Where a new pair comes from."""
    from equipoise.training.sipo import relabelled

    pair, candidate = accepted.pair, accepted.candidate
    return {
        "pair": pair.id,
        "training_pairs": [p.id for p in relabelled([accepted])],
        "prompt": pair.prompt.id,
        "candidate": candidate.id,
        "stage": candidate.stage,
        "sample": candidate.parent_id or candidate.id,
        "weights": dict(zip(pair.objectives, candidate.weights or (), strict=True)),
        "finished": candidate.finished,
        "gains": dict(zip(scorers, accepted.gain_S, strict=True)),
    }


def _tell(out: Path) -> None:
    """Say what came of the candidates."""
    found = read_json(out / "summary.json")
    made, rate = found["training_pairs"], found["candidates"]["rate"] or 0.0
    say(
        f"{found['accepted_pairs']} of {found['pairs']} pairs in conflict have an accepted response ({rate:.1%} of "
        f"{found['candidates']['rows']} candidates): {made['new']} new pairs, {made['replayed']} replayed"
    )
    for name, facts in found["stages"].items():
        length = f", {facts['mean_words']:.0f} words" if facts["mean_words"] is not None else ""
        say(f"  {name}: {facts['responses']}{length}, {facts['capped']} capped, {facts['duplicates'] or 0:.0%} duplicates")
    for scorer in found["scorers"]["held_out"]:
        for name in (n for n in ("kept", "accepted") if n in found["gains"]):
            row = found["gains"][name][scorer]
            if row["gain"] is not None:
                low, high = row["interval"]
                say(
                    f"  {scorer}, held out, on {name}: gain {row['gain']:+.2f} sd [{low:+.2f}, {high:+.2f}], "
                    f"above both {row['share_above']:.0%}"
                )
    if not found["accepted_pairs"]:
        say("nothing was accepted: take a smaller margin, fewer scorers in filter_by, more weights, or --unfinished keep")
