"""Preference pairs from files of the field's formats; one function per source."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from pathlib import Path

from equipoise.types import Message, Pair, Prompt, UserError

_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def parse_hh_dialogue(text: str) -> tuple[tuple[Message, ...], str]:
    """Split an HH-RLHF dialogue into the messages before its last assistant turn, and that turn's text.

    Turns of one speaker that follow each other, as a few rows have them, stay apart. Raises `UserError` where the first
    turn isn't the human's or the last one isn't the assistant's.
    """
    parts = _TURN.split(text)
    roles, contents = parts[1::2], [c.strip() for c in parts[2::2]]
    if not roles or roles[0] != "Human" or roles[-1] != "Assistant":
        raise UserError(f"not an HH-RLHF dialogue: starts {text[:60]!r}")
    names = {"Human": "user", "Assistant": "assistant"}
    messages = tuple(Message(role=names[r], content=c) for r, c in zip(roles[:-1], contents[:-1], strict=True))
    return messages, contents[-1]


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSON-lines file, gzipped or not. Raises `UserError` naming the line that does not parse."""
    opener = gzip.open if path.suffix == ".gz" else open
    rows, number = [], 0
    try:
        with opener(path, "rt", encoding="utf-8") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    rows.append(json.loads(line))
                    if not isinstance(rows[-1], dict):
                        raise UserError(f"{path}: line {number} is not a JSON object")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {number} is not JSON ({error})") from None
    except (EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path} is damaged or truncated after line {number} ({error}); fetch it again") from None
    return rows


def hh_rlhf(path: Path, objective: str) -> list[Pair]:
    """Pairs of an HH-RLHF file (`chosen`, `rejected`: whole dialogues that share a prefix).

    Rows that are no such dialogues, whose last turn is empty, equal in both, or whose prefixes differ are left out. The
    prompt's id is the row number of the first row with the same conversation, so equal prompts share an id and a split by
    prompt is clean.
    """
    pairs: list[Pair] = []
    first_seen: dict[str, str] = {}
    for index, row in enumerate(read_jsonl(path)):
        try:
            messages, chosen = parse_hh_dialogue(row["chosen"])
            other, rejected = parse_hh_dialogue(row["rejected"])
        except KeyError as missing:
            raise UserError(f"{path}: row {index + 1} has no column {missing}; HH-RLHF files have chosen and rejected") from None
        except (UserError, TypeError):
            continue
        if messages != other or not chosen or not rejected or chosen == rejected:
            continue
        key = json.dumps(messages)
        prompt_id = first_seen.setdefault(key, f"{objective}-{index:05d}")
        prompt = Prompt(id=prompt_id, messages=messages)
        pairs.append(Pair(id=f"{objective}-{index:05d}", prompt=prompt, chosen=chosen, rejected=rejected, objective=objective))
    return pairs


def moderation(path: Path, objective: str) -> list[Pair]:
    """Pairs of a harmless and a harmful text from the OpenAI moderation set (columns `prompt` and one flag per harm).

    Each flagged text is paired with the unflagged one whose length is nearest among those not yet used, so that a reward
    can't tell them apart by length; unflagged texts are used again once they run out. There is no prompt: the texts are
    judged as they stand.
    """
    rows = read_jsonl(path)
    for index, row in enumerate(rows):
        if not isinstance(row.get("prompt"), str):
            raise UserError(f"{path}: row {index + 1} has no text `prompt`; the moderation set has prompt and one flag per harm")
    flags = [[v for k, v in row.items() if k != "prompt" and v is not None] for row in rows]
    harmful = [row["prompt"] for row, flag in zip(rows, flags, strict=True) if any(flag)]
    clean = [row["prompt"] for row, flag in zip(rows, flags, strict=True) if flag and not any(flag)]
    if not harmful or not clean:
        raise UserError(f"{path} has {len(harmful)} flagged and {len(clean)} unflagged texts; both kinds are needed")
    free: list[str] = []
    pairs = []
    for index, text in enumerate(harmful):
        free = free or list(clean)
        partner = min(free, key=lambda other: abs(len(other) - len(text)))
        free.remove(partner)
        prompt = Prompt(id=f"{objective}-{index:05d}", messages=(Message(role="user", content="."),))
        pairs.append(Pair(id=f"{objective}-{index:05d}", prompt=prompt, chosen=partner, rejected=text, objective=objective))
    return pairs


PAIRS = {"hh": hh_rlhf, "moderation": moderation}
