"""Value heads as an artefact: what `training/value.py` fits and `decoding/value_guided.py` reads.

single-pass   q_k(s, a) = e_a . sum_i x_i(s) A_k[i]      x(s) = [1, whitened states of s, p, p^2],  e_a: the policy's token embedding
prefix        v_k(s + a) = (h(s + a) - mean) . (B_k0 + p B_k1)

p = 2 t / horizon - 1 in [-1, 1] is the position. Values are in standard deviations of the reference's reward, and only
their differences between candidates of one step matter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Real

from equipoise.objectives import Normaliser
from equipoise.runs import write_atomic
from equipoise.types import UserError

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # importing torch here would slow every --help down; under jaxtyping's hook the axes are checked, not the class

FORMS = ("single-pass", "prefix")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Tilts at states of the reference, from which a beta for a KL budget is solved without sampling."""

    logprobs_SC: Float[np.ndarray, "S C"]
    """log pi_ref restricted to the candidates."""
    q_SCK: Float[np.ndarray, "S C K"]
    steps: float
    """Mean number of steps of a response."""

    def kl(self, weights_K: Sequence[float], beta: float) -> float:
        """E_s[KL(pi_beta(.|s) || pi_ref(.|s))] * steps, nats per response, over states that the reference visits."""
        base = self.logprobs_SC
        tilted = base + self.q_SCK @ np.asarray(weights_K) / beta
        top = tilted.max(axis=1, keepdims=True)
        tilted = tilted - top - np.log(np.exp(tilted - top).sum(axis=1, keepdims=True))
        prob = np.exp(tilted)
        return float(np.where(prob > 0, prob * (tilted - base), 0.0).sum(axis=1).mean() * self.steps)

    def beta_for(self, weights_K: Sequence[float], budget: float) -> float:
        """The beta whose predicted KL is `budget` nats, by bisection on log beta (KL falls in beta).

        Raises `UserError` for a budget that isn't positive or that no beta reaches with these heads.
        """
        if not budget > 0:
            raise UserError(f"kl_budget must be positive, got {budget:g}")
        low, high = -14.0, 14.0
        if self.kl(weights_K, float(np.exp(low))) < budget:
            raise UserError(f"kl_budget={budget:g} nats is more than these values can spend with the weights {tuple(weights_K)}")
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.kl(weights_K, float(np.exp(middle))) > budget else (low, middle)
        return float(np.exp((low + high) / 2))


@dataclass(frozen=True, kw_only=True)
class ValueHeads:
    """Both value forms of K objectives on one policy."""

    normaliser: Normaliser
    model: str
    layers: tuple[int, ...]
    horizon: int
    tensors: dict[str, np.ndarray]
    """mean_I, whiten_IM (states to features); single_KXD; prefix_KPI, prefix_mean_I."""
    calibration: dict[str, Calibration]
    """By form."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the K objectives, in the order of the weights."""
        return self.normaliser.objectives

    def save(self, path: Path) -> None:
        """One safetensors file, written whole or not at all."""
        from safetensors.numpy import save_file

        tensors = {name: np.ascontiguousarray(t, dtype=np.float32) for name, t in self.tensors.items()}
        for form, table in self.calibration.items():
            tensors[f"calibration.{form}.logprobs_SC"] = table.logprobs_SC.astype(np.float32)
            tensors[f"calibration.{form}.q_SCK"] = table.q_SCK.astype(np.float32)
        header: dict[str, Any] = {
            "normaliser": asdict(self.normaliser),
            "model": self.model,
            "layers": self.layers,
            "horizon": self.horizon,
            "steps": {form: table.steps for form, table in self.calibration.items()},
        }
        write_atomic(path, lambda scratch: save_file(tensors, scratch, metadata={"equipoise": json.dumps(header)}))

    @classmethod
    def load(cls, path: Path) -> ValueHeads:
        """Read `save`'s file. Raises `UserError` where it is missing, damaged or something else."""
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            raise UserError(f"no value heads at {path}; run `equipoise train value` first")
        try:
            with safe_open(path, "np") as file:
                header = json.loads((file.metadata() or {})["equipoise"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            normaliser = Normaliser(**{k: tuple(v) for k, v in header["normaliser"].items()})
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is damaged or holds no value heads ({error}); run `equipoise train value` again") from None
        calibration = {
            form: Calibration(
                logprobs_SC=tensors.pop(f"calibration.{form}.logprobs_SC").astype(np.float64),
                q_SCK=tensors.pop(f"calibration.{form}.q_SCK").astype(np.float64),
                steps=steps,
            )
            for form, steps in header["steps"].items()
        }
        return cls(
            normaliser=normaliser,
            model=header["model"],
            layers=tuple(header["layers"]),
            horizon=header["horizon"],
            tensors=tensors,
            calibration=calibration,
        )


def position_feature(position: Real[Tensor, " S"], horizon: int) -> Float[Tensor, " S"]:
    """p = 2 t / horizon - 1, at most 1."""
    return (2.0 * position.float() / horizon - 1.0).clamp(max=1.0)


def state_features(
    states_SI: Float[Tensor, "S I"],
    position_S: Real[Tensor, " S"],
    mean_I: Float[Tensor, " I"],
    whiten_IM: Float[Tensor, "I M"],
    horizon: int,
) -> Float[Tensor, "S M+3"]:
    """x(s) = [1, (h - mean) whiten, p, p^2], [S, M + 3]."""
    import torch

    p_S1 = position_feature(position_S, horizon)[:, None]
    return torch.cat([torch.ones_like(p_S1), (states_SI.float() - mean_I) @ whiten_IM, p_S1, p_S1**2], dim=1)
