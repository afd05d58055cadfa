"""Win rates of a comparison's methods: a chat model sets each one's ends beside the reference's response, in both orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.models.engines import Calls
from equipoise.progress import bar
from equipoise.runs import EXECUTION
from equipoise.stages.ways import named
from equipoise.types import Prompt, UserError

if TYPE_CHECKING:
    from equipoise.models.loading import LanguageModel

MIXED = "mixed"
Weights = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class WinRates:
    """A chat model as judge of a comparison's methods."""

    engine: str = ""
    """MODEL@URL of an OpenAI-compatible server, MODEL of OpenAI, or local:NAME; empty for no judge."""
    rubrics: tuple[str, ...] = ()
    """objective=RUBRIC (`rewards/judge.py` lists them); an objective that isn't named has the rubric of its own name, or none."""
    mixed: str = "overall"
    """Rubric for each method's point nearest to equal weights; empty for none."""
    pairs: int = 1
    """Most pairs per prompt: the i-th response of a method beside the i-th of the reference."""
    calls: Calls = field(default_factory=Calls)
    """How the judge is asked."""
    cache: Path | None = field(default=None, metadata=EXECUTION)
    """Folder where replies are kept; empty for $EQUIPOISE_CACHE. A killed run continues from it."""

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise UserError(f"judge.pairs must be at least 1, got {self.pairs}")


def rubrics_of(config: WinRates, objectives: Sequence[str]) -> dict[str, str]:
    """The rubric of each objective that has one, and of the mixed verdict; nothing without a judge.

    Raises `UserError` for an unknown objective or rubric.
    """
    from equipoise.rewards.judge import RUBRICS, check_objective

    if not config.engine:
        return {}
    said = named("judge.rubrics", config.rubrics)
    for objective in said:
        if objective not in objectives:
            raise UserError(f"judge.rubrics names {objective}; the rewards are {', '.join(objectives)}")
    found = {k: said.get(k, k) for k in objectives if k in said or k in RUBRICS} | ({MIXED: config.mixed} if config.mixed else {})
    if not found:
        raise UserError(f"none of {', '.join(objectives)} has a rubric: name them in judge.rubrics, as [{objectives[0]}=helpful]")
    for rubric in found.values():
        check_objective(rubric)
    return found


def judged_points(points: Sequence[Weights], objectives: Sequence[str]) -> dict[str, Weights]:
    """By objective, the point with all weight on it; as `MIXED`, the one nearest to equal weights, if it isn't one of these."""
    found = {k: w for w in points for k, share in zip(objectives, w, strict=True) if share == 1.0}
    inner = [w for w in points if max(w) < 1.0]
    if inner:
        found[MIXED] = min(inner, key=lambda w: sum((share - 1 / len(w)) ** 2 for share in w))
    return found


def win_rates(
    config: WinRates,
    folder: Path,
    objectives: Sequence[str],
    plan: Mapping[str, Sequence[Weights]],
    prompts: Sequence[Prompt],
    n_boot: int,
    seed: int,
    lm: LanguageModel | None = None,
) -> dict[str, Any]:
    """Every method's win rates against the reference: rows of `stages/judging.figures`, each with method, objective, rubric, weights.

    `plan`: each method's weights. `lm` is the judge itself where it is the model that is compared. What a judge was asked before is
    read from the cache. Raises `UserError` where it never answers.
    """
    from equipoise.evaluation.pairwise import matches
    from equipoise.evaluation.sweep import read_point
    from equipoise.models.engines import load_engine
    from equipoise.models.loading import cache_folder
    from equipoise.rewards.cache import Store
    from equipoise.rewards.judge import Asker, judge_pairs
    from equipoise.stages.judging import figures

    rubrics, by_id = rubrics_of(config, objectives), {p.id: p for p in prompts}
    reference = read_point(folder, "reference", None).rollouts
    asked = []
    for method, weights in plan.items():
        at = judged_points(weights, objectives)
        for objective in (k for k in rubrics if k in at):
            first = read_point(folder, method, at[objective]).rollouts
            pairs = matches(by_id, by_id, first, reference, config.pairs)
            asked.append(({"method": method, "objective": objective, "rubric": rubrics[objective], "weights": at[objective]}, pairs))
    asker = Asker(load_engine(config.engine, config.calls, lm), Store(config.cache or cache_folder()))
    rows = []
    with bar(f"judging {len(asked)} points in both orders", 2 * sum(len(pairs) for _, pairs in asked)) as advance:
        for row, pairs in asked:
            texts = [m.prompt for m in pairs], [m.first.text for m in pairs], [m.second.text for m in pairs]
            rows.append(row | figures(pairs, judge_pairs(asker, str(row["rubric"]), *texts, advance), n_boot, seed))
    return {"engine": config.engine, "rows": rows}
