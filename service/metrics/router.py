"""What a router can know: requests from their arrival to their end, and the workers as they report themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram

from proto.control import Load, Role
from proto.lifecycle import Stage
from proto.request import FinishReason
from service.metrics.registry import BYTES, PER_TOKEN, REQUEST, STAGE, TTFT, MetricsPage, token_buckets

_MODEL = ("model_name",)
_REFUSALS = ("stale", "unknown", "conflict", "malformed", "foreign_epoch")
_LONGEST = 1 << 20
"""Token histograms reach this far: a router starts before it knows the model's own limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSummary:
    """One request that ended. Times in seconds; those it never came to are None."""

    finish: FinishReason
    num_prompt_tokens: int
    num_generated: int
    num_longest: int
    """Tokens of the choice that got most."""
    total_s: float
    max_tokens: int | None = None
    num_choices: int = 1
    num_cached: int = 0
    num_bytes_moved: int = 0
    num_duplicates: int = 0
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    inference_s: float | None = None
    """From the prompt's first chunk to the end, in all tries: ``prefill_s``, the hand-off and ``decode_s``."""


class RouterMetrics(MetricsPage):
    """``set_model`` once the model is known, and again whenever another one is served."""

    def __init__(self, model_name: str = "") -> None:
        super().__init__()
        registry = self.registry
        self._requests = Counter("tandem_requests", "Requests that ended.", ("finish",), registry=registry)
        self._stages = Histogram(
            "tandem_stage_seconds", "Seconds spent in a stage.", ("stage",), buckets=STAGE, registry=registry
        )
        self._rejected = Counter(
            "tandem_rejected", "Requests answered before any work, by error.", ("reason",), registry=registry
        )
        self._recoveries = Counter(
            "tandem_recoveries", "Requests that went on after a loss or a refusal.", ("remedy",), registry=registry
        )
        self._routed = Counter("tandem_routed", "Requests by who computes the prompt.", ("target",), registry=registry)
        self._disconnects = Counter("tandem_client_disconnects", "Clients that left early.", registry=registry)
        self._dropped = Counter(
            "tandem_refused_messages", "Messages of workers not applied.", ("reason",), registry=registry
        )
        self._duplicates = Counter(
            "tandem_duplicate_tokens",
            "Tokens that had come before, for requests that ended; decode workers repeat prefill workers' first ones.",
            registry=registry,
        )
        self._inflight = Gauge("tandem_inflight_requests", "Requests accepted and not ended.", registry=registry)
        self._workers = Gauge("tandem_workers", "Workers that take requests.", ("role",), registry=registry)
        self._moved = Histogram(
            "tandem_request_kv_transfer_bytes", "KV bytes moved per request.", buckets=BYTES, registry=registry
        )
        self._moved_total = Counter(
            "tandem_kv_transfer_bytes", "KV bytes moved between workers, for requests that ended.", registry=registry
        )
        self._http = Histogram(
            "http_request_duration_seconds", "HTTP requests.", ("handler", "method"), buckets=REQUEST, registry=registry
        )
        self._http_count = Counter(
            "http_requests", "HTTP requests by status class.", ("handler", "method", "status"), registry=registry
        )
        self._vllm = _VllmFamilies(self)
        for role in Role:
            self._workers.labels(role.value)
        for finish in FinishReason:
            self._requests.labels(finish.value)
        for reason in _REFUSALS:
            self._dropped.labels(reason)
        self.set_model(model_name)

    def set_model(self, model_name: str) -> None:
        self._model = model_name
        if model_name:  # or a series without a model would stay on the page for ever
            self._vllm.touch(model_name)

    def http_request(self, handler: str, method: str, status: int, seconds: float) -> None:
        """``handler`` is the route, not the path, so that there are few."""
        self._http.labels(handler, method).observe(seconds)
        self._http_count.labels(handler, method, f"{status // 100}xx").inc()

    def stage(self, name: str, seconds: float) -> None:
        """Time in a step that ``proto.lifecycle`` does not list: ``template``, ``tokenize``, ``detokenize``."""
        self._stages.labels(name).observe(seconds)

    def stage_left(self, stage: Stage, seconds: float) -> None:
        self._stages.labels(stage.value).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """``seconds`` since the request arrived."""
        self._vllm.ttft.labels(self._model).observe(seconds)

    def next_token(self, seconds: float, num_tokens: int = 1) -> None:
        """``num_tokens`` of one choice came together, ``seconds`` after the token before them."""
        for _ in range(num_tokens):
            self._vllm.itl.labels(self._model).observe(seconds / num_tokens)

    def finished(self, summary: RequestSummary) -> None:
        self._requests.labels(summary.finish.value).inc()
        self._moved.observe(summary.num_bytes_moved)
        self._moved_total.inc(summary.num_bytes_moved)
        self._duplicates.inc(summary.num_duplicates)
        self._vllm.finished(self._model, summary)

    def rejected(self, reason: str) -> None:
        """A request got an error before it was sent anywhere. ``reason``: the error's kind."""
        self._rejected.labels(reason).inc()

    def recovered(self, remedy: str) -> None:
        """A request goes on after a loss. ``remedy``: redirect, retry, resume."""
        self._recoveries.labels(remedy).inc()

    def routed(self, *, local: bool) -> None:
        """``local``: the decode worker computes the prompt itself."""
        self._routed.labels("decode" if local else "prefill").inc()

    def disconnected(self) -> None:
        self._disconnects.inc()

    def refused_message(self, reason: str) -> None:
        """A worker's message was not applied (``router.attempt.Listener``), or not taken (``rpc.WorkerClient``)."""
        self._dropped.labels(reason).inc()

    def set_inflight(self, num_requests: int) -> None:
        self._inflight.set(num_requests)

    def set_workers(self, loads: Mapping[Role, list[Load]]) -> None:
        """The latest load of every worker that takes requests."""
        for role in Role:
            self._workers.labels(role.value).set(len(loads.get(role, ())))
        if not self._model:
            return
        every = [load for of_role in loads.values() for load in of_role]
        self._vllm.running.labels(self._model).set(sum(load.num_running for load in every))
        self._vllm.waiting.labels(self._model).set(sum(load.num_waiting for load in every))
        num_blocks = sum(load.num_blocks for load in every)
        num_used = num_blocks - sum(load.num_free_blocks for load in every)
        self._vllm.kv_usage.labels(self._model).set(num_used / num_blocks if num_blocks else 0.0)


class _VllmFamilies:
    """The request-level families under vLLM's names."""

    def __init__(self, page: MetricsPage) -> None:
        registry = page.registry
        tokens = token_buckets(_LONGEST)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"vllm:{name}", text, _MODEL, buckets=buckets, registry=registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"vllm:{name}", text, _MODEL, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"vllm:{name}", text, _MODEL, registry=registry)

        self.running = gauge("num_requests_running", "Requests in the workers' steps.")
        self.waiting = gauge("num_requests_waiting", "Requests waiting on workers.")
        self.kv_usage = gauge("kv_cache_usage_perc", "Share of the workers' KV blocks in use, from 0 to 1.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that ended.")
        self.cached_tokens = counter("prompt_tokens_cached", "Prompt tokens that came from a prefix cache.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated by requests that ended.")
        self.success = Counter(
            "vllm:request_success", "Requests that ended.", (*_MODEL, "finished_reason"), registry=registry
        )
        self.ttft = histogram("time_to_first_token_seconds", "Seconds to the first token.", TTFT)
        self.itl = histogram("inter_token_latency_seconds", "Seconds between two tokens.", PER_TOKEN)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "A request's mean seconds per token after the first.", PER_TOKEN
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Seconds from arrival to end.", REQUEST)
        self.queue = histogram("request_queue_time_seconds", "Seconds waiting to be computed.", REQUEST)
        self.prefill = histogram("request_prefill_time_seconds", "Seconds computing the prompt.", REQUEST)
        self.decode = histogram("request_decode_time_seconds", "Seconds generating.", REQUEST)
        self.inference = histogram(
            "request_inference_time_seconds", "Seconds from the prompt's first chunk to the end.", REQUEST
        )
        self.request_prompt = histogram("request_prompt_tokens", "Prompt tokens per request.", tokens)
        self.request_generation = histogram("request_generation_tokens", "Generated tokens per request.", tokens)
        self.request_longest = histogram(
            "request_max_num_generation_tokens", "Generated tokens of the choice that got most.", tokens
        )
        self.request_computed = histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens that no prefix cache had, per request.", tokens
        )
        self.request_max = histogram("request_params_max_tokens", "Most tokens that a choice may have.", tokens)
        self.request_n = histogram("request_params_n", "Choices per request.", (1, 2, 5, 10, 20))

    def touch(self, model: str) -> None:
        """Shows every family at zero, so that rates and alerts see the first event too."""
        families: tuple[Counter | Gauge | Histogram, ...] = (
            *(self.prompt_tokens, self.cached_tokens, self.generation_tokens),
            *(self.running, self.waiting, self.kv_usage),
            *(self.ttft, self.itl, self.tpot, self.e2e, self.queue, self.prefill, self.decode, self.inference),
            *(self.request_prompt, self.request_computed, self.request_generation, self.request_longest),
            *(self.request_max, self.request_n),
        )
        for family in families:
            family.labels(model)
        for reason in FinishReason:
            self.success.labels(model, reason.value)

    def finished(self, model: str, summary: RequestSummary) -> None:
        self.success.labels(model, summary.finish.value).inc()
        self.prompt_tokens.labels(model).inc(summary.num_prompt_tokens)
        self.cached_tokens.labels(model).inc(summary.num_cached)
        self.generation_tokens.labels(model).inc(summary.num_generated)
        self.e2e.labels(model).observe(summary.total_s)
        self.request_prompt.labels(model).observe(summary.num_prompt_tokens)
        self.request_generation.labels(model).observe(summary.num_generated)
        self.request_longest.labels(model).observe(summary.num_longest)
        self.request_n.labels(model).observe(summary.num_choices)
        if summary.num_generated:  # or nobody has said what was cached, and perhaps nothing was computed
            self.request_computed.labels(model).observe(summary.num_prompt_tokens - summary.num_cached)
        if summary.max_tokens is not None:
            self.request_max.labels(model).observe(summary.max_tokens)
        for family, seconds in (
            (self.queue, summary.queue_s),
            (self.prefill, summary.prefill_s),
            (self.decode, summary.decode_s),
            (self.inference, summary.inference_s),
        ):
            if seconds is not None:
                family.labels(model).observe(seconds)
        per_choice = summary.num_generated / summary.num_choices
        if summary.decode_s is not None and per_choice > 1:
            self.tpot.labels(model).observe(summary.decode_s / (per_choice - 1))
