"""The stage `judge`: two runs of `sample`, pair by pair, before a chat model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.models.engines import Calls
from equipoise.progress import bar, say
from equipoise.runs import EXECUTION, stage, write_atomic, write_json
from equipoise.stages import common
from equipoise.types import UserError

if TYPE_CHECKING:
    from equipoise.evaluation.pairwise import Match
    from equipoise.rewards.judge import Verdicts


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Let a chat model compare the responses of two runs to the same prompts, in both orders."""

    out: Path
    """Folder to write: judged.parquet with every verdict, summary.json with the win rates of the first run."""
    first: Path
    """A `sample` folder."""
    second: Path
    """Another one, on the same prompts."""
    judge: str
    """MODEL@URL of an OpenAI-compatible server, MODEL of OpenAI, or local:NAME."""
    objectives: tuple[str, ...] = ("helpful", "harmless")
    """Rubrics by name (`rewards/judge.py` lists them)."""
    pairs: int = 0
    """Most pairs per prompt; 0 for all."""
    n_boot: int = 2000
    """Bootstrap resamples of the prompts."""
    seed: int = 0
    """Of the bootstrap."""
    calls: Calls = field(default_factory=Calls)
    """How the judge is asked."""
    cache: Path | None = field(default=None, metadata=EXECUTION)
    """Folder where replies are kept; empty for $EQUIPOISE_CACHE. A killed run continues from it."""

    def __post_init__(self) -> None:
        if not self.objectives:
            raise UserError("objectives is empty: name at least one rubric, such as [helpful]")
        if self.pairs < 0:
            raise UserError(f"pairs must be at least 0, got {self.pairs}")


def judge(config: Judge) -> Path:
    """Judge all pairs and return the summary's path."""
    from equipoise.evaluation.pairwise import matches
    from equipoise.models.engines import load_engine
    from equipoise.models.loading import cache_folder
    from equipoise.rewards.cache import Store
    from equipoise.rewards.judge import Asker, check_objective, judge_pairs
    from equipoise.rollouts import read_rollouts

    for objective in config.objectives:
        check_objective(objective)
    prompts, others = ({p.id: p for p in common.prompts_of_run(run, "sample")} for run in (config.first, config.second))
    rollouts = [read_rollouts(run / "rollouts") for run in (config.first, config.second)]
    pairs = matches(prompts, others, rollouts[0], rollouts[1], config.pairs)
    parents = {"first": config.first / "manifest.json", "second": config.second / "manifest.json"}
    summary = config.out / "summary.json"
    with stage(config.out, "judge", common.settings_of(config), parents) as run:
        if run.done:
            return summary
        asker = Asker(load_engine(config.judge, config.calls), Store(config.cache or cache_folder()))
        asked = [m.prompt for m in pairs], [m.first.text for m in pairs], [m.second.text for m in pairs]
        title = f"judging {len(pairs)} pairs in both orders on {', '.join(config.objectives)}"
        with bar(title, 2 * len(pairs) * len(config.objectives)) as advance:
            found = {objective: judge_pairs(asker, objective, *asked, advance) for objective in config.objectives}
        _write_rows(config.out / "judged.parquet", pairs, found)
        write_json(
            summary, {"judge": config.judge, "first": config.first, "second": config.second, "objectives": _figures(config, pairs, found)}
        )
        run.outputs += [config.out / "judged.parquet", summary]
        run.facts |= {"questions": 2 * len(pairs) * len(found), "cached": asker.n_cached}
        run.facts |= {"failed": asker.n_failed, "unparsed": asker.n_unparsed}
    return summary


def _figures(config: Judge, pairs: list[Match], found: dict[str, Verdicts]) -> dict[str, Any]:
    said = {name: figures(pairs, verdicts, config.n_boot, config.seed) for name, verdicts in found.items()}
    for name, row in said.items():
        interval = f" [{row['lo']:.2f}, {row['hi']:.2f}]" if row["lo"] == row["lo"] else ""
        rate = f"{row['win_rate']:.2f}{interval}" if row["n_judged"] else "–"
        judged = f"{row['n_judged']} of {row['n_pairs']} pairs judged"
        lost = f"{row['n_unparsed']} replies unreadable, {row['n_failed']} missing"
        say(f"{name}: {config.first} wins {rate} against {config.second}; {judged}, {lost}")
    return said


def figures(pairs: Sequence[Match], verdicts: Verdicts, n_boot: int, seed: int) -> dict[str, Any]:
    """`pairwise.summarise` of one objective's verdicts, with the counts of replies that never came or can't be read."""
    import numpy as np

    from equipoise.evaluation.pairwise import summarise

    words = np.array(_words(pairs), dtype=np.float64)
    row = summarise(verdicts.forward_N, verdicts.backward_N, [m.prompt.id for m in pairs], words[:, 0], words[:, 1], n_boot, seed)
    failed = sum(reply.text is None for both in verdicts.replies for reply in both)
    unparsed = int(np.isnan(np.concatenate([verdicts.forward_N, verdicts.backward_N])).sum()) - failed
    return {**row, "n_failed": failed, "n_unparsed": unparsed}


def _words(pairs: Sequence[Match]) -> list[tuple[int, int]]:
    from equipoise.rewards.text import word_count

    return [(word_count(m.first.text), word_count(m.second.text)) for m in pairs]


def _write_rows(path: Path, pairs: list[Match], found: dict[str, Verdicts]) -> None:
    """One row per objective and pair, with the replies as they came."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = _words(pairs)
    tables = [
        pa.table(
            {
                "objective": [objective] * len(pairs),
                "prompt_id": [m.prompt.id for m in pairs],
                "first_id": [m.first.id for m in pairs],
                "second_id": [m.second.id for m in pairs],
                "forward": v.forward_N,
                "backward": v.backward_N,
                "first_words": [first for first, _ in words],
                "second_words": [second for _, second in words],
                # Typed by hand: a column without a single reply would have no type of its own.
                "forward_reply": pa.array([one.text for one, _ in v.replies], pa.string()),
                "backward_reply": pa.array([two.text for _, two in v.replies], pa.string()),
                "forward_error": [one.error for one, _ in v.replies],
                "backward_error": [two.error for _, two in v.replies],
            }
        )
        for objective, v in found.items()
    ]
    write_atomic(path, lambda scratch: pq.write_table(pa.concat_tables(tables), scratch, compression="zstd"))
