"""Steer a policy, token by token, with the weighted values of its candidates (MAVIS).

    pi(a | s_t) = pi_ref(a | s_t) exp( (1/beta) sum_k w_k q_k(s_t, a) ) / Z(s_t),     a among the top k of pi_ref

q_k: value of candidate a in standard deviations of the reference's reward; w: the row's weights; beta: one number, or
solved per weight vector so that the predicted KL of a response is `kl_budget` nats. Three sources of q:
  single-pass   the state that the policy has already computed: no forward beyond the policy's own (value_heads.py);
  prefix        the state after each candidate: all k candidates in one forward with tree attention, and the chosen
                one's keys and states are kept, so it is never run again (value_heads.py);
  value models  the same with the states of models of their own, which read along (value_models.py).

Paper: MAVIS (arXiv 2508.13415), equations 2 and 6; tree attention over candidates as in Q# (arXiv 2502.20548).
Departures: MAVIS multiplies by its beta, here beta divides; values are standardised; the KL is exact per step and its
top-k floor is kept apart; prompts of any length share a batch; weights are per row.
Reads: values.safetensors. Writes: nothing. The weights enter: the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from equipoise.models.generation import Guide, Sampling, Start, Step, generate, known_tokens
from equipoise.models.value_heads import FORMS, Calibration, ValueHeads, position_feature, state_features
from equipoise.types import Request, Rollout, UserError

if TYPE_CHECKING:
    import torch

    from equipoise.models.candidates import CandidateReader
    from equipoise.models.loading import LanguageModel
    from equipoise.models.rows import Follower
    from equipoise.models.value_models import ValueModel


class Tilt:
    """beta per row: fixed, or solved once per weight vector for the budget."""

    def __init__(self, calibration: Calibration | None, form: str, beta: float | None, kl_budget: float | None) -> None:
        if (beta is None) == (kl_budget is None):
            raise UserError("give exactly one of beta and kl_budget")
        if beta is not None and not beta > 0:
            raise UserError(f"beta must be positive, got {beta:g}")
        if kl_budget is not None and not kl_budget > 0:
            raise UserError(f"kl_budget must be positive, got {kl_budget:g}")
        if kl_budget is not None and calibration is None:
            raise UserError(f"these values have no calibration for the form {form!r}: set kl_budget to null and give beta")
        self._calibration, self._beta, self._budget = calibration, beta, kl_budget
        self._solved: dict[tuple[float, ...], float] = {}

    def beta(self, weights_K: tuple[float, ...]) -> float:
        """Of a row with these weights."""
        if self._beta is not None:
            return self._beta
        assert self._budget is not None
        assert self._calibration is not None
        if weights_K not in self._solved:
            self._solved[weights_K] = self._calibration.beta_for(weights_K, self._budget)
        return self._solved[weights_K]

    @property
    def calibrated(self) -> bool:
        """Whether a KL budget can be kept."""
        return self._calibration is not None

    def beta_for(self, weights_K: tuple[float, ...], kl_budget: float) -> float:
        """The beta that spends so many nats per response, whatever the rows' own is. Raises `UserError` without a calibration."""
        if self._calibration is None:
            raise UserError("these values have no calibration, so no KL budget can be kept: give beta")
        return self._calibration.beta_for(weights_K, kl_budget)

    def __call__(self, weights_RK: torch.Tensor) -> torch.Tensor:
        """w / beta per row; 0 for rows without weights."""
        import torch

        rows = []
        for weights in weights_RK.tolist():
            known = all(w == w for w in weights)
            key = tuple(round(w, 9) for w in weights)
            rows.append([w / self.beta(key) for w in weights] if known else [0.0] * len(weights))
        return torch.tensor(rows, dtype=torch.float32, device=weights_RK.device)


class SinglePassGuide:
    """q from the policy's own state: a gather and two small products per step."""

    forwards_per_step = 0

    def __init__(self, lm: LanguageModel, heads: ValueHeads, *, beta: float | None = None, kl_budget: float | None = None) -> None:
        import torch

        self.objectives, self.layers, self._horizon = heads.objectives, heads.layers, heads.horizon
        self.tilt = Tilt(heads.calibration.get("single-pass"), "single-pass", beta, kl_budget)
        tensors = {name: torch.from_numpy(heads.tensors[name]).to(lm.device) for name in ("mean_I", "whiten_IM", "single_KXD")}
        self._mean_I, self._whiten_IM, self._single_KXD = tensors["mean_I"], tensors["whiten_IM"], tensors["single_KXD"]
        self._table_VD = lm.model.get_input_embeddings().weight

    def follow(self, start: Start) -> Sequence[Follower]:
        """No state per row but the policy's own."""
        return ()

    def shift(self, step: Step) -> torch.Tensor:
        """(1/beta) sum_k w_k q_k(s, a), [R, C]."""
        import torch

        states_RI = torch.cat([step.states[layer] for layer in self.layers], dim=-1)
        x_RX = state_features(states_RI, step.length_R, self._mean_I, self._whiten_IM, self._horizon)
        read_RD = torch.einsum("rk,rx,kxd->rd", self.tilt(step.weights_RK), x_RX, self._single_KXD)
        e_RCD = self._table_VD[step.candidates_RC].float()
        return torch.bmm(e_RCD, read_RD[:, :, None])[:, :, 0]

    def parts(self, step: Step) -> torch.Tensor:
        """(1/beta) w_k q_k(s, a), [R, C, K]: what each objective adds to `shift`."""
        import torch

        states_RI = torch.cat([step.states[layer] for layer in self.layers], dim=-1)
        x_RX = state_features(states_RI, step.length_R, self._mean_I, self._whiten_IM, self._horizon)
        read_RDK = torch.einsum("rk,rx,kxd->rdk", self.tilt(step.weights_RK), x_RX, self._single_KXD)
        return torch.bmm(self._table_VD[step.candidates_RC].float(), read_RDK)

    def advance(self, step: Step, choice_R: torch.Tensor) -> None:
        """The policy has to run the chosen token itself."""
        return None


class _PrefixValues:
    """(1/beta) sum_k w_k v_k of states after candidates."""

    def __init__(self, heads: ValueHeads, lm: LanguageModel) -> None:
        import torch

        self._horizon = heads.horizon
        self._weight_KPI = torch.from_numpy(heads.tensors["prefix_KPI"]).to(lm.device)
        self._mean_I = torch.from_numpy(heads.tensors["prefix_mean_I"]).to(lm.device)

    def __call__(self, h_RCI: torch.Tensor, tilt_RK: torch.Tensor, length_R: torch.Tensor) -> torch.Tensor:
        """[R, C], for responses that are `length_R` tokens long with their candidate."""
        import torch

        p_R11 = position_feature(length_R, self._horizon)[:, None, None]
        read_RI = torch.einsum("rk,rki->ri", tilt_RK, self._weight_KPI[:, 0] + p_R11 * self._weight_KPI[:, 1])
        return torch.bmm(h_RCI.float() - self._mean_I, read_RI[:, :, None])[:, :, 0]


class PrefixGuide:
    """v of the prefix with each candidate appended, all candidates of all rows in one forward of the policy."""

    def __init__(
        self, lm: LanguageModel, heads: ValueHeads, candidates: int, *, beta: float | None = None, kl_budget: float | None = None
    ) -> None:
        from equipoise.models.cache import attends_fully

        if not attends_fully(lm.model.config):
            raise UserError(f"not all layers of {lm.name!r} attend to the full past, as the form 'prefix' needs; use 'single-pass'")
        self.objectives, self.layers = heads.objectives, heads.layers
        self.tilt = Tilt(heads.calibration.get("prefix"), "prefix", beta, kl_budget)
        self._values = _PrefixValues(heads, lm)
        # The chosen candidate's forward is the policy's own, so only the others are extra.
        self.forwards_per_step = candidates - 1

    def follow(self, start: Start) -> Sequence[Follower]:
        """No state per row but the policy's own."""
        return ()

    def shift(self, step: Step) -> torch.Tensor:
        """(1/beta) sum_k w_k v_k(s + a), [R, C]."""
        import torch

        states = step.batch.branch(step.candidates_RC)
        h_RCI = torch.cat([states[layer] for layer in self.layers], dim=-1)
        return self._values(h_RCI, self.tilt(step.weights_RK), step.length_R + 1)

    def advance(self, step: Step, choice_R: torch.Tensor) -> dict[int, torch.Tensor]:
        """Keep the chosen candidates' keys; their states are already known."""
        step.batch.keep(choice_R)
        return step.batch.states


class ValueModelGuide:
    """v of the prefix with each candidate appended, from value models that read along.

    A model is run for the rows that weigh one of its objectives. Where the likeliest candidate has more than `skip_above` of the
    candidates' mass, a row is not tilted; a step at which that holds for all rows that a model reads costs it nothing.
    """

    layers: tuple[int, ...] = ()
    forwards_per_step = 0  # the policy runs none of the candidates; the models' tokens are in their readers' forwards_R

    def __init__(
        self,
        lm: LanguageModel,
        models: Sequence[ValueModel],
        *,
        beta: float | None = None,
        kl_budget: float | None = None,
        objectives: Sequence[str] = (),
        skip_above: float = 1.0,
    ) -> None:
        """`objectives` are the weights', where some have no value model; those of the models, one after the other, otherwise.

        Raises `UserError` for another tokenizer, a backbone with a limited view, an objective of two models, and a KL budget
        for several models or one without calibration.
        """
        from equipoise.models.cache import attends_fully
        from equipoise.models.companions import same_tokens

        known = [name for model in models for name in model.objectives]
        self.objectives, self.skip_above = tuple(objectives or known), skip_above
        lost = [name for name in known if name not in self.objectives]
        if not models or len(set(known)) < len(known) or lost:
            raise UserError(f"each objective of {', '.join(self.objectives)} may have one value model, got models of {', '.join(known)}")
        if not 0 < skip_above <= 1:
            raise UserError(f"skip_above is a share of the candidates' mass, above 0 and at most 1, got {skip_above:g}")
        for model in models:
            same_tokens(lm, model.lm)
            if not attends_fully(model.lm.model.config):
                raise UserError(f"not all layers of {model.lm.name!r} attend to the full past, as candidates in one forward need")
        if kl_budget is not None and len(models) > 1:
            raise UserError(
                f"{len(models)} value models share no calibration: set kl_budget to null and give beta, or distil them into one"
            )
        self.tilt = Tilt(models[0].heads.calibration.get("prefix"), "prefix", beta, kl_budget)
        self._models = [(model, _PrefixValues(model.heads, model.lm)) for model in models]
        self._columns = [self.objectives.index(name) for name in known]
        self._known = known_tokens(lm.tokenizer)

    @property
    def of_prefixes(self) -> bool:
        """Whether shifts are values of prefixes, comparable between rows: not where some are left out."""
        return self.skip_above == 1.0

    def valued(self, weights_K: Sequence[float]) -> tuple[float, ...]:
        """The weights of the objectives that have a value model, in the order of the models."""
        return tuple(weights_K[column] for column in self._columns)

    def follow(self, start: Start) -> Sequence[CandidateReader]:
        """A reader per model, for the rows that weigh one of its objectives; raises `UserError` for a row that weighs none of them."""
        from equipoise.models.candidates import CandidateReader

        weights_RK = start.weights_RK[:, self._columns]
        for request, own in zip(start.requests, weights_RK.tolist(), strict=True):
            if request.weights is not None and not any(own):
                named = [name for name, w in zip(self.objectives, request.weights, strict=True) if w]
                raise UserError(f"request {request.id!r} weighs only {', '.join(named) or 'nothing'}, which no value model is loaded for")
        readers, at = [], 0
        for model, _ in self._models:
            own_RK = weights_RK[:, at : at + len(model.objectives)]
            at += len(model.objectives)
            readers.append(CandidateReader(model.lm, start, (own_RK.nan_to_num() != 0).any(dim=1)))
        return readers

    def shift(self, step: Step) -> torch.Tensor:
        """(1/beta) sum_k w_k v_k(s + a), [R, C]; 0 where the row is sure."""
        import torch

        tilt_RK = self.tilt(step.weights_RK[:, self._columns])
        sure_R = step.ref_logprobs_RC[:, 0].exp() > self.skip_above
        shift_RC, at = torch.zeros_like(step.ref_logprobs_RC), 0
        for (model, values), reader in zip(self._models, _readers(step), strict=True):
            columns = slice(at, at := at + len(model.objectives))
            rows = reader.rows
            if len(rows) and not sure_R[rows].all():
                states = reader.read(step.candidates_RC.clamp(max=self._known - 1))  # rows of padding are never drawn
                there = states.device
                found = values(states, tilt_RK[rows, columns].to(there), (step.length_R[rows] + 1).to(there))
                shift_RC[rows] += found.to(shift_RC.device)
        return shift_RC.masked_fill(sure_R[:, None], 0.0)

    def advance(self, step: Step, choice_R: torch.Tensor) -> None:
        """Tell the models what was drawn; the policy runs it itself."""
        tokens_R = step.candidates_RC.gather(1, choice_R[:, None])[:, 0]
        for reader in _readers(step):
            reader.advance(tokens_R, choice_R)


def _readers(step: Step) -> list[CandidateReader]:
    return cast("list[CandidateReader]", step.batch.followers)


def make_guide(
    lm: LanguageModel, heads: ValueHeads, form: str, candidates: int, *, beta: float | None = None, kl_budget: float | None = None
) -> Guide:
    """The guide of one value form. Raises `UserError` for values of another model or an unknown form."""
    if heads.model != lm.name:
        raise UserError(f"these values were trained on {heads.model!r}, not on {lm.name!r}")
    if form not in FORMS:
        raise UserError(f"unknown value form {form!r}; known: {', '.join(FORMS)}")
    if form == "single-pass":
        return SinglePassGuide(lm, heads, beta=beta, kl_budget=kl_budget)
    return PrefixGuide(lm, heads, candidates, beta=beta, kl_budget=kl_budget)


class PolicySampler:
    """A Sampler: the policy, guided where a guide is given."""

    def __init__(
        self, lm: LanguageModel, config: Sampling, guide: Guide | None = None, progress: Callable[[int], None] | None = None
    ) -> None:
        self.lm, self.config, self.guide, self.progress = lm, config, guide, progress
        self.objectives = guide.objectives if guide else ()

    def __call__(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in order."""
        return generate(self.lm, requests, self.config, self.guide, progress=self.progress)
