"""Soups: one adapter, or one model, that is the weighted sum of several which were tuned from the same start.

    dW(w) = sum_k w_k s_k B_k A_k  =  [w_1 s_1 B_1 .. w_K s_K B_K] [A_1; ..; A_K]          (rule exact, rank sum_k r_k)
    theta(w) = sum_k w_k theta_k                                                           (whole models, in float32)

A_k [r_k, in], B_k [out, r_k] and s_k = alpha_k / r_k are the factors of adapter k, whose rank, alpha and layers are its own;
here s_k is already in B_k (`models/adapters.py`). The update is linear in w, and w = e_k gives adapter k back. `rank` cuts the
sum to its best approximation of that rank, by the SVD of the small matrix R_B R_A' of B = Q_B R_B, A' = Q_A R_A, so that
the [out, in] matrix is never formed. `error` is ||cut - exact|| / ||exact|| over all layers (Frobenius).

Papers: Rewarded Soups (Rame et al. 2023, arXiv 2306.04488), Personalized Soups (Jang et al. 2023, 2310.11564). Departures:
their code, and that of later papers, averages the factors, (sum w B)(sum w A), which has cross terms w_j w_k B_j A_k; that is
the rule `factors`, for comparison, with its `error` stated. Weights need not be on the simplex.
Reads: adapter or model folders. Writes: one such folder per weight vector, each with a card. The weights enter: the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from equipoise.types import UserError

if TYPE_CHECKING:
    from equipoise.models.adapters import Layers

Factors = tuple[Float[np.ndarray, "_ _"], Float[np.ndarray, "_ _"]]
"""(A [r, in], B [out, r]) of a layer; every layer has its own sizes."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How adapters become one."""

    rule: Literal["exact", "factors"] = "exact"
    """exact sums the updates; factors averages A and B apart, as the papers' code does, which is another model."""
    rank: int = 0
    """Cut the exact sum to this rank, where it has more; 0 keeps it whole."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError(f"rank must be at least 0, got {self.rank}")
        if self.rule == "factors" and self.rank:
            raise UserError("the rule factors keeps the rank of its parts: leave rank at 0")


@dataclass(frozen=True, kw_only=True)
class Soup:
    """One adapter, and how far it is from the exact sum."""

    layers: dict[str, Factors]
    norm: float
    """||dW|| of the exact sum, over all layers."""
    error: float
    """||dW - exact|| / ||exact||; 0 where nothing was cut or averaged."""


def exact(
    parts: Sequence[tuple[Float[np.ndarray, "_ I"], Float[np.ndarray, "O _"]]], weights_K: Sequence[float]
) -> tuple[Float[np.ndarray, "R I"], Float[np.ndarray, "O R"]]:
    """(A, B) of sum_k w_k B_k A_k: the parts beside each other, the weights in B."""
    down = np.concatenate([down for down, _ in parts])
    return down, np.concatenate([w * up for w, (_, up) in zip(weights_K, parts, strict=True)], axis=1)


def average(
    parts: Sequence[tuple[Float[np.ndarray, "_ I"], Float[np.ndarray, "O _"]]], weights_K: Sequence[float]
) -> tuple[Float[np.ndarray, "r I"], Float[np.ndarray, "O r"]]:
    """(sum_k w_k A_k, sum_k w_k B_k), whose product is not the sum of the products. Raises `UserError` for parts of several ranks."""
    ranks = [len(down) for down, _ in parts]
    if len(set(ranks)) > 1:
        raise UserError(f"factors of ranks {', '.join(map(str, ranks))} have no average: use the rule exact")
    down = sum(w * down for w, (down, _) in zip(weights_K, parts, strict=True))
    return np.asarray(down), np.asarray(sum(w * up for w, (_, up) in zip(weights_K, parts, strict=True)))


def squared_norm(down: Float[np.ndarray, "r I"], up: Float[np.ndarray, "O r"]) -> float:
    """||B A||^2 = tr(B'B AA')."""
    return max(float(np.sum((up.T @ up) * (down @ down.T))), 0.0)


def truncate(
    down: Float[np.ndarray, "R I"], up: Float[np.ndarray, "O R"], rank: int
) -> tuple[Float[np.ndarray, "r I"], Float[np.ndarray, "O r"], float]:
    """(A, B, lost) of the nearest update of at most `rank`; lost is the squared norm of what was cut."""
    q_up, r_up = np.linalg.qr(up)
    q_down, r_down = np.linalg.qr(down.T)
    left, size, right = np.linalg.svd(r_up @ r_down.T, full_matrices=False)
    half = np.sqrt(size[:rank])
    return half[:, None] * (right[:rank] @ q_down.T), (q_up @ left[:, :rank]) * half, float(np.sum(size[rank:] ** 2))


def solve(adapters: Sequence[Mapping[str, Factors]], weights_K: Sequence[float], config: Config) -> Soup:
    """The soup of adapters, layer -> (A, B with its scale), computed in float64; parts of weight 0 take no room.

    Raises `UserError` where all weights are 0 (that is the base), or for `factors` of other ranks or layers.
    """
    used = [(adapter, w) for adapter, w in zip(adapters, weights_K, strict=True) if w != 0]
    if not used:
        raise UserError("all weights are 0: that is the model without an adapter")
    names = {name for adapter, _ in used for name in adapter}
    odd = sorted(name for adapter, _ in used for name in names - set(adapter))
    if config.rule == "factors" and odd:
        raise UserError(f"an adapter has no layer {odd[0]!r}, which others have, so that there is nothing to average: use the rule exact")
    layers, total, lost = {}, 0.0, 0.0
    for name in sorted(names):
        here = [(adapter[name], w) for adapter, w in used if name in adapter]
        parts = [(down.astype(np.float64), up.astype(np.float64)) for (down, up), _ in here]
        weights = [w for _, w in here]
        down, up = whole = exact(parts, weights)
        total += squared_norm(*whole)
        if config.rule == "factors":
            down, up = average(parts, weights)
            lost += squared_norm(*exact([whole, (down, up)], (1.0, -1.0)))
        elif 0 < config.rank < len(down):
            down, up, cut = truncate(down, up, config.rank)
            lost += cut
        layers[name] = (down.astype(np.float32), up.astype(np.float32))
    return Soup(layers=layers, norm=math.sqrt(total), error=math.sqrt(lost / total) if total else 0.0)


def solve_tensors(adapters: Sequence[Layers], weights_K: Sequence[float], config: Config) -> tuple[Layers, Soup]:
    """`solve` of factors as tensors, and its layers as tensors."""
    import torch

    found = solve([{n: (d.numpy(), u.numpy()) for n, (d, u) in layers.items()} for layers in adapters], weights_K, config)
    return {name: (torch.from_numpy(down), torch.from_numpy(up)) for name, (down, up) in found.layers.items()}, found


def extrapolated(weights_K: Sequence[float]) -> bool:
    """Whether the weights are no point of the simplex, so that the soup lies outside of what its parts span."""
    return min(weights_K) < 0 or abs(sum(weights_K) - 1) > 1e-6


def soup_adapters(folders: Sequence[Path], weights_K: Sequence[float], config: Config, out: Path) -> dict[str, Any]:
    """Write the soup of adapter folders as one PEFT folder, and return what its card says of how it was made.

    Raises `UserError` where a folder is no plain LoRA adapter, or they say that they were trained on different models.
    """
    from equipoise.models.adapters import common_base, read_adapter, write_adapter

    adapters = [read_adapter(folder) for folder in folders]
    base = common_base(adapters)
    layers, found = solve_tensors([a.layers for a in adapters], weights_K, config)
    rank = write_adapter(out, layers, base=base, task=adapters[0].task, transposed=adapters[0].transposed)
    checked = all(a.base.key for a in adapters) or all(a.base.name for a in adapters)
    return {"rule": config.rule, "rank": rank, "norm": found.norm, "error": found.error, "base": base, "base_checked": checked}


def soup_models(
    folders: Sequence[Path], weights_K: Sequence[float], dtype: str, out: Path, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Write sum_k w_k theta_k of plain model folders as a model folder, and return what its card says of how it was made.

    Summed in float32, a tensor at a time; files that an earlier run finished are kept. Raises `UserError` for models whose
    tensors, configs or tokenizers differ, and for weights that don't sum to 1, which would scale the common start too.
    """
    from equipoise.models.checkpoints import combine

    if abs(sum(weights_K) - 1) > 1e-6:
        raise UserError(f"the weights of whole models sum to 1, got {sum(weights_K):g}; only adapters have a base to go beyond")
    combine(folders, weights_K, dtype, out, progress)
    return {"rule": "weights", "dtype": dtype}
