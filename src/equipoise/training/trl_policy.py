"""RLOO, GRPO and GDPO of several rewards by TRL's trainers, on our prompts, rewards and statistics, where what they maximise can be said.

    rloo   A_i = R_i - mean_(j != i) R_j,    R = sum_k w_k z_k - beta l,    l = log pi_drawn(y) - log pi_ref(y)
           L = -mean_y min(rho A, clip(rho, 1 - eps, 1 + eps) A),    rho = pi(y) / pi_drawn(y)       of whole responses
    grpo   A_i = s_i - mean s,    s = sum_k w_k z_k;    gdpo as in `training/ppo.py`;    rho of each token, summed, over the longest length

RLOO is MORLHF as `train ppo` has it with the KL in the reward: the optimum is pi proportional to pi_ref exp(s / beta), and TRL's beta,
which multiplies l, is the beta that divides s here. TRL clips whole responses in place of tokens, and the kl that it logs is a mean of l
per token, not the exact KL.

GRPO's beta has to be 0. TRL adds beta k3 of every drawn token to the loss; its gradient where the tokens were drawn is that of the
forward KL. With `use_bias_correction_kl` it is that of each token's reverse KL at the drawn prefixes, without what a token does to the
KL of those after it. Neither leads to pi_ref exp(s / beta). Without a KL only the number of steps keeps the policy near the reference.

What is set and can't be changed: temperature 1 from all tokens (else the gradient is of another law); GRPO's loss is a sum of tokens over
a constant (dr_grpo), where TRL's default, a mean over the batch's tokens, counts a response by its length; bfloat16, which TRL switches
on unasked, is off; only adapters, since of whole weights TRL loads the reference from the disk, whatever the policy began as. TRL
counts one unscored objective as 0; here a response without a weighted objective is unscored altogether, and has advantage 0.

Paper: RLOO (2402.14740), GRPO (2402.03300), GDPO (2601.05242); TRL 1.16. Departures: those above.
Reads: prompts, rewards, frozen statistics. Writes: adapter/, card.json, history.json (as TRL logs it), checkpoints/ while it runs.
The weights enter: the rewards, one vector for the whole run (TRL has none per row).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from equipoise.models.chat import plain_text
from equipoise.models.lora import Lora, lora_settings, no_dropout
from equipoise.objectives import Normaliser, parse_weights
from equipoise.progress import bar
from equipoise.rewards.scoring import Text, score
from equipoise.runs import Manifest, digest_of, recorded
from equipoise.training.fit import DivergedError, last_sealed, seal
from equipoise.training.on_policy import drawn_prompts
from equipoise.training.policy import conclude, load_start, save_policy
from equipoise.types import Prompt, UserError

if TYPE_CHECKING:
    from equipoise.types import Reward
else:
    Reward = Any  # a protocol, which the tests' check of axes can't look into

Algorithm = Literal["rloo", "grpo", "gdpo"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What TRL is asked to do."""

    algorithm: Algorithm = "rloo"
    """What a response is compared with; see the equations."""
    weights: str = ""
    """The trade-off that is trained for, as helpful=0.7,harmless=0.3."""
    beta: float = 0.5
    """Of rloo: standard deviations of reward per nat of KL; grpo and gdpo take 0 alone."""
    steps: int = 56
    """Steps of the optimiser."""
    prompts: int = 16
    """Prompts of a batch of responses."""
    samples: int = 4
    """Responses to each of them."""
    reuse: int = 1
    """Steps on the same responses."""
    batch_size: int = 16
    """Responses in a forward; has to divide prompts times samples."""
    clip: float = 0.2
    """eps."""
    learning_rate: float = 2e-4
    """Peak of the schedule, a line down to 0."""
    warmup: float = 0.1
    """Share of the steps over which it rises from 0."""
    max_new_tokens: int = 128
    """Longest response."""
    lora: Lora = field(default_factory=lambda: Lora(dropout=0.0))
    """Which weights are trained."""
    checkpoint_every: int = 10
    """Steps between checkpoints, a multiple of `reuse`."""
    seed: int = 0
    """Of adapters, order and responses."""

    def __post_init__(self) -> None:
        if self.algorithm not in get_args(Algorithm):
            raise UserError(f"the algorithm is one of {', '.join(get_args(Algorithm))}, not {self.algorithm!r}")
        if self.algorithm != "rloo" and self.beta != 0:
            raise UserError(
                f"beta {self.beta:g}: the KL of TRL's GRPO is a loss whose gradient isn't the KL's, so beta is 0; "
                "rloo, or `train ppo --ppo.advantage grpo`, have the KL"
            )
        if not self.weights:
            raise UserError("weights are empty: TRL trains for one trade-off, such as helpful=0.7,harmless=0.3")
        if self.beta < 0 or min(self.learning_rate, self.clip) <= 0 or not 0 <= self.warmup < 1:
            raise UserError(
                "beta must not be negative, learning_rate and clip be positive and warmup from 0 to less than 1, got "
                f"{self.beta}, {self.learning_rate}, {self.clip} and {self.warmup}"
            )
        counts = (self.steps, self.prompts, self.reuse, self.batch_size, self.max_new_tokens, self.checkpoint_every)
        if min(counts) < 1 or self.samples < 2 or self.prompts * self.samples % self.batch_size or self.checkpoint_every % self.reuse:
            raise UserError(
                "counts must be at least 1 and samples 2, batch_size divide prompts times samples and reuse divide checkpoint_every, got "
                f"prompts {self.prompts}, samples {self.samples}, batch_size {self.batch_size}, steps {self.steps}, reuse {self.reuse}, "
                f"checkpoint_every {self.checkpoint_every}, max_new_tokens {self.max_new_tokens}"
            )
        if self.lora.rank == 0:
            raise UserError("lora.rank 0: of whole weights TRL loads the reference from the disk; train adapters, or use `train ppo`")


# --- the rewards, as TRL calls them


def told(z_NK: Float[np.ndarray, "N K"], weights_K: Sequence[float]) -> list[list[float | None]]:
    """By objective, each response's score; None throughout for a response that lacks an objective of weight."""
    lacks_N = np.isnan(z_NK[:, np.asarray(weights_K) > 0]).any(axis=1)
    return [[None if gone or np.isnan(z) else float(z) for z, gone in zip(z_N, lacks_N, strict=True)] for z_N in z_NK.T]


class Told:
    """K functions for TRL, called one after the other with the same responses, which are scored once."""

    def __init__(self, rewards: Sequence[Reward], prompts: Sequence[Prompt], scale: Normaliser, weights_K: Sequence[float]) -> None:
        self.rewards, self.scale, self.weights_K = rewards, scale, weights_K
        self.prompts = {prompt.id: prompt for prompt in prompts}
        self._last: tuple[Any, list[list[float | None]]] = (None, [])

    def functions(self) -> list[Callable[..., list[float | None]]]:
        """In the order of the rewards, by whose names TRL logs them."""
        return [self._function(k, reward.name) for k, reward in enumerate(self.rewards)]

    def _function(self, k: int, name: str) -> Callable[..., list[float | None]]:
        def given(completions: Sequence[Any], id: Sequence[str], **_rest: Any) -> list[float | None]:
            texts = [said if isinstance(said, str) else said[-1]["content"] for said in completions]
            return self._scored(id, texts)[k]

        given.__name__ = name
        return given

    def _scored(self, ids: Sequence[str], texts: Sequence[str]) -> list[list[float | None]]:
        asked = (tuple(ids), tuple(texts))
        if asked != self._last[0]:
            said = [Text(f"{prompt}/{n}", prompt, text) for n, (prompt, text) in enumerate(zip(ids, texts, strict=True))]
            self._last = (asked, told(self.scale(score(self.rewards, self.prompts, said)), self.weights_K))
        return self._last[1]


# --- the run


def asked_in_order(prompts: Sequence[Prompt], config: Config) -> list[Prompt]:
    """The prompts of all batches of the run, as our rounds draw them: TRL's own order would begin anew where a killed run goes on."""
    batches = -(-config.steps // config.reuse)
    return [prompt for number in range(batches) for prompt in drawn_prompts(prompts, config.prompts, number, config.seed)]


def rows_of(tokenizer: Any, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """TRL's rows, from which it makes the token ids of `chat.prompt_ids`: messages where there is a template, else text."""
    if getattr(tokenizer, "chat_template", None):
        return [{"id": p.id, "prompt": [dict(m) for m in p.messages]} for p in prompts]
    return [{"id": p.id, "prompt": plain_text(p.messages)} for p in prompts]


def settings_of(config: Config, weights_K: Sequence[float], output: str) -> dict[str, Any]:
    """TRL's settings, but for what only one of its trainers has."""
    import torch

    per_step = config.prompts * config.samples // config.batch_size
    return {
        **{"output_dir": output, "max_steps": config.steps, "seed": config.seed, "use_cpu": not torch.accelerator.is_available()},
        **{"learning_rate": config.learning_rate, "lr_scheduler_type": "linear", "warmup_steps": round(config.warmup * config.steps)},
        **{"per_device_train_batch_size": config.batch_size, "gradient_accumulation_steps": per_step, "steps_per_generation": per_step},
        **{"num_generations": config.samples, "num_iterations": config.reuse, "epsilon": config.clip, "beta": config.beta},
        **{"reward_weights": list(weights_K), "max_completion_length": config.max_new_tokens, "shuffle_dataset": False},
        **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "bf16": False, "gradient_checkpointing": False, "report_to": "none"},
        **{"logging_steps": 1, "save_strategy": "steps", "save_steps": config.checkpoint_every, "save_total_limit": 2},
        **{"disable_tqdm": True, "dataloader_pin_memory": torch.cuda.is_available(), "logging_nan_inf_filter": False},
    }


def make_trainer(lm: Any, config: Config, functions: Sequence[Callable[..., Any]], prompts: Sequence[Prompt], output: str) -> Any:
    """TRL's trainer of new adapters on a model, which is the reference.

    Raises `UserError` where trl is missing, and where there are too few prompts for a batch.
    """
    import torch

    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    except ImportError as error:
        raise UserError(f"TRL can't be used ({error}): pip install 'equipoise[trl,train]'") from None
    weights_K = parse_weights(config.weights, [function.__name__ for function in functions])
    shared = settings_of(config, weights_K, output)
    if config.algorithm == "rloo":
        trainer, arguments = RLOOTrainer, RLOOConfig(**shared, normalize_advantages=False)
    else:
        how = "sum_then_normalize" if config.algorithm == "grpo" else "normalize_then_sum"
        shared |= {"loss_type": "dr_grpo", "scale_rewards": "none", "multi_objective_aggregation": how}
        trainer, arguments = GRPOTrainer, GRPOConfig(**shared)
    no_dropout(lm.model)
    lm.model.generation_config.eos_token_id = list(lm.eos_ids)
    torch.manual_seed(config.seed)  # new adapters
    made: Any = trainer(
        model=lm.model,
        reward_funcs=list(functions),
        args=arguments,
        train_dataset=Dataset.from_list(rows_of(lm.tokenizer, asked_in_order(prompts, config))),
        processing_class=copy.deepcopy(lm.tokenizer),  # it sets the side of the padding
        peft_config=lora_settings(lm.model, config.lora, "CAUSAL_LM"),
    )
    made.create_model_card = lambda *_args, **_settings: None  # card.json says it
    made.model.peft_config["default"].base_model_name_or_path = ""  # else it asks the Hub at every checkpoint
    return made


def train(prompts: Sequence[Prompt], rewards: Sequence[Reward], scale: Normaliser, source: str, config: Config, run: Manifest) -> None:
    """Train adapters on `source`, which is the reference too, and save them.

    Raises `UserError` for weights or statistics of other objectives than the rewards', where a reward fails, and where training diverges.
    """
    from transformers import PrinterCallback

    from equipoise.training.trainer import Watch

    objectives = tuple(reward.name for reward in rewards)
    weights_K = parse_weights(config.weights, objectives)
    if scale.objectives != objectives:
        raise UserError(f"the statistics are of {', '.join(scale.objectives)}, and the rewards are {', '.join(objectives)}")
    start, folder = load_start(source), run.folder / "checkpoints"
    trainer = make_trainer(start.lm, config, Told(rewards, prompts, scale, weights_K).functions(), prompts, str(folder))
    identity = digest_of({"config": recorded(config), "scale": recorded(scale), "prompts": [prompt.id for prompt in prompts]})
    begun, checkpoint = last_sealed(folder, identity)
    trainer.remove_callback(PrinterCallback)
    with bar(f"{config.algorithm} by TRL", config.steps - begun) as advance:
        trainer.add_callback(Watch(lambda path: seal(path, identity), advance, config.learning_rate, config.steps))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except DivergedError as error:
            raise UserError(str(error)) from None
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    about = {"base": start.base.name, "weights_key": start.weights, "beta": config.beta}
    card = {"method": f"{config.algorithm} by TRL", "model": source, "objectives": objectives, "weights": weights_K, **about}
    conclude(run, save_policy(run.folder, start, trainer.model, config.lora), {"card": card, "history": history})
