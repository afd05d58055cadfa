"""The command `serve`: what is served is read from settings and run folders before the server starts."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.progress import say
from equipoise.runs import read_json
from equipoise.serving.artefacts import Found, find
from equipoise.serving.service import Limits
from equipoise.stages import common
from equipoise.stages.choosing import Choice
from equipoise.stages.steering import Steer, way_of
from equipoise.types import UserError

if TYPE_CHECKING:
    import uvicorn

    from equipoise.models.loading import LanguageModel
    from equipoise.objectives import Normaliser
    from equipoise.palette.banks import Bank
    from equipoise.serving.offers import Offer
    from equipoise.serving.service import Service

KEY = "EQUIPOISE_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Served(Steer):
    """One method: what steers it, as `sample` takes it, and how its responses are chosen."""

    choice: Choice = field(default_factory=Choice)
    """The best or one of n."""


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve one model under many methods, the trade-off in the request; a page to try it is at /."""

    model: str = "smollm2"
    """"smollm2", a Hub id, a folder or a .gguf file."""
    runs: tuple[Path, ...] = ()
    """Run folders, or folders of them: what can be served of them is, as their manifests say (serving/artefacts.py)."""
    methods: dict[str, Served] = field(default_factory=dict)
    """More methods by name, as `compare` takes them."""
    rewards: tuple[str, ...] = ("helpful", "harmless")
    """Scorers of the responses, the objectives; objective=SCORER renames one. Empty for none."""
    statistics: str = ""
    """Frozen statistics (`normalise`) of the rewards: what a standard deviation is. Without them the bank's."""
    bank: str = ""
    """Scored `sample` folder of the reference, by which targets are quoted; empty for the first one among the runs."""
    best_of: int = 4
    """n of the method best-of-n, which chooses by the rewards; 0 leaves it out."""
    top_k: int = 40
    """Candidates of a token; 0 for the whole vocabulary."""
    limits: Limits = field(default_factory=Limits)
    """How much a client may ask for."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of this machine, which should go with a key in EQUIPOISE_API_KEY."""
    port: int = 8000
    """Port to listen at; 0 for a free one."""
    drain_s: int = 60
    """Seconds that requests in flight have to end where the server is told to stop."""
    trust_remote_code: bool = False
    """Run code that comes with a model."""

    def __post_init__(self) -> None:
        if self.best_of < 0 or self.top_k < 0 or not 0 <= self.port < 65536 or self.drain_s < 0:
            raise UserError(
                f"best_of, top_k and drain_s must be at least 0 and port below 65536, got {self.best_of}, {self.top_k}, "
                f"{self.drain_s} and {self.port}"
            )


def serve(config: Serve) -> None:
    """Load what is served, and serve it until the process is told to stop."""
    server, service = server_of(config)
    socket = listening(config, config.port)
    host, port = socket.getsockname()[:2]
    say(f"serving {service.lm.name} at http://{host}:{port} with {', '.join(service.offers)}")
    server.run(sockets=[socket])


def server_of(config: Serve) -> tuple[uvicorn.Server, Service]:
    """The server, not yet running. Raises `UserError` where it can't be made of these settings, or its libraries are missing."""
    try:
        import uvicorn

        from equipoise.serving.app import make_app
    except ImportError as error:
        raise UserError(f"this needs {error.name}: install equipoise[serve]") from None

    service, about = service_of(config)
    key = os.environ.get(KEY) or None
    if key is None and config.host not in ("127.0.0.1", "localhost", "::1"):
        say(f"anybody who reaches {config.host} may use this server: set {KEY} to ask for a key")
    settings = uvicorn.Config(
        make_app(service, about, key),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=config.drain_s,
        timeout_keep_alive=30,
        server_header=False,
    )
    return uvicorn.Server(settings), service


def listening(config: Serve, port: int) -> socket.socket:
    """A socket that listens at the settings' host. Raises `UserError` where that can't be had."""
    try:
        return socket.create_server((config.host, port), backlog=128)
    except OSError as error:
        said = error.strerror or str(error)
        raise UserError(f"can't listen at {config.host}:{port} ({said}): choose another host or port, or port 0 for a free one") from None


def service_of(config: Serve) -> tuple[Service, dict[str, Any]]:
    """The service, and what its page is told of fronts. Raises `UserError` for what can't be served."""
    from equipoise.rewards import load_rewards
    from equipoise.serving.service import Service
    from equipoise.stages.palette import bank_of

    found = find(config.runs) if config.runs else Found()
    lm = common.model_of(config.model, config.trust_remote_code)
    folder = Path(config.bank) if config.bank else found.bank
    bank = bank_of(folder) if folder else None
    rewards = load_rewards(config.rewards, lm) if config.rewards else []
    scale = _scale(config, rewards, bank)
    offers = [_plain()]
    steered: dict[str, Served] = {name: Served(**ways) for name, ways in found.methods.items()} | config.methods
    offers += [_offer(lm, config, name, served) for name, served in steered.items()]
    if config.best_of and scale is not None:
        offers.append(_best_of(config, scale.objectives))
    if bank is not None and _same_rewards(config, rewards, bank):
        offers.append(_palette(bank))
    service = Service(lm, offers, rewards, scale, config.limits, config.top_k)
    return service, {"fronts": [front for path in found.fronts for front in fronts_of(path)]}


def _scale(config: Serve, rewards: Any, bank: Bank | None) -> Normaliser | None:
    from equipoise.objectives import Normaliser
    from equipoise.rewards import parse_name
    from equipoise.rewards.normalisation import Statistics

    names = [reward.name for reward in rewards]
    if config.statistics:
        known = {r.name: getattr(r, "identity", parse_name(entry)[1]) for entry, r in zip(config.rewards, rewards, strict=True)}
        return Statistics.read(Path(config.statistics)).normaliser(names, known)
    if bank is None or not names or not set(names) <= set(bank.objectives):
        return None
    return Normaliser.fit(names, bank.reward_NK[:, [bank.objectives.index(name) for name in names]])


def _same_rewards(config: Serve, rewards: Any, bank: Bank) -> bool:
    lost = [name for name in bank.objectives if name not in [reward.name for reward in rewards]]
    if lost:
        say(f"no targets: the bank is scored on {lost[0]}, which isn't among the rewards {', '.join(config.rewards)}")
    return not lost


def _plain() -> Offer:
    from equipoise.serving.offers import Offer

    return Offer(name="reference", about="the model as it is")


def _best_of(config: Serve, objectives: tuple[str, ...]) -> Offer:
    from equipoise.serving.offers import Offer

    choice = Choice(how="best_of", rewards=config.rewards, n=config.best_of)
    name = f"best-of-{config.best_of}"
    return Offer(name=name, about=f"the best of {config.best_of} by the weighted rewards", objectives=objectives, choice=choice)


def _palette(bank: Bank) -> Offer:
    from equipoise.serving.offers import Offer

    about = f"outcomes in place of weights: one of {bank.common_size} samples, drawn by the palette's multipliers"
    return Offer(name="palette", about=about, objectives=bank.objectives, bank=bank)


def _offer(lm: LanguageModel, config: Serve, name: str, served: Served) -> Offer:
    from equipoise.models.generation import Sampling
    from equipoise.serving.offers import offer_of
    from equipoise.stages.choosing import choice_of

    if name == "reference" or ":" in name or "/" in name:
        raise UserError(f"{name!r} can't be a method's name: a model is called BASE:METHOD, and the reference is there already")
    sampling = asdict(Sampling(max_new_tokens=config.limits.max_tokens, top_k=config.top_k, batch_size=config.limits.places))
    settings = {**asdict(served), "sampling": sampling, "trust_remote_code": config.trust_remote_code}
    try:
        # Every request brings its own strength, so the guide is made with none.
        way = way_of(settings | {"kl_budget": None, "beta": 1.0})
        choice = choice_of(settings)
        if choice is not None and choice.rewards and choice.rewards != config.rewards:
            raise UserError(f"it chooses by {', '.join(choice.rewards)}, and the server's rewards are {', '.join(config.rewards)}")
        guide = way.guide(lm) if way else None
        return offer_of(name, way, settings, choice, guide)
    except UserError as error:
        raise UserError(f"method {name!r}: {error}") from None


def fronts_of(path: Path) -> list[dict[str, Any]]:
    """What the page draws of an evaluation: each method's points with their intervals."""
    result = read_json(path)
    fronts: dict[tuple[str, int], dict[str, Any]] = {}
    for point in result["points"]:
        key = point["method"], point["n_candidates"]
        front = {"method": key[0], "candidates": key[1], "objectives": result["objectives"], "prompts": result.get("prompts"), "points": []}
        kept = {name: point[name] for name in ("weights", "reward", "kl", "cost", "n")}
        fronts.setdefault(key, front)["points"].append(kept)
    return list(fronts.values())
