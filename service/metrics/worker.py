"""What a worker knows: its engine's steps, memory and cache, and the hand-offs it takes part in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import Counter, Gauge, Histogram

from proto.control import Load, Role
from proto.handoff import RefuseReason
from proto.lifecycle import Stage
from service.metrics.registry import STAGE, STEP_TOKENS, MetricsPage


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTotals:
    """Counts since the engine's start. They only grow."""

    num_preemptions: int = 0
    cache_query_tokens: int = 0
    cache_hit_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    num_failed: int = 0


class RefusalCounts(Protocol):
    """What the worker did not apply (``kvtransfer.fences.Refusals``): totals, read whenever the page is."""

    def by_reason(self) -> Mapping[str, int]:
        """Messages."""

    @property
    def num_damaged(self) -> int:
        """Blocks."""


class WorkerMetrics(MetricsPage):
    """Families that a router has as well bear ``role`` here, so that no sum need count a request twice."""

    def __init__(self, model_name: str, role: Role, refusals: RefusalCounts) -> None:
        super().__init__()
        registry = self.registry
        own = {"role": role.value}
        of_model = {"model_name": model_name, **own}
        self._role = role.value
        self._of_model = of_model
        self._totals = EngineTotals()

        def gauge(name: str, text: str, labels: dict[str, str]) -> Gauge:
            return Gauge(name, text, tuple(labels), registry=registry).labels(**labels)

        def counter(name: str, text: str, labels: dict[str, str]) -> Counter:
            return Counter(name, text, tuple(labels), registry=registry).labels(**labels)

        def histogram(name: str, text: str, labels: dict[str, str], buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, tuple(labels), buckets=buckets, registry=registry).labels(**labels)

        self._running = gauge("vllm:num_requests_running", "Requests in the engine's steps.", of_model)
        self._waiting = gauge("vllm:num_requests_waiting", "Requests waiting to be computed.", of_model)
        self._kv_usage = gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks in use, from 0 to 1.", of_model)
        self._preemptions = counter(
            "vllm:num_preemptions", "Sequences that lost their blocks and were computed again.", of_model
        )
        self._queries = counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", of_model)
        self._hits = counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", of_model)
        self._corrupted = counter(
            "vllm:corrupted_requests", "Requests given up because their logits were not finite.", of_model
        )
        self._step_tokens = histogram("vllm:iteration_tokens_total", "Tokens per step.", of_model, STEP_TOKENS)
        self._cache_config: Gauge | None = None

        self._computed = counter("tandem_computed_prompt_tokens", "Prompt tokens computed, in every try.", own)
        self._generated = counter("tandem_generated_tokens", "Tokens generated, in every try.", own)
        self._step_seconds = histogram("tandem_step_seconds", "Seconds per engine step.", own, STAGE)
        self._waiting_tokens = gauge("tandem_waiting_tokens", "Prompt tokens not yet computed.", own)
        self._held = gauge("tandem_held_requests", "Prompts computed and not yet handed over.", own)
        self._leases = counter("tandem_leases_expired", "Leases that ended without news.", own)
        self._transfer_bytes = Counter(
            "tandem_kv_transfer_bytes", "KV bytes handed over.", ("transport", "role"), registry=registry
        )
        self._transfer_seconds = Histogram(
            "tandem_kv_transfer_seconds",
            "Seconds from the grant to the last block.",
            ("transport", "role"),
            buckets=STAGE,
            registry=registry,
        )
        self._refused = Counter(
            "tandem_handoffs_refused",
            "Hand-offs refused: by this decode worker's tier, or to this prefill worker.",
            ("reason", "role"),
            registry=registry,
        )
        self._stages = Histogram(
            "tandem_stage_seconds", "Seconds spent in a stage.", ("stage", "role"), buckets=STAGE, registry=registry
        )
        self.show_totals(
            "tandem_refused_messages", "Messages of routers and peers not applied.", "reason", refusals.by_reason
        )
        self.show_total(
            "tandem_damaged_blocks",
            "Blocks whose bytes were not right where they came; on a prefill worker: those that were asked for again.",
            lambda: refusals.num_damaged,
        )

    def set_cache_config(
        self, *, block_size: int, num_blocks: int, max_concurrency: float, prefix_caching: bool
    ) -> None:
        """The KV memory's shape, as labels of a constant 1. Once."""
        labels = {
            **self._of_model,
            "block_size": str(block_size),
            "num_gpu_blocks": str(num_blocks),
            "enable_prefix_caching": str(prefix_caching),
            "kv_cache_size_tokens": str(block_size * num_blocks),
            "kv_cache_max_concurrency": f"{max_concurrency:.2f}",
        }
        assert self._cache_config is None, "the KV memory does not change"
        self._cache_config = Gauge(
            "vllm:cache_config_info", "The KV memory's shape.", tuple(labels), registry=self.registry
        )
        self._cache_config.labels(**labels).set(1)

    def set_load(self, load: Load) -> None:
        self._running.set(load.num_running)
        self._waiting.set(load.num_waiting)
        self._waiting_tokens.set(load.num_waiting_tokens)
        self._kv_usage.set(1.0 - load.num_free_blocks / load.num_blocks if load.num_blocks else 0.0)

    def set_held(self, num_requests: int) -> None:
        self._held.set(num_requests)

    def stepped(self, num_tokens: int, seconds: float) -> None:
        self._step_tokens.observe(num_tokens)
        self._step_seconds.observe(seconds)

    def set_totals(self, totals: EngineTotals) -> None:
        """Advances the counters to ``totals``."""
        last, self._totals = self._totals, totals
        self._preemptions.inc(totals.num_preemptions - last.num_preemptions)
        self._queries.inc(totals.cache_query_tokens - last.cache_query_tokens)
        self._hits.inc(totals.cache_hit_tokens - last.cache_hit_tokens)
        self._computed.inc(totals.prompt_tokens - last.prompt_tokens)
        self._generated.inc(totals.generated_tokens - last.generated_tokens)
        self._corrupted.inc(totals.num_failed - last.num_failed)

    def transferred(self, transport: str, num_bytes: int, seconds: float) -> None:
        """One hand-off is complete."""
        self._transfer_bytes.labels(transport, self._role).inc(num_bytes)
        self._transfer_seconds.labels(transport, self._role).observe(seconds)

    def handoff_refused(self, reason: RefuseReason) -> None:
        self._refused.labels(reason.value, self._role).inc()

    def lease_expired(self) -> None:
        self._leases.inc()

    def stage_left(self, stage: Stage, seconds: float) -> None:
        self._stages.labels(stage.value, self._role).observe(seconds)
