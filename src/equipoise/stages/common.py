"""What several stages share: the loaded model, prompts of a split or of an earlier run, pairs, settings for the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.progress import say
from equipoise.runs import file_digest, manifest_of, recorded
from equipoise.types import Pair, Prompt, Response, UserError

if TYPE_CHECKING:
    from equipoise.models.loading import LanguageModel
    from equipoise.rewards.scoring import ScoredRun, Text

_LOADED: dict[str, Any] = {}


def model_of(name: str, trust_remote_code: bool = False) -> LanguageModel:
    """The model of this name, loaded once per process."""
    if name not in _LOADED:
        from equipoise.models.loading import load_model

        say(f"loading {name}")
        _LOADED[name] = load_model(name, trust_remote_code=trust_remote_code)
    return _LOADED[name]


def check_counts(**counts: int) -> None:
    """Check that there is at least one of each. Raises `UserError` that names what there is too little of."""
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name} must be at least 1, got {count}")


def prompts_of(source: str, split_name: str, limit: int) -> list[Prompt]:
    """Prompts of a split, at most `limit` (0: all), evenly spaced over the file."""
    from equipoise.data.prompts import load_prompts, split

    if limit < 0:
        raise UserError(f"limit must be 0, for all, or more, got {limit}")
    chosen = load_prompts(source)
    if not chosen:
        raise UserError(f"{source} has no prompts")
    if split_name:
        chosen = split(chosen, split_name)
    if not chosen:
        raise UserError(f"{source} has no prompts in the split {split_name!r}")
    if limit and limit < len(chosen):
        chosen = [chosen[i * len(chosen) // limit] for i in range(limit)]
    return chosen


def prompts_of_run(folder: Path, command: str) -> list[Prompt]:
    """The prompts that a `sample` or `sweep` folder was made from. Raises `UserError` where their file has changed since."""
    from equipoise.data.prompts import prompts_file

    record = manifest_of(folder, command)
    config, path = record["config"], prompts_file(record["config"]["prompts"])
    if file_digest(path) != record["parents"].get("prompts"):
        raise UserError(f"{path} has changed since {folder} was made from it; put it back or run `{command}` again in another folder")
    return prompts_of(config["prompts"], config["split"], config["limit"])


def scored_run(folder: Path) -> ScoredRun:
    """A folder that `score` scored: sampled responses, or those of the pairs that it names. Raises `UserError` where texts have changed."""
    from equipoise.rewards.normalisation import scorers_of
    from equipoise.rewards.scoring import ScoredRun, read_rewards
    from equipoise.rollouts import read_rollouts

    scorers = scorers_of(folder / "rewards")
    responses: Sequence[Response]
    pairs = manifest_of(folder / "rewards", "score")["config"].get("pairs", [])
    if pairs:
        prompts, responses = texts_of_pairs(pairs)
    else:
        prompts, responses = {p.id: p for p in prompts_of_run(folder, "sample")}, read_rollouts(folder / "rollouts")
    return ScoredRun(folder, prompts, responses, read_rewards(folder / "rewards", responses), scorers)


def texts_of_pairs(sources: Sequence[str]) -> tuple[dict[str, Prompt], list[Text]]:
    """The prompts by id, and every response of these pairs once."""
    from equipoise.data.labelled import load_labelled
    from equipoise.data.prompts import distinct_texts

    return to_score(distinct_texts((p.prompt, p.responses) for p in load_labelled(sources).pairs))


def load_pairs(sources: Sequence[str], objective: str, dropped: Counter[str] | None = None, ids: str = "") -> list[Pair]:
    """Pairs of several sources, as `objective` orders them; prompts of different files keep different ids.

    A kind with one label that no source names has this objective, and ids that begin with `ids` (the objective's name by
    default). Of other sources, ties and pairs without a label on it are left out. What is left out is counted in `dropped`.
    """
    from equipoise.data.files import find_files
    from equipoise.data.labelled import SINGLE, counted, load_labelled, parse_source
    from equipoise.data.pairwise import PAIRS

    left_out = Counter[str]() if dropped is None else dropped
    pairs: list[Pair] = []
    several: list[str] = []
    for index, source in enumerate(sources):
        name, kind, place = parse_source(source)
        if name or kind not in PAIRS:
            several.append(f"{objective}={source}" if kind in SINGLE and not name else source)
            continue
        files = find_files(place)
        for number, path in enumerate(files):
            part = f"{ids or objective}{index}" if len(sources) > 1 else ids or objective
            pairs += PAIRS[kind](path, f"{part}-{number}" if len(files) > 1 else part, left_out)
    if several:
        found = load_labelled(several, (objective,))
        ordered = [pair for p in found.pairs if (pair := p.pair(objective)) is not None]
        left_out.update(found.dropped)
        left_out.update(["tie"] * (len(found.pairs) - len(ordered)))
        pairs += ordered
    if not pairs:
        raise UserError(f"no usable pairs in {', '.join(sources)}: {counted(left_out)}")
    return pairs


def to_score(found: Iterable[tuple[Prompt, str]]) -> tuple[dict[str, Prompt], list[Text]]:
    """The prompts by id, and the responses numbered within their prompt."""
    from equipoise.rewards.scoring import Text

    prompts: dict[str, Prompt] = {}
    count = Counter[str]()
    texts = []
    for prompt, text in found:
        prompts[prompt.id] = prompt
        texts.append(Text(f"{prompt.id}/{count[prompt.id]}", prompt.id, text))
        count[prompt.id] += 1
    return prompts, texts


def settings_of(config: Any) -> dict[str, Any]:
    """The config as the manifest keeps it, without where it is written."""
    return {k: v for k, v in recorded(config).items() if k != "out"}
