"""What the server counts, as Prometheus reads it; labels take their values from fixed sets, so that they never grow."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
MEDIA_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The figures of one server."""

    def __init__(self, model: str, runtime: str, context: int) -> None:
        disable_created_metrics()
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("cusprun_requests", "Requests answered.", ["endpoint", "status"], registry=registry)
        self.seconds = Histogram(
            "cusprun_request_seconds", "From a request to the end of its answer.", ["endpoint"], buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.waited = Histogram("cusprun_queue_seconds", "Time in the queue.", buckets=SECONDS, registry=registry)
        self.first_token = Histogram(
            "cusprun_first_token_seconds", "From a request to its first token.", buckets=SECONDS, registry=registry
        )
        self.cancelled = Counter(
            "cusprun_cancelled", "Requests whose client left before the answer was whole.", registry=registry
        )
        self.prompt_tokens = Counter("cusprun_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.cached_tokens = Counter(
            "cusprun_cached_prompt_tokens", "Tokens of prompts that were not computed again.", registry=registry
        )
        self.tokens = Counter("cusprun_generated_tokens", "Tokens generated.", registry=registry)
        info = Gauge("cusprun_model", "The model.", ["model", "runtime", "context"], registry=registry)
        info.labels(model, runtime, str(context)).set(1)

    def watch(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Names the sources of what is read when it is asked for."""
        Gauge("cusprun_waiting", "Requests in the queue.", registry=self._registry).set_function(waiting)
        Gauge("cusprun_running", "Requests being answered.", registry=self._registry).set_function(running)

    def text(self) -> bytes:
        return generate_latest(self._registry)
