"""Autoregressive rewards: language models whose log-probability of a response is its reward, trained on pairs.

    GenARM    min  mean_i -log sigmoid(beta d_i),                                     d_i = log pi(y_i+ | x_i) - log pi(y_i- | x_i)
    PARM      min  sum_k mean_(i in D_k) w_ik -log sigmoid(beta s_ik d_i(w_i)),      d_i(w) = log pi_w(y_i1 | x_i) - log pi_w(y_i2 | x_i)

log pi: summed over the response's tokens, nats, with no reference beside it; s_ik: 1 or -1, which response is better on
objective k; D_k: the pairs that k orders (ties and pairs without its label have no say); pi_w: one model whose adapters read the
weights w (models/weighted_lora.py); w_i ~ Dirichlet(p, .., p), or a point of a grid. The minimum over all pi is
log pi = r / beta + c(x) where labels follow Bradley and Terry's law on r. At w inside the simplex PARM's is
sigmoid(beta d) = sum_k w_k P_k where that can be had, P_k: the law of k's labels: probabilities are mixed, not rewards, and
the two agree for rewards whose differences are small. Decoding multiplies by pi^(1/b) token by token: that is
pi_ref exp(r / (beta b)) / Z for responses of one token, and for longer ones but for the normaliser of every prefix.

Papers: GenARM, arXiv 2410.08193; PARM, arXiv 2505.06274. Departures: PARM draws one w per step and process, here every row has its
own in every epoch, which depends on seed, epoch and row alone; the objectives may have pairs of their own, and each one's mean
is over these; training starts from the base in float32.
Reads: pairs. Writes: adapter/ (GenARM: PEFT's, or model/ where all weights are trained; PARM: weighted adapters), which `sample --guides`
reads, card.json (held-out accuracy by objective and weights, with intervals by prompt), held_out.json (d of each held-out pair
by weights), history.json. The weights enter: the parameters, in training and in decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from equipoise.models.completions import Completions
from equipoise.models.logprobs import can_share, completion_sums
from equipoise.models.lora import Lora, WeightedLora
from equipoise.objectives import random_weights, simplex_grid, weight_label
from equipoise.progress import bar
from equipoise.runs import Manifest
from equipoise.training import dpo
from equipoise.training.completion_rows import Row, collator, row_logprobs
from equipoise.training.fit import FitConfig, Fitted, fit
from equipoise.training.held_out import held_out_accuracy, response_facts
from equipoise.training.policy import Start, conclude, load_start, save_policy, trainable
from equipoise.types import LabelledPair, LossOutput, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from equipoise.models.loading import LanguageModel
else:
    Tensor = Any  # importing torch here would slow every --help down; under jaxtyping's hook the axes are checked, not the class


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one autoregressive reward."""

    objectives: tuple[str, ...]
    """One: GenARM, a reward of its own. Several: PARM, one reward that reads their weights."""
    beta: float = 0.05
    """Log odds of a preference per nat between two responses. GenARM: 0.05 on HH-RLHF; PARM: 0.01."""
    lora: Lora = field(default_factory=Lora)
    """GenARM's adapter; rank 0 trains all weights."""
    weighted: WeightedLora = field(default_factory=WeightedLora)
    """PARM's adapter."""
    concentration: float = 0.5
    """p of the Dirichlet law from which PARM's weights are drawn."""
    grid: int = 0
    """Draw PARM's weights from the multiples of 1/grid instead, all alike; 0 for the Dirichlet law."""
    max_length: int = 512
    """Tokens of a conversation; longer ones lose the beginning of their prompt."""
    test_share: float = 0.2
    """Share of the prompts held out for the stated accuracy."""
    licence: str = "unstated"
    """Licence of the data, for the card."""
    seed: int = 0
    """Of the split by prompt and the bootstrap; `fit.seed` is that of the training, its weights included."""
    fit: FitConfig = field(default_factory=FitConfig)
    """How it is trained; a row of a batch is a pair, with both its responses."""

    def __post_init__(self) -> None:
        if not self.objectives or not all(self.objectives) or len(set(self.objectives)) < len(self.objectives):
            raise UserError(f"objectives must be one name (GenARM) or several different ones (PARM), got {self.objectives}")
        if not self.beta > 0 or not self.concentration > 0:
            raise UserError(f"beta and concentration must be positive, got {self.beta} and {self.concentration}")
        if self.grid < 0:
            raise UserError(f"grid must not be negative, got {self.grid}")
        if not 0 < self.test_share < 1:
            raise UserError(f"test_share must lie between 0 and 1, got {self.test_share}")
        if self.max_length < 16:
            raise UserError(f"max_length must be at least 16 tokens, got {self.max_length}")

    @property
    def parm(self) -> bool:
        """Whether one reward reads the weights of several objectives."""
        return len(self.objectives) > 1


def objective_losses(gap_B: Float[Tensor, " B"], label_BK: Float[Tensor, "B K"], beta: float) -> Float[Tensor, "B K"]:
    """-log sigmoid(beta s_k d) of each pair and objective; 0 at ties and where there is no label. Differentiable."""
    import torch

    ordered_BK = label_BK.abs() == 1
    sign_BK = torch.where(ordered_BK, label_BK, 0.0)
    return -torch.nn.functional.logsigmoid(beta * sign_BK * gap_B[:, None]) * ordered_BK


def label_shares(label_NK: Float[np.ndarray, "N K"], objectives: Sequence[str]) -> Float[np.ndarray, " K"]:
    """|D_k| / N: the share of pairs that each objective orders. Raises `UserError` for one that orders none."""
    share_K = (np.abs(label_NK) == 1).mean(axis=0)
    for name, share in zip(objectives, share_K, strict=True):
        if not share:
            raise UserError(f"no pair to train on has a label of {name!r}: give pairs of it, or leave it out of objectives")
    return np.asarray(share_K)


def drawn_weights(config: Config, row: int, epoch: int) -> list[float]:
    """w of a row in an epoch, a function of these and `fit.seed` alone."""
    return list(random_weights([config.fit.seed, epoch, row], len(config.objectives), config.concentration, config.grid))


def make_loss(beta: float, share_K: Sequence[float]) -> Callable[[Any, dict[str, Any]], LossOutput]:
    """The loss as `fit` wants it, of batches with `label` and `weights`, [B, K] each."""

    def loss(model: Any, batch: dict[str, Any]) -> LossOutput:
        weights_BK, label_BK = batch["weights"], batch["label"]
        gap_B = gaps(model, batch, weights_BK)
        loss_BK = objective_losses(gap_B, label_BK, beta) / weights_BK.new_tensor(share_K)
        ahead_BK = (label_BK.nan_to_num() * gap_B[:, None] > 0).float()
        said_B = (weights_BK * (label_BK.abs() == 1)).sum(-1)
        agrees_B = (weights_BK * ahead_BK).sum(-1) / said_B.clamp_min(1e-9)
        logged = {"agreement": agrees_B.mean(), "gap": gap_B.detach().abs().mean()}
        return LossOutput(loss=(weights_BK * loss_BK).sum(-1).mean(), logged=logged)

    return loss


def gaps(model: Any, batch: dict[str, Any], weights_BK: Tensor) -> Tensor:
    """d of each pair at its weights, which a model without weighted adapters doesn't read, [B]."""
    sum_B2 = row_logprobs(model, {**batch, "weights": weights_BK}).sum(-1)
    return sum_B2[:, 0] - sum_B2[:, 1]


def learn(
    start: Start, rows: Sequence[Completions], label_NK: np.ndarray, config: Config, folder: Path, *, shared: bool
) -> tuple[LanguageModel, Fitted]:
    """The trained reward, which takes the place of the start's model, and its history; `rows` have two responses each.

    Raises `UserError` for an objective without labels, and for PARM on an adapter.
    """
    import torch

    from equipoise.models.lora import no_dropout
    from equipoise.models.weighted_lora import add_weighted_lora

    share_K = label_shares(label_NK, config.objectives)
    torch.manual_seed(config.fit.seed)  # new adapters
    if config.parm:
        if start.adapter:
            raise UserError(f"PARM's adapters lie on a plain model, not on the adapter {start.adapter}: `equipoise merge` it first")
        no_dropout(start.lm.model)
        model = add_weighted_lora(start.lm, config.weighted, config.objectives, config.fit.seed).model
    else:
        model = trainable(start, config.lora)

    def renew(row: Row, number: int, epoch: int) -> Row:
        return replace(row, numbers={**row.numbers, "weights": drawn_weights(config, number, epoch)})

    fitted = fit(
        model,
        [Row(row, {"label": label_K}) for row, label_K in zip(rows, label_NK.tolist(), strict=True)],
        collator(shared=shared),
        make_loss(config.beta, share_K.tolist()),
        config.fit,
        folder,
        lengths=[row.tokens(shared=shared) for row in rows],
        renew=renew,
        title=f"training {' and '.join(config.objectives)} on {len(rows)} pairs",
    )
    return replace(start.lm, model=fitted.model.eval()), fitted


def reward_sums(
    lm: LanguageModel, rows: Sequence[Completions], weights: Sequence[float] | None, *, shared: bool, title: str
) -> Float[np.ndarray, "N M"]:
    """log pi_w(y | x) of every response, nats; weights None for a model that reads none."""
    import torch

    from equipoise.models.weighted_lora import conditioned

    read_RK = None if weights is None else torch.tensor([list(weights)], device=lm.device)
    with bar(title, len(rows)) as advance, conditioned(lm.model, read_RK):
        return np.stack(completion_sums(lm.model, rows, shared=shared, progress=advance))


def save(out: Path, start: Start, lm: LanguageModel, config: Config) -> list[Path]:
    """Write the trained reward so that `sample --guides` reads it, and return its folder (with others that `save_policy` says)."""
    from equipoise.models.weighted_lora import save_weighted

    if not config.parm:
        return save_policy(out, start, lm.model, config.lora)
    save_weighted(lm, out / "adapter")
    return [out / "adapter"]


def train(pairs: Sequence[LabelledPair], source: str, config: Config, run: Manifest) -> Path:
    """Train on most prompts, save, and say how the held-out pairs are ordered; returns the reward's folder.

    Raises `UserError` for pairs that are too few, an objective without labels, and PARM on an adapter.
    """

    start = load_start(source)
    limit = min(config.max_length, start.lm.context_length)
    known = dpo.Config(objectives=config.objectives, test_share=config.test_share, seed=config.seed)
    examples = dpo.prepare(pairs, None, start.lm.tokenizer, limit, known)
    rows, held_rows = (
        [row for row, taken in zip(examples.completions, part_N, strict=True) if taken] for part_N in (examples.train_N, examples.held_N)
    )
    shared = can_share(start.lm.model, rows[:2])
    sums = {"untrained": reward_sums(start.lm, held_rows, None, shared=shared, title="the untrained model on the held-out pairs")}
    trained, fitted = learn(start, rows, examples.label_NK[examples.train_N], config, run.folder / "checkpoints", shared=shared)
    facts = {"trained_parameters": sum(p.numel() for p in trained.model.parameters() if p.requires_grad)}
    folders = save(run.folder, start, trained, config)
    for weights in simplex_grid(len(config.objectives), 2) if config.parm else [None]:
        name = weight_label(config.objectives, weights) if weights else "trained"
        sums[name] = reward_sums(trained, held_rows, weights, shared=shared, title=f"held-out pairs, {name}")
    held = [examples.pairs[n] for n in np.flatnonzero(examples.held_N)]
    card = {
        **{"objectives": config.objectives, "method": "PARM" if config.parm else "GenARM", "model": source, "licence": config.licence},
        **{"beta": config.beta, "train_pairs": len(rows), "test_pairs": len(held), "counts": examples.counts, **facts},
        "held_out": {name: judged(sum_N2, examples.label_NK[examples.held_N], held, config) for name, sum_N2 in sums.items()},
    }
    margins = {pair.id: {name: float(sum_N2[n, 0] - sum_N2[n, 1]) for name, sum_N2 in sums.items()} for n, pair in enumerate(held)}
    return conclude(run, folders, {"card": card, "held_out": margins, "history": fitted.history})


def judged(
    sum_N2: Float[np.ndarray, "N 2"], label_NK: Float[np.ndarray, "N K"], pairs: Sequence[LabelledPair], config: Config
) -> dict[str, Any]:
    """Accuracy on the pairs that each objective orders, with intervals by prompt, and what the reward may merely echo."""
    prompt_N = np.array([pair.prompt.id for pair in pairs])
    gap_N = sum_N2[:, 0] - sum_N2[:, 1]
    found: dict[str, Any] = {}
    for name, label_N in zip(config.objectives, label_NK.T, strict=True):
        said = np.abs(label_N) == 1
        found[name] = {"test_pairs": int(said.sum())}
        if said.any():
            found[name] |= held_out_accuracy((label_N * gap_N)[said], prompt_N[said], config.seed)
    texts = [pair.responses[side] for side in (0, 1) for pair in pairs]
    return found | response_facts(sum_N2.T.ravel(), texts)
