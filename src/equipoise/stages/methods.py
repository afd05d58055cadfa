"""The methods of a comparison, and the points of each along the trade-off."""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from equipoise.stages.choosing import Choice
from equipoise.stages.steering import Steer, Steering, renamed, steering_of
from equipoise.types import UserError

Weights = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Method(Steer):
    """One method of a comparison: what steers it, as `sample` takes it, and where along the trade-off."""

    recipe: str = ""
    """YAML file of `sample` settings that hold where nothing is said here; model, prompts and the like are the comparison's."""
    weights: tuple[str, ...] = ()
    """Its weight vectors, as helpful=0.7,harmless=0.3 each; empty for the comparison's."""
    policies: tuple[str, ...] = ()
    """Folders of policies that were trained at one weight vector each (DPO, MODPO); each is a point of the method."""
    palettes: tuple[str, ...] = ()
    """Folders that `palette --out` wrote; each is a point of the method, placed at v_k sd_k / sum_j v_j sd_j."""
    palette_n: int = 0
    """Candidates of palettes that say no number themselves (pooled ones)."""
    choice: Choice = field(default_factory=Choice)
    """How its responses are chosen among proposals."""

    def __post_init__(self) -> None:
        if self.policies and (self.weights or self.policy):
            raise UserError("policies bring their own weights: leave weights and policy away")
        if self.palettes:
            ours = ("recipe", "palettes", "palette_n")
            other = [f.name for f in fields(self) if f.name not in ours and getattr(self, f.name) != getattr(_PLAIN, f.name)]
            if other:
                raise UserError(f"palettes choose among the reference's responses at weights of their own: leave {', '.join(other)} away")
        elif self.palette_n:
            raise UserError(f"palette_n={self.palette_n} is read beside palettes alone: leave it away")


_PLAIN = Method()
_LADDER = re.compile(r"(^|, )best-of-(n|\d+)$")


def said(config: Any, plain: Any = _PLAIN) -> dict[str, Any]:
    """The settings of a method that differ from those of `plain`, as they differ within a choice."""
    found = {f.name: (getattr(config, f.name), getattr(plain, f.name)) for f in fields(config)}
    return {name: said(own, other) if is_dataclass(own) else own for name, (own, other) in found.items() if own != other}


@dataclass(frozen=True, kw_only=True)
class MethodPoint:
    """A method at one weight vector: the `sample` settings that draw it, and the steering that they ask for."""

    sampled: Mapping[str, Any]
    steering: Steering

    @property
    def weights(self) -> Weights:
        """In the order of the comparison's rewards."""
        return self.steering.weights


def points_of(
    name: str, method: Method, objectives: tuple[str, ...], grid: Sequence[Weights], settings: Mapping[str, Any]
) -> list[MethodPoint]:
    """A method's points: at its own weights, those of its policies or palettes, or else at every weight vector of `grid`.

    `settings`: those of the comparison; model, sampling and trust_remote_code hold for every method. Raises `UserError` for a name
    that can't be a folder's or is that of best-of-n, steering that isn't of these objectives, and two points at one place.
    """
    if name == "reference" or "/" in name or name.startswith("."):
        raise UserError(f"{name!r} can't be a method's name: it becomes a folder beside the reference's")
    if _LADDER.search(name):
        raise UserError(
            f"{name!r} can't be a method's name: best-of-n comes with every comparison; call it 'best of 4 while sampling', say"
        )
    try:
        return _points(with_recipe(method), objectives, grid, settings)
    except UserError as error:
        raise UserError(f"method {name!r}: {error}") from None


def _points(method: Method, objectives: tuple[str, ...], grid: Sequence[Weights], settings: Mapping[str, Any]) -> list[MethodPoint]:
    asked = method.weights or [",".join(f"{k}={w:.12g}" for k, w in zip(objectives, weights, strict=True)) for weights in grid]
    shared = {**asdict(method), **{key: settings[key] for key in ("sampling", "trust_remote_code")}}
    if method.palettes:
        sampled = {**shared, "weights": ""}
        found = [MethodPoint(sampled=sampled, steering=_painted(folder, method, objectives, settings)) for folder in method.palettes]
    else:
        each = [{"policy": folder, "weights": ""} for folder in method.policies] or [{"weights": weights} for weights in asked]
        found = [MethodPoint(sampled=s, steering=_placed(steering_of(s), objectives)) for s in ({**shared, **point} for point in each)]
    _refuse_twice(objectives, [point.weights for point in found])
    return found


def with_recipe(method: Method) -> Method:
    """The method with the settings of its recipe, but for those that it says itself. Raises `UserError` naming what can't be read."""
    from jsonargparse import ArgumentParser

    from equipoise.stages.sampling import Sample

    if not method.recipe:
        return method
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Sample, None, skip={"out"})
    try:
        found = dict(parser.instantiate(parser.parse_path(Path(method.recipe).expanduser())).items())
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        raise UserError(f"can't read the recipe {method.recipe}: {' '.join(str(error).split())}") from None
    if found["goals"] or found["upstream"].source:
        raise UserError(f"the recipe {method.recipe} draws by goals or from a server, which a comparison doesn't")
    weights = (found["weights"],) if found["weights"] else ()
    drawn = {f.name: found[f.name] for f in fields(Steer)} | {"choice": found["choice"], "weights": weights}
    own = {f.name: getattr(method, f.name) for f in fields(Method) if getattr(method, f.name) != getattr(_PLAIN, f.name)}
    return Method(**{**drawn, **own})


def _painted(folder: str, method: Method, objectives: tuple[str, ...], settings: Mapping[str, Any]) -> Steering:
    """A palette at its place."""
    from equipoise.stages.palette import palette_way

    way = palette_way(Path(folder).expanduser(), objectives, method.palette_n, settings["model"])
    assert way.fixed is not None, "a palette has a place"
    return Steering(way=way, weights=way.fixed)


def _refuse_twice(objectives: Sequence[str], points: Sequence[Weights]) -> None:
    """Raise `UserError` for two points at one place, as a point's folder names it: the second would be taken for the first."""
    from equipoise.objectives import weight_label

    labels = [weight_label(objectives, weights) for weights in points]
    for index, label in enumerate(labels):
        if label in labels[:index]:
            raise UserError(f"points {labels.index(label) + 1} and {index + 1} are both at {label}: make them two methods")


def _placed(steering: Steering | None, objectives: tuple[str, ...]) -> Steering:
    """The steering, with a policy of fewer objectives at 0 on the others. Raises `UserError` where it isn't of these objectives."""
    known = steering.way.objectives if steering else ()
    if steering and steering.way.fixed and set(known) <= set(objectives):
        own = dict(zip(known, steering.weights, strict=True))
        weights = tuple(own.get(k, 0.0) for k in objectives)
        way = replace(steering.way, objectives=objectives, guide=renamed(steering.way, objectives), fixed=weights)
        return Steering(way=way, weights=weights)
    if steering is None or known != objectives:
        raise UserError(f"steered by {', '.join(known) or 'nothing'}; the rewards are {', '.join(objectives)}, in this order")
    return steering
