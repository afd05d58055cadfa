"""What the tests of decoding share: ragged prompts, plain forwards, and a guide that knows what its rows hold."""

from __future__ import annotations

import numpy as np
import torch

from conftest import prompt
from equipoise.models.chat import prompt_ids

PROMPTS = (prompt("long", "d a b c . a"), prompt("short", "c"), prompt("middle", "a b d"))
EOS = 2
OBJECTIVES = ("x", "y")
Prefix = tuple[int, ...]
Weights = tuple[float, ...] | None


def plain_forward(lm, ids_BT) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """(logits_BV, layer -> state_BD) after equally long sequences, uncached and unpadded."""
    with torch.no_grad():
        out = lm.model(input_ids=torch.tensor(ids_BT), use_cache=False, output_hidden_states=True)
    return out.logits[:, -1].double().numpy(), {i: h[:, -1].double().numpy() for i, h in enumerate(out.hidden_states)}


class KnowsItsRows:
    """A guide that knows which prompt and prefix each row of a step holds, and checks the loop's states against plain ones."""

    objectives = OBJECTIVES
    layers: tuple[int, ...] = ()
    forwards_per_step = 0

    def __init__(self, lm):
        self.lm = lm
        self.heads = [prompt_ids(lm.tokenizer, p) for p in PROMPTS]
        self.roots = np.concatenate([plain_forward(lm, [ids])[1][lm.num_layers] for ids in self.heads])
        self.rows: list[tuple[int, Prefix]] = []

    def rows_of(self, step) -> list[tuple[int, Prefix]]:
        if step.position == 0:
            states = step.states[self.lm.num_layers].double().numpy()
            near = np.abs(states[:, None] - self.roots[None]).max(axis=2) < 1e-4
            assert (near.sum(axis=1) == 1).all()
            self.rows = [(int(which), ()) for which in near.argmax(axis=1)]
        assert len(self.rows) == len(step.candidates_RC)
        return self.rows

    def note(self, step, choice_R) -> None:
        tokens = step.candidates_RC.gather(1, choice_R[:, None])[:, 0].tolist()
        self.rows = [(p, (*prefix, t)) for (p, prefix), t in zip(self.rows, tokens, strict=True) if t not in self.lm.eos_ids]

    def advance(self, step, choice_R):
        self.note(step, choice_R)
