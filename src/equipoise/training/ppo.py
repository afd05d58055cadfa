"""PPO on one reward or several (MORLHF): a clipped policy gradient towards a scalarised reward, with the KL to the reference.

    maximise E[s(r(x, y), w)] - beta KL(pi || pi_ref)          optimum: pi proportional to pi_ref exp(s / beta)

    L = mean_y -sum_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t),      rho_t = pi(y_t | .) / pi_drawn(y_t | .)
    R = s - beta l,    l = sum_t l_t,    l_t = log pi_drawn(y_t | .) - log pi_ref(y_t | .)        nats; beta in sd of reward per nat

    rloo   A_t = R_i - mean_(j != i) R_j                            over a prompt's G responses; no bias, nothing beside the policy
    grpo   A_t = (R_i - mean R) / (sd R + 1e-4)                     with kl = reward each prompt's gradient is scaled, and the optimum
                                                                    stays; with kl = loss its beta is sd R times as large
    gdpo   A_t = batch_z(sum_k w_k (z_ik - mean z_k) / (sd z_k + 1e-4)) - beta (l_i - mean l)
                                                                    each objective in units of its own spread within the group, so
                                                                    that none is drowned; beta is then in these units
    gae    A_t = sum_(s >= t) (gamma lambda)^(s-t) (e_s + gamma V_(s+1) - V_s),    e_t = -beta l_t, + s at the last token
                                                                    V: a linear head on the policy's states, trained beside it

With kl = loss, l leaves the advantages and beta / 2 times the variance of log pi - log pi_ref over each prompt's responses is added to
L: where they were drawn its gradient is that of the KL, and it follows the policy through a round's later steps, through which an
advantage stays as it was. beta is fixed, or beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon) after every round.

Papers: PPO (1707.06347), Ziegler et al. 2019 (1909.08593: adaptive KL), RLOO (2402.14740), GRPO (2402.03300), GDPO (2601.05242);
MORLHF as in Rewards-in-Context (2402.10207) and Rewarded Soups (2306.04488). Departures: rewards are standardised on the reference,
where the released code weighs raw, rounded ones; responses are drawn at temperature 1 from all tokens, where that code draws at
0.7 and takes the KL of the untempered law; the loss sums a response's tokens, so that its gradient is that of E[R]; no k3 is ever a
loss, as GRPO has it, since its gradient is that of the forward KL and leads elsewhere.
Reads: prompts, rewards, frozen statistics. Writes: adapter/ or model/, card.json, and what `on_policy` writes.
The weights enter: the rewards; with `reads`, the parameters or the prompt too, and one policy serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from equipoise.models.batching import by_length
from equipoise.models.logprobs import kl_k3
from equipoise.training import on_policy
from equipoise.training.completion_rows import Row, collator, row_logprobs
from equipoise.training.learner import Learner
from equipoise.types import LossOutput, UserError

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any

Advantage = Literal["rloo", "grpo", "gdpo", "gae"]
_EPS = 1e-4  # GRPO's and GDPO's, in units of the rewards


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the policy gradient."""

    advantage: Advantage = "rloo"
    """What a response, or a token, is compared with; see the equations."""
    kl: Literal["", "loss", "reward"] = ""
    """Where the KL to the reference enters; "" for the loss, but with gae, which needs it there, for the reward."""
    kl_target: float = 0.0
    """Nats per response that the adaptive beta aims at; 0 for a fixed beta."""
    kl_horizon: float = 10000.0
    """Responses over which the adaptive beta changes by a fifth at most."""
    clip: float = 0.2
    """eps: how far a token's probability may move from where it was drawn before it earns nothing more."""
    gamma: float = 1.0
    """Of gae: discount per token."""
    lam: float = 0.95
    """Of gae: lambda, from one step (0) to whole responses (1)."""
    value_clip: float = 0.2
    """Of gae: how far a value may move from what it was."""
    value_coefficient: float = 0.1
    """Of gae: weight of the values' squared error."""

    def __post_init__(self) -> None:
        if self.advantage not in get_args(Advantage) or self.kl not in ("", "reward", "loss"):
            raise UserError(
                f"advantage is one of {', '.join(get_args(Advantage))} and kl reward or loss, got {self.advantage!r} and {self.kl!r}"
            )
        if self.kl == "loss" and self.advantage == "gae":
            raise UserError("gae takes the KL as a reward of every token: leave kl away, or choose another advantage")
        if min(self.kl_target, self.value_coefficient) < 0 or not min(self.kl_horizon, self.clip, self.value_clip) > 0:
            raise UserError(
                "kl_target and value_coefficient must not be negative and kl_horizon, clip and value_clip must be positive, got "
                f"{self.kl_target}, {self.value_coefficient}, {self.kl_horizon}, {self.clip} and {self.value_clip}"
            )
        if not (0 < self.gamma <= 1 and 0 <= self.lam <= 1):
            raise UserError(f"gamma lies above 0 and lam from 0, both up to 1, got {self.gamma} and {self.lam}")

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL is a term of the loss."""
        return (self.kl or ("reward" if self.advantage == "gae" else "loss")) == "loss"


# --- the maths


def leave_one_out(return_BG: Float[np.ndarray, "B G"]) -> Float[np.ndarray, "B G"]:
    """R_i - mean_(j != i) R_j within each row; NaN is left out and has advantage 0, and so has what is alone."""
    there_BG = np.isfinite(return_BG)
    known_BG, count_B1 = np.where(there_BG, return_BG, 0.0), there_BG.sum(axis=1, keepdims=True)
    others_BG = (known_BG.sum(axis=1, keepdims=True) - known_BG) / np.maximum(count_B1 - 1, 1)
    return np.where(there_BG & (count_B1 > 1), known_BG - others_BG, 0.0)


def standardised(value_BG: Float[np.ndarray, "B G"]) -> Float[np.ndarray, "B G"]:
    """(v - mean) / (sd + 1e-4) within each row, sd with ddof 1; NaN is left out and becomes 0, and so does what is alone."""
    there_BG = np.isfinite(value_BG)
    count_B1 = there_BG.sum(axis=1, keepdims=True)
    known_BG = np.where(there_BG, value_BG, 0.0)
    apart_BG = np.where(there_BG, known_BG - known_BG.sum(axis=1, keepdims=True) / np.maximum(count_B1, 1), 0.0)
    sd_B1 = np.sqrt((apart_BG**2).sum(axis=1, keepdims=True) / np.maximum(count_B1 - 1, 1))
    return np.where(count_B1 > 1, apart_BG / (sd_B1 + _EPS), 0.0)


def decoupled(z_BGK: Float[np.ndarray, "B G K"], weights_BK: Float[np.ndarray, "B K"]) -> Float[np.ndarray, "B G"]:
    """GDPO: each objective standardised in its group, weighted, summed, and the sums standardised over the batch.

    A response that lacks an objective of positive weight is NaN.
    """
    each_BGK = np.stack([standardised(z_BG) for z_BG in np.moveaxis(z_BGK, 2, 0)], axis=2)
    lacks_BG = (np.isnan(z_BGK) & (weights_BK[:, None] > 0)).any(axis=2)
    sum_BG = np.where(lacks_BG, np.nan, (each_BGK * weights_BK[:, None]).sum(axis=2))
    return np.where(lacks_BG, np.nan, standardised(sum_BG.reshape(1, -1)).reshape(sum_BG.shape))


def token_rewards(
    scalar_N: Float[np.ndarray, " N"], logratio_NT: Float[np.ndarray, "N T"], real_NT: Float[np.ndarray, "N T"], beta: float
) -> Float[np.ndarray, "N T"]:
    """e_t = -beta l_t, and s more at each response's last real token."""
    reward_NT = -beta * logratio_NT * real_NT
    reward_NT[np.arange(len(reward_NT)), real_NT.sum(axis=1).astype(int) - 1] += scalar_N
    return reward_NT


def gae(
    reward_NT: Float[np.ndarray, "N T"], value_NT: Float[np.ndarray, "N T"], real_NT: Float[np.ndarray, "N T"], gamma: float, lam: float
) -> Float[np.ndarray, "N T"]:
    """A_t of each token, 0 at padding; the value after a response's last token is 0. Source: Schulman et al. 2015 (1506.02438)."""
    value_NT = value_NT * real_NT
    ahead_NT = np.concatenate([value_NT[:, 1:], np.zeros_like(value_NT[:, :1])], axis=1)
    delta_NT = (reward_NT + gamma * ahead_NT - value_NT) * real_NT
    advantage_NT = np.zeros_like(delta_NT)
    after_N = np.zeros(len(delta_NT))
    for t in reversed(range(delta_NT.shape[1])):
        after_N = delta_NT[:, t] + gamma * lam * after_N * real_NT[:, t]
        advantage_NT[:, t] = after_N
    return advantage_NT


def adapted(beta: float, kl: float, target: float, horizon: float, count: int) -> float:
    """beta after `count` responses whose mean KL was `kl`: up where it was above the target, by at most a fifth per horizon."""
    return beta * (1 + float(np.clip(kl / target - 1, -0.2, 0.2)) * count / horizon)


def clipped_objective(logratio_BGT: Float[Tensor, "B G T"], advantage_BGT: Float[Tensor, "B G T"], clip: float) -> Float[Tensor, "B G T"]:
    """min(rho A, clip(rho) A) of each token, rho = exp(log-ratio to the policy that drew it). Differentiable."""
    import torch

    ratio_BGT = logratio_BGT.exp()
    return torch.minimum(ratio_BGT * advantage_BGT, ratio_BGT.clamp(1 - clip, 1 + clip) * advantage_BGT)


def half_variance(logratio_BG: Float[Tensor, "B G"], scored_BG: Float[Tensor, "B G"]) -> Float[Tensor, " B"]:
    """Half the variance (ddof 1) of each row's scored log-ratios, whose gradient is, where they were drawn, that of the KL.

    grad = cov(l, grad log pi), and E[grad log pi] = 0. Differentiable; 0 for fewer than two.
    """
    count_B = scored_BG.sum(1)
    mean_B1 = (logratio_BG * scored_BG).sum(1, keepdim=True) / count_B.clamp_min(1)[:, None]
    return 0.5 * ((logratio_BG - mean_B1) ** 2 * scored_BG).sum(1) / (count_B - 1).clamp_min(1)


# --- values


def with_values(learner: Learner) -> Learner:
    """The learner with a linear value of each state beside the policy, 0 at first."""
    from torch import nn

    class WithValues(nn.Module):
        """A policy and its value head, as one module to train."""

        def __init__(self) -> None:
            super().__init__()
            self.policy = learner.model
            self.value = nn.Linear(learner.reference.hidden_size, 1, device=learner.reference.device)
            nn.init.zeros_(self.value.weight)
            nn.init.zeros_(self.value.bias)
            self.row_weights = getattr(learner.model, "row_weights", None)

        def forward(self, **inputs: Any) -> Any:
            return self.policy(**inputs)

        def get_output_embeddings(self) -> Any:
            return self.policy.get_output_embeddings()

    return replace(learner, around=WithValues())


def logprobs_and_values(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(log p of every response token, value of the state before it), [B, G, T] each, 0 at padding. Differentiable."""
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    try:
        logprob_BGT = row_logprobs(model, batch)
    finally:
        hook.remove()
    real_BGT = batch["real"].bool()
    value_N = model.value(seen[0].flatten(0, 1)[batch["predictor"][real_BGT]].float())[:, 0]
    return logprob_BGT, logprob_BGT.new_zeros(real_BGT.shape).masked_scatter(real_BGT, value_N)


def values_of(model: Any, rows: Sequence[Row], *, shared: bool, batch_tokens: int = 4096) -> list[list[np.ndarray]]:
    """The value before each token of each response, [G] arrays [T] per row."""
    import torch

    found: list[list[np.ndarray]] = [[] for _ in rows]
    device, collate = next(model.parameters()).device, collator(shared=shared)
    with torch.inference_mode():
        for part in by_length([row.completions.tokens(shared=shared) for row in rows], batch_tokens):
            batch = {name: value.to(device) for name, value in collate([rows[i] for i in part]).items()}
            value_BGT = logprobs_and_values(model, batch)[1].double().cpu().numpy()
            for at, i in enumerate(part):
                found[i] = [value_T[: len(y)] for value_T, y in zip(value_BGT[at], rows[i].completions.responses, strict=True)]
    return found


# --- the method


@dataclass(frozen=True)
class PPO:
    """What PPO adds to the rounds (`on_policy.Method`)."""

    config: Config
    loop: on_policy.Config
    title: str = "PPO"

    def prepared(self, learner: Learner) -> Learner:
        """With a value head, where it is asked for."""
        return with_values(learner) if self.config.advantage == "gae" else learner

    def settings(self, records: Sequence[on_policy.Record]) -> dict[str, float]:
        """beta of the next round."""
        if not self.config.kl_target or not records:
            return {"beta": self.loop.beta}
        last, count = records[-1], self.loop.prompts * self.loop.samples
        return {"beta": adapted(last["beta"], last["kl_exact"], self.config.kl_target, self.config.kl_horizon, count)}

    def rows(
        self, learner: Learner, rows: Sequence[Row], scored: on_policy.Round, settings: dict[str, float], *, shared: bool
    ) -> list[Row]:
        """Rows with an advantage for every token; unscored responses have 0 and no KL either."""
        beta, there_PG = settings["beta"], np.isfinite(scored.scalar_PG)
        logratio = [[np.subtract(d, r) for d, r in zip(*_told(row), strict=True)] for row in rows]
        found = []
        if self.config.advantage == "gae":
            value = values_of(learner.trained, rows, shared=shared)
            for p, row in enumerate(rows):
                advantage, target = self._by_tokens(scored.scalar_PG[p], logratio[p], value[p], beta)
                found.append(_with(row, there_PG[p], {"advantage": advantage, "value": value[p], "value_target": target}))
        else:
            sum_PG = np.array([[each.sum() for each in group] for group in logratio])
            advantage_PG = self._by_responses(scored, sum_PG, beta)
            for row, advantage_G, there_G in zip(rows, advantage_PG, there_PG, strict=True):
                spread = [np.full(len(y), a) for a, y in zip(advantage_G, row.completions.responses, strict=True)]
                found.append(_with(row, there_G, {"advantage": spread}))
        return found

    def _by_responses(self, scored: on_policy.Round, logratio_PG: np.ndarray, beta: float) -> np.ndarray:
        """One advantage for all tokens of a response, [P, G]."""
        if self.config.advantage == "gdpo":
            reward_PG = decoupled(scored.z_PGK, scored.weights_PK)
            if self.config.kl_in_loss:
                return np.nan_to_num(reward_PG)
            penalty_PG = np.where(np.isnan(reward_PG), np.nan, logratio_PG)
            apart_PG = penalty_PG - np.nanmean(penalty_PG, axis=1, keepdims=True)
            return np.nan_to_num(reward_PG - beta * apart_PG)
        return_PG = scored.scalar_PG - (0.0 if self.config.kl_in_loss else beta * logratio_PG)
        return (leave_one_out if self.config.advantage == "rloo" else standardised)(return_PG)

    def _by_tokens(
        self, scalar_G: np.ndarray, logratio: list[np.ndarray], value: list[np.ndarray], beta: float
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(advantages, targets of the values) of each response's tokens."""
        longest = max(map(len, logratio))
        logratio_GT, value_GT = (np.stack([np.pad(each, (0, longest - len(each))) for each in part]) for part in (logratio, value))
        real_GT = np.stack([(np.arange(longest) < len(each)).astype(float) for each in logratio])
        reward_GT = token_rewards(np.nan_to_num(scalar_G), logratio_GT, real_GT, beta)
        advantage_GT = gae(reward_GT, value_GT, real_GT, self.config.gamma, self.config.lam)
        cut = [advantage_T[: len(each)] for advantage_T, each in zip(advantage_GT, logratio, strict=True)]
        return cut, [a + v for a, v in zip(cut, value, strict=True)]

    def loss(self, settings: dict[str, float]) -> Callable[[Any, dict[str, Any]], LossOutput]:
        """The clipped loss, with the values' or the KL's where there is one."""
        config, beta = self.config, settings["beta"]

        def loss(model: Any, batch: dict[str, Any]) -> LossOutput:
            value_BGT = None
            if config.advantage == "gae":
                logprob_BGT, value_BGT = logprobs_and_values(model, batch)
            else:
                logprob_BGT = row_logprobs(model, batch)
            used_BGT = batch["real"] * batch["scored"][..., None]
            since_BGT = (logprob_BGT - batch["drawn"]) * used_BGT
            gained_BGT = clipped_objective(since_BGT, batch["advantage"], config.clip) * used_BGT
            total = -gained_BGT.sum(-1).mean()
            tokens = used_BGT.sum().clamp_min(1)
            moved_BGT = since_BGT.detach()
            logged = {
                "clip_fraction": ((moved_BGT.exp() - 1).abs() > config.clip).sum() / tokens,
                "kl_k3_to_drawn": kl_k3(-moved_BGT).sum() / batch["scored"].sum().clamp_min(1),
            }
            if config.kl_in_loss:
                logratio_BG = ((logprob_BGT - batch["reference"]) * used_BGT).sum(-1)
                total = total + beta * half_variance(logratio_BG, batch["scored"]).mean()
            if value_BGT is not None:
                error = _value_loss(value_BGT, batch, used_BGT, config.value_clip)
                total, logged["value_loss"] = total + config.value_coefficient * error, error.detach()
            return LossOutput(loss=total, logged=logged)

        return loss


def _told(row: Row) -> tuple[Any, Any]:
    return row.per_token["drawn"], row.per_token["reference"]


def _with(row: Row, there_G: np.ndarray, told: dict[str, Any]) -> Row:
    """The row with more numbers of its tokens, and which of its responses count."""
    return replace(row, numbers={**row.numbers, "scored": there_G.astype(float).tolist()}, per_token={**row.per_token, **told})


def _value_loss(value_BGT: Tensor, batch: dict[str, Any], used_BGT: Tensor, clip: float) -> Tensor:
    """Half the squared error of the values, the larger one of the value and of it clipped to what it was, summed over tokens."""
    import torch

    before_BGT, target_BGT = batch["value"], batch["value_target"]
    near_BGT = before_BGT + (value_BGT - before_BGT).clamp(-clip, clip)
    worse_BGT = torch.maximum((value_BGT - target_BGT) ** 2, (near_BGT - target_BGT) ** 2)
    return 0.5 * (worse_BGT * used_BGT).sum(-1).mean()
