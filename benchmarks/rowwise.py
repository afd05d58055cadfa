"""A stand-in for the cost of MAVIS's own decoder in its default setting, made of plain transformers calls.

One prompt at a time, one value model per objective, k candidates a step:

    policy        key-value cache of transformers; its prompt is run for every response, the logits of the last token only
    value model   a row per candidate. The first step runs k copies of prompt + candidate. Each later step runs two tokens in
                  every row, the one that was drawn last and the row's candidate, on a cache of k equal rows (the drawn token is
                  so computed k times over), reads the last state, and cuts the candidate off the cache again
    law           softmax over the k of logits + (1/beta) sum_k w_k v_k

Value models run one after the other. What the original does beyond that is left out, in its favour: adapters that are not merged
into the value models, the way of their scores to the processor and back, the reward models' moves, and the KL's second softmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from equipoise.models.loading import LanguageModel
from equipoise.models.value_models import ValueModel


class _Rows:
    """One value model's scores of a step's candidates, a row each."""

    def __init__(self, model: ValueModel) -> None:
        self._backbone = model.lm.backbone
        self._weight_D = torch.from_numpy(model.heads.tensors["prefix_KPI"][0, 0]).to(model.lm.device)
        self._cache = DynamicCache(config=model.lm.model.config)
        self.forwards = 0

    def values(self, new: Sequence[int], ids_C: torch.Tensor) -> torch.Tensor:
        """Values [C] of the candidates, after what is new since the last step."""
        rows = torch.cat([ids_C.new_tensor(new).expand(len(ids_C), -1), ids_C[:, None]], dim=1)
        states = self._backbone(input_ids=rows, past_key_values=self._cache, use_cache=True).last_hidden_state
        self._cache.crop(-1)
        self.forwards += rows.numel()
        return states[:, -1].float() @ self._weight_D


def decode_rowwise(
    lm: LanguageModel,
    models: Sequence[ValueModel],
    prompt: Sequence[int],
    weights: Sequence[float],
    *,
    tokens: int,
    top_k: int,
    beta: float,
    greedy: bool = False,
) -> tuple[list[int], int, int]:
    """(a response of `tokens` tokens, tokens that the policy ran, tokens that the value models ran)."""
    cache, readers = DynamicCache(config=lm.model.config), [_Rows(model) for model in models]
    said: list[int] = []
    new = list(prompt)
    with torch.inference_mode():
        while True:
            ids = torch.tensor([new], device=lm.device)
            logits_V = lm.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float()
            top_C, ids_C = logits_V.topk(top_k)
            for weight, reader in zip(weights, readers, strict=True):
                top_C = top_C + weight / beta * reader.values(new, ids_C)
            law_C = top_C.softmax(dim=-1)
            choice = law_C.argmax() if greedy else torch.multinomial(law_C, 1)[0]
            said.append(int(ids_C[choice]))
            new = said[-1:]
            if len(said) == tokens:
                return said, len(prompt) + tokens - 1, sum(reader.forwards for reader in readers)
