"""Counts and times of a server, for Prometheus; no text of a request is among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from equipoise.serving.service import Answer, Service


class Measures:
    """What is measured of one server."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        engine, counts = service.engine, service.engine.counts
        into: dict[str, Any] = {"registry": self._registry, "namespace": "equipoise"}
        self._requests = Counter("requests", "Requests that were answered, by method", ("method",), **into)
        self._refused = Counter("refused", "Requests that got an error, by status", ("status",), **into)
        self._seconds = Histogram("seconds", "Seconds from a request to its last token", ("method",), **into)
        self._kl = Histogram("kl_nats", "Exact KL of a response from the reference", ("method",), **into)
        self._gauge("running", "Responses that are being decoded", lambda: engine.running)
        self._gauge("waiting", "Responses that wait for a place", lambda: engine.waiting)
        self._gauge("engine_tokens_total", "Tokens that were drawn", lambda: counts.tokens)
        self._gauge("engine_seconds_total", "Seconds in which the engine was at work", lambda: counts.busy_s)
        self._gauge("engine_turns_total", "Batches of one token that were run", lambda: counts.turns)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(name, text, namespace="equipoise", registry=self._registry).set_function(read)

    def answered(self, method: str, answer: Answer, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(method).inc()
        self._seconds.labels(method).observe(seconds)
        for scored in answer.replies:
            self._kl.labels(method).observe(scored.reply.rollout.kl)

    def refused(self, status: int) -> None:
        """Count an error."""
        self._refused.labels(str(status)).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
