"""Rounds of on-policy training: sample the policy, score what it said, take some steps on it, and again.

    round n:  P prompts (and weights w of each) from the seed -> G responses each from pi_theta -> K rewards -> rows -> steps of `fit`

What PPO, MORLHF and online DPO share. A method makes rows of a round's scored responses and brings the loss; the optimum of all
of them is pi proportional to pi_ref exp(s(r, w) / beta), s the scalarised reward in standard deviations of the reference's:

    linear      s = sum_k w_k z_k          chebyshev   s = -max_k w_k (ideal_k - z_k)          z_k = (r_k - mean_k) / sd_k

Responses are drawn from the policy's own law (temperature 1, all tokens), so that the log-probabilities that come with them are
those of the gradient and of the KL, which is exact, per response, in nats.

Writes: rounds/NNNN/{rollouts,rewards} (shards), rounds/NNNN/round.json and log.jsonl (statistics), checkpoints/ while it runs. A
round counts once its checkpoint is sealed; a killed run goes on from there, keeps the shards of the round that it was in, and
ends with the bytes of an undisturbed one. The weights enter: the rewards, and the policy where it reads them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from equipoise.models.completions import Completions
from equipoise.models.generation import Sampling
from equipoise.models.logprobs import can_share
from equipoise.models.lora import Lora, WeightedLora
from equipoise.objectives import Normaliser, chebyshev, linear, named_weights, parse_weights, random_weights
from equipoise.progress import bar, say
from equipoise.rewards.scoring import score_shards
from equipoise.rollouts import SHARD_BATCHES, collect, make_requests, request_seed
from equipoise.runs import Manifest, digest_of, plain, read_json, recorded, write_json, write_text
from equipoise.training.completion_rows import Row, collator
from equipoise.training.fit import DivergedError, FitConfig, Stretch, entries_of, fit, last_sealed
from equipoise.training.learner import Learner, Reads, make_learner
from equipoise.training.policy import conclude, load_start
from equipoise.training.scored_round import Record, Round, statistics, summary
from equipoise.types import LossOutput, Prompt, Request, Reward, Sampler, UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a round is, how many there are, and when a run stops itself."""

    weights: str = ""
    """The one trade-off that is trained for, as helpful=0.7,harmless=0.3; "" draws weights for every prompt of every round."""
    reads: Reads = "parameters"
    """Where a policy reads weights that are drawn: in its prompt, or in its parameters, adapters that they mix; nothing where `train map`
    makes them."""
    concentration: float = 1.0
    """p of the Dirichlet law from which weights are drawn; 1 is uniform."""
    grid: int = 0
    """Draw weights from the multiples of 1/grid instead, all alike; 0 for the Dirichlet law."""
    scalarisation: Literal["linear", "chebyshev"] = "linear"
    """How rewards and weights make one number."""
    ideal: tuple[float, ...] = ()
    """Of chebyshev: what each objective would ideally reach, in standard deviations above the reference's mean."""
    beta: float = 0.5
    """Standard deviations of reward per nat of KL: a smaller one goes further from the reference."""
    rounds: int = 30
    """How often the policy is sampled."""
    prompts: int = 32
    """Prompts of a round."""
    samples: int = 4
    """Responses to each of them."""
    steps: int = 4
    """Steps of the optimiser in a round; a row of a batch is a prompt with all its responses."""
    max_kl: float = 30.0
    """Mean exact KL of a round, nats per response, above which the run stops itself."""
    sampling: Sampling = field(default_factory=lambda: Sampling(top_k=0, allow_eos_first=True, batch_size=64))
    """How tokens are drawn. Temperature 1 from all tokens, any of which may come first: else the gradient is of another law."""
    lora: Lora = field(default_factory=lambda: Lora(dropout=0.0))
    """Which weights are trained, unless the policy's parameters read the trade-off."""
    weighted: WeightedLora = field(default_factory=lambda: WeightedLora(dropout=0.0))
    """The adapters, where its parameters read it."""
    seed: int = 0
    """Of the prompts, weights and responses; `fit.seed` is that of the training."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(learning_rate=2e-4, batch_size=8, schedule="linear"))
    """How it is trained; the schedule is over all rounds, each of which ends with a checkpoint, whatever epochs and checkpoint_every."""

    def __post_init__(self) -> None:
        if self.reads not in get_args(Reads):
            raise UserError(f"a policy reads weights in its prompt or its parameters, or nothing, not in {self.reads!r}")
        if self.scalarisation not in ("linear", "chebyshev") or (self.scalarisation == "chebyshev") != bool(self.ideal):
            raise UserError(f"scalarise by linear, or by chebyshev and an ideal; got {self.scalarisation!r} and ideal {self.ideal}")
        if not min(self.beta, self.max_kl, self.concentration) > 0 or self.grid < 0:
            raise UserError(
                "beta, max_kl and concentration must be positive and grid not negative, got "
                f"{self.beta}, {self.max_kl}, {self.concentration} and {self.grid}"
            )
        if self.fit.max_steps:
            raise UserError(
                f"steps says how many a round takes, and rounds how many rounds there are: leave fit.max_steps {self.fit.max_steps} away"
            )
        if min(self.rounds, self.prompts, self.steps) < 1 or self.samples < 2:
            raise UserError(
                "rounds, prompts and steps must be at least 1 and samples at least 2, got "
                f"{self.rounds}, {self.prompts}, {self.steps} and {self.samples}"
            )
        s = self.sampling
        if s.temperature != 1 or s.top_k or s.greedy or not s.allow_eos_first:
            raise UserError(
                "training draws from the policy's own law: sampling needs temperature 1, top_k 0, greedy false and allow_eos_first true, "
                f"got {s.temperature:g}, {s.top_k}, {str(s.greedy).lower()} and {str(s.allow_eos_first).lower()}"
            )

    @property
    def reading(self) -> Reads:
        """What the policy reads weights in: nothing where they are fixed."""
        return "nothing" if self.weights else self.reads


class Method(Protocol):
    """What a way of training adds to the rounds."""

    @property
    def title(self) -> str:
        """Its name."""
        ...

    def prepared(self, learner: Learner) -> Learner:
        """The learner with what else is trained."""
        ...

    def settings(self, records: Sequence[Record]) -> Record | None:
        """What holds in the round after these, for its record: beta, and weights by objective where the method makes them.

        A function of the records alone, so that a killed run goes on as it would have; None where no more rounds are needed.
        """
        ...

    def rows(self, learner: Learner, rows: Sequence[Row], scored: Round, settings: Record, *, shared: bool) -> list[Row]:
        """The round's rows with the numbers that the loss reads."""
        ...

    def loss(self, settings: Record) -> Callable[[Any, dict[str, Any]], LossOutput]:
        """The loss of a round's batches."""
        ...


# --- what a round is made of


def drawn_prompts(prompts: Sequence[Prompt], count: int, number: int, seed: int) -> list[Prompt]:
    """The prompts of a round: none comes again before (nearly) all have come. Raises `UserError` where there are too few."""
    if len(prompts) < count:
        raise UserError(f"a round takes {count} prompts, and there are {len(prompts)}: give more prompts, or set prompts lower")
    cycle, at = divmod(number, len(prompts) // count)
    order = np.random.default_rng([seed, 0, cycle]).permutation(len(prompts))
    return [prompts[i] for i in order[at * count : (at + 1) * count]]


def requests_of(
    prompts: Sequence[Prompt], objectives: Sequence[str], config: Config, number: int, made: Mapping[str, float] | None = None
) -> list[list[Request]]:
    """The requests of a round by prompt, with the weights of each, those that a method made if it did: a function of these alone."""
    found = []
    for at, prompt in enumerate(drawn_prompts(prompts, config.prompts, number, config.seed)):
        if made:
            weights = named_weights(made, objectives)
        elif config.weights:
            weights = parse_weights(config.weights, objectives)
        else:
            weights = random_weights([config.seed, 1, number, at], len(objectives), config.concentration, config.grid)
        found.append(make_requests([prompt], config.samples, request_seed(config.seed, f"round {number}"), weights))
    return found


def scalarised(z_PGK: np.ndarray, weights_PK: np.ndarray, config: Config) -> np.ndarray:
    """s of every response, [P, G]."""
    if config.scalarisation == "linear":
        return np.stack([linear(z_GK, w_K) for z_GK, w_K in zip(z_PGK, weights_PK.tolist(), strict=True)])
    return np.stack([chebyshev(z_GK, w_K, config.ideal) for z_GK, w_K in zip(z_PGK, weights_PK.tolist(), strict=True)])


def trained_at(objectives: Sequence[str], config: Config, made: Mapping[str, float] | None = None) -> Record:
    """What a card says of the trade-off, by which the policy is served.

    Weights v that a method made are at beta what v / sum v is at beta / sum v; with a negative one there are none on the simplex.
    """
    if made and min(made.values()) >= 0 and sum(made.values()) > 0:
        total = sum(made.values())
        return {"objectives": tuple(objectives), "weights": tuple(made[name] / total for name in objectives), "beta": config.beta / total}
    said = {"weights": parse_weights(config.weights, objectives)} if config.weights else {"reads": config.reading}
    return {"objectives": tuple(objectives), **said}


def base_rows(learner: Learner, scored: Round) -> list[Row]:
    """A row per prompt: its responses as they were drawn, and the reference's and the policy's log-probabilities of every token."""
    rows = []
    for requests, rollouts, w_K in zip(scored.requests, scored.rollouts, scored.weights_PK, strict=True):
        completions = Completions(learner.prompt(requests[0]), tuple(rollout.tokens for rollout in rollouts))
        told = {"drawn": [r.logprobs for r in rollouts], "reference": [r.ref_logprobs for r in rollouts]}
        rows.append(Row(completions, {"weights": w_K.tolist()}, told))
    return rows


# --- the loop


@dataclass(frozen=True)
class Rounds:
    """A run of rounds."""

    learner: Learner
    prompts: Sequence[Prompt]
    rewards: Sequence[Reward]
    scale: Normaliser
    sampler: Sampler
    method: Method
    config: Config
    out: Path

    def run(self) -> list[Record]:
        """Train to the end and return every round's statistics.

        Raises `UserError` where a reward fails (what is there is kept, the run can go on), and where training diverges.
        """
        from equipoise.training.trainer import restore

        identity = digest_of({"config": recorded(self.config), "method": repr(self.method), "scale": recorded(self.scale)})
        step, checkpoint = last_sealed(self._checkpoints, identity)
        if checkpoint:
            restore(self.learner.trained, self._fit, checkpoint)
        records: list[Record] = []
        begun, first = time.monotonic(), step // self.config.steps
        for number in range(self.config.rounds):
            settings = self.method.settings(records)
            if settings is None:
                break
            records.append(self._round(number, settings, identity, done=number < first))
            write_text(self.out / "log.jsonl", "".join(json.dumps(plain(record)) + "\n" for record in records))
            if number >= first:
                say(self._line(records[-1], (time.monotonic() - begun) / (number + 1 - first)))
        return records

    @property
    def _checkpoints(self) -> Path:
        return self.out / "checkpoints"

    @property
    def _fit(self) -> FitConfig:
        return replace(self.config.fit, max_steps=self.config.steps)

    def _round(self, number: int, settings: Record, identity: str, *, done: bool) -> Record:
        """Statistics of a round, which is sampled, scored and trained on unless that is done."""
        folder = self.out / "rounds" / f"{number:04d}"
        if done and (folder / "round.json").exists():
            return dict(read_json(folder / "round.json"))
        scored = self._scored(number, folder, settings.get("weights"))
        record = statistics(scored, self.learner.objectives) | settings
        begin = number * self.config.steps
        if done:  # the run was killed before it wrote this down
            kept = max(self._checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
            history = entries_of(read_json(kept / "trainer_state.json")["log_history"], begin, begin + self.config.steps)
        else:
            history = self._trained(scored, record, settings, begin, identity)
        record |= {"step": begin + self.config.steps} | summary(history)
        write_json(folder / "round.json", record)
        return dict(plain(record))  # as it will be read: NaN is null

    def _scored(self, number: int, folder: Path, made: Mapping[str, float] | None) -> Round:
        """The round's responses with their rewards; shards that are there are read."""
        self.learner.trained.eval()
        requests = requests_of(self.prompts, self.learner.objectives, self.config, number, made)
        flat = [request for group in requests for request in group]
        try:
            with bar(f"round {number + 1}/{self.config.rounds}: responses and scores", 2 * len(flat)) as advance:
                size = SHARD_BATCHES * self.config.sampling.batch_size
                rollouts = collect(self.sampler, flat, folder / "rollouts", size, advance)
                asked = {request.prompt.id: request.prompt for request in flat}
                rewards = score_shards(self.rewards, asked, rollouts, folder / "rewards", size, advance)
        except UserError as error:
            raise UserError(f"paused in round {number + 1} of {self.config.rounds}, all before it is kept: {error}") from None
        shape = (len(requests), self.config.samples)
        reward_PGK = rewards.reward_NK.reshape(*shape, -1)
        weights_PK = np.array([group[0].weights for group in requests])
        z_PGK = self.scale(reward_PGK)
        return Round(
            number=number,
            requests=requests,
            rollouts=[rollouts[at : at + shape[1]] for at in range(0, len(rollouts), shape[1])],
            weights_PK=weights_PK,
            reward_PGK=reward_PGK,
            z_PGK=z_PGK,
            scalar_PG=scalarised(z_PGK, weights_PK, self.config),
        )

    def _trained(self, scored: Round, record: Record, settings: Record, begin: int, identity: str) -> list[dict[str, float]]:
        """Take the round's steps. Raises `UserError` where it has diverged, or does."""
        last = self._checkpoints / f"checkpoint-{begin}" if begin else None
        kl = record["kl_exact"]
        if not kl <= self.config.max_kl:
            before = self._checkpoints / f"checkpoint-{begin - self.config.steps}"
            remedy = f"KL is {kl:.3g} nats per response, over max_kl {self.config.max_kl:g}: lower fit.learning_rate or raise beta"
            raise UserError(self._stopped(scored.number, before, remedy))
        rows = base_rows(self.learner, scored)
        shared = can_share(self.learner.reference.model, [row.completions for row in rows[:2]])
        rows = self.method.rows(self.learner, rows, scored, settings, shared=shared)
        stretch = Stretch(begin=begin, total=self.config.rounds * self.config.steps, checkpoint=last, identity=identity)
        lengths, loss = [row.completions.tokens(shared=shared) for row in rows], self.method.loss(settings)
        try:
            trained, folder = self.learner.trained, self._checkpoints
            return fit(trained, rows, collator(shared=shared), loss, self._fit, folder, lengths=lengths, stretch=stretch).history
        except DivergedError as error:
            raise UserError(self._stopped(scored.number, last, str(error))) from None

    def _stopped(self, number: int, good: Path | None, why: str) -> str:
        """Save the policy as it was at a checkpoint, and say that the run stopped."""
        from equipoise.training.trainer import restore

        said = f"stopped in round {number + 1} of {self.config.rounds}: {why}"
        if good is None or not good.is_dir():  # the reference is all there was
            return said
        restore(self.learner.trained, self._fit, good)
        kept = self.out / "last_good"
        write_json(kept / "card.json", {"method": self.method.title, **trained_at(self.learner.objectives, self.config)})
        return f"{said}; the last good policy is in {self.learner.save(kept)[0]}"

    def _line(self, record: Record, seconds: float) -> str:
        """A round in a line."""
        rewards = ", ".join(f"{name} {value:+.2f}" for name, value in record["reward"].items())
        left = (self.config.rounds - 1 - record["round"]) * seconds / 60
        return (
            f"round {record['round'] + 1}/{self.config.rounds}: {rewards} sd, KL {record['kl_exact']:.2f} nats, "
            f"{record['length']:.0f} tokens, {record['truncated']:.0%} cut, loss {record['loss']:.3g}; about {left:.0f} min left"
        )


def train(
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    scale: Normaliser,
    source: str,
    config: Config,
    method: Method,
    run: Manifest,
    sampler_of: Callable[[Learner], Sampler],
) -> list[Record]:
    """Train a policy from `source` on, which is the reference too, save it, and return every round's statistics.

    `sampler_of` gives what draws the policy's responses, with their exact KL. Raises `UserError` as `Rounds.run` does, and for
    weights, an ideal or statistics of other objectives than the rewards'.
    """
    objectives = tuple(reward.name for reward in rewards)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("rounds run in one process: start them without accelerate launch")
    if config.weights:
        parse_weights(config.weights, objectives)
    if (config.reads == "nothing" and not config.weights) != ("weights" in (method.settings([]) or {})):
        raise UserError(
            f"{method.title} with weights {config.weights!r} and reads {config.reads!r}: `train map` alone makes its own weights"
        )
    if config.ideal and len(config.ideal) != len(objectives):
        raise UserError(f"the ideal {config.ideal} is of {len(config.ideal)} objectives, and the rewards are {', '.join(objectives)}")
    if scale.objectives != objectives:
        raise UserError(f"the statistics are of {', '.join(scale.objectives)}, and the rewards are {', '.join(objectives)}")
    start = load_start(source)
    learner = method.prepared(make_learner(start, objectives, config.reading, config.lora, config.weighted, config.fit.seed))
    about = {"base": start.base.name, "weights_key": start.weights}
    records = Rounds(learner, prompts, rewards, scale, sampler_of(learner), method, config, run.folder).run()
    folders = learner.save(run.folder)
    asked = trained_at(objectives, config, records[-1].get("weights"))
    card: dict[str, Any] = {"method": method.title, "model": source, "beta": config.beta, **asked, **about}
    card |= {"trained_parameters": sum(p.numel() for p in learner.trained.parameters() if p.requires_grad)}
    card |= {"responses": len(records) * config.prompts * config.samples, "last_round": records[-1]}
    run.outputs += [run.folder / "log.jsonl", *sorted((run.folder / "rounds").rglob("*.*"))]
    conclude(run, folders, {"card": card})
    return records
