"""Metrics as a scraper sees them: names, labels, values."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvtransfer.fences import Refusals, Refused
from kvtransfer.ledger.replies import LedgerCounts
from proto.control import Load, Role
from proto.handoff import RefuseReason
from proto.lifecycle import Stage
from proto.request import FinishReason
from service.metrics import EngineTotals, RequestSummary, RouterMetrics, WorkerMetrics, show_ledger
from service.metrics.registry import MetricsPage, token_buckets

DASHBOARD_REQUEST_SERIES = {
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_success_total",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_max_num_generation_tokens_sum",
    "vllm:request_inference_time_seconds_sum",
    "vllm:request_params_max_tokens_sum",
    "vllm:request_prefill_kv_computed_tokens_sum",
}
ENGINE_SERIES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:iteration_tokens_total_count",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:corrupted_requests_total",
}


def samples(page: MetricsPage) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(page.render().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(page: MetricsPage, name: str, **labels: str) -> float | None:
    return samples(page).get((name, frozenset(labels.items())))


def names(page: MetricsPage) -> set[str]:
    return {family.name for family in page.registry.collect()}


def names_of_model(page: MetricsPage, model: str) -> set[str]:
    return {name for name, labels in samples(page) if ("model_name", model) in labels}


def summary(**changes: object) -> RequestSummary:
    fields: dict[str, object] = {
        "finish": FinishReason.STOP,
        "num_prompt_tokens": 100,
        "num_generated": 11,
        "num_longest": 11,
        "total_s": 3.0,
        "max_tokens": 16,
        "num_cached": 32,
        "num_bytes_moved": 4096,
        "queue_s": 0.5,
        "prefill_s": 1.0,
        "decode_s": 1.0,
        "inference_s": 2.25,
    }
    return RequestSummary(**(fields | changes))  # type: ignore[arg-type]


def test_a_router_shows_what_dashboards_ask_for_before_the_first_request() -> None:
    assert names_of_model(RouterMetrics("m"), "m") >= DASHBOARD_REQUEST_SERIES


def test_a_worker_shows_its_engine_before_the_first_step() -> None:
    assert names_of_model(WorkerMetrics("m", Role.PREFILL, Refusals()), "m") >= ENGINE_SERIES


def test_a_finished_request_is_counted_once_everywhere() -> None:
    metrics = RouterMetrics("m")
    metrics.finished(summary())
    metrics.finished(summary(finish=FinishReason.ABORT, queue_s=None, prefill_s=None, decode_s=None))
    assert value(metrics, "tandem_requests_total", finish="stop") == 1
    assert value(metrics, "tandem_requests_total", finish="error") == 0
    assert value(metrics, "vllm:request_success_total", model_name="m", finished_reason="abort") == 1
    assert value(metrics, "vllm:prompt_tokens_total", model_name="m") == 200
    assert value(metrics, "vllm:prompt_tokens_cached_total", model_name="m") == 64
    assert value(metrics, "vllm:generation_tokens_total", model_name="m") == 22
    assert value(metrics, "vllm:request_queue_time_seconds_count", model_name="m") == 1
    assert value(metrics, "vllm:request_time_per_output_token_seconds_sum", model_name="m") == pytest.approx(0.1)
    assert value(metrics, "tandem_request_kv_transfer_bytes_sum") == 8192


def test_what_a_request_asked_for_got_and_cost() -> None:
    metrics = RouterMetrics("m")
    metrics.finished(summary(num_choices=2, num_generated=11, num_longest=8))
    never_begun = summary(finish=FinishReason.ERROR, num_generated=0, num_longest=0, num_cached=0, inference_s=None)
    metrics.finished(never_begun)
    for name, total, count in (
        ("request_params_max_tokens", 32, 2),
        ("request_max_num_generation_tokens", 8, 2),
        ("request_prefill_kv_computed_tokens", 68, 1),
        ("request_inference_time_seconds", 2.25, 1),
    ):
        assert value(metrics, f"vllm:{name}_sum", model_name="m") == total, name
        assert value(metrics, f"vllm:{name}_count", model_name="m") == count, name


def test_one_token_has_no_time_per_further_token() -> None:
    metrics = RouterMetrics("m")
    metrics.finished(summary(num_generated=3, num_choices=3))
    assert value(metrics, "vllm:request_time_per_output_token_seconds_count", model_name="m") == 0


def test_tokens_that_come_together_share_their_latency() -> None:
    metrics = RouterMetrics("m")
    metrics.first_token(0.25)
    metrics.next_token(0.06, num_tokens=3)
    assert value(metrics, "vllm:time_to_first_token_seconds_sum", model_name="m") == 0.25
    assert value(metrics, "vllm:inter_token_latency_seconds_count", model_name="m") == 3
    assert value(metrics, "vllm:inter_token_latency_seconds_sum", model_name="m") == pytest.approx(0.06)


def test_latency_buckets_are_vllm_s_and_finer_ones() -> None:
    metrics = RouterMetrics("m")
    buckets = {
        float(dict(labels)["le"])
        for name, labels in samples(metrics)
        if name == "vllm:inter_token_latency_seconds_bucket"
    }
    assert {0.01, 0.025, 0.05, 0.075, 0.1, 40.0, 80.0, float("inf")} <= buckets
    assert min(buckets) < 0.01


def test_the_router_s_load_is_of_all_workers() -> None:
    metrics = RouterMetrics("m")
    prefill = Load(num_running=1, num_waiting=4, num_free_blocks=90, num_blocks=100)
    decode = Load(num_running=7, num_free_blocks=10, num_blocks=100)
    metrics.set_workers({Role.PREFILL: [prefill], Role.DECODE: [decode]})
    assert value(metrics, "vllm:num_requests_running", model_name="m") == 8
    assert value(metrics, "vllm:num_requests_waiting", model_name="m") == 4
    assert value(metrics, "vllm:kv_cache_usage_perc", model_name="m") == pytest.approx(0.5)
    assert value(metrics, "tandem_workers", role="decode") == 1
    metrics.set_workers({})
    assert value(metrics, "tandem_workers", role="decode") == 0
    assert value(metrics, "vllm:kv_cache_usage_perc", model_name="m") == 0


def test_a_router_that_learns_its_model_counts_under_its_name() -> None:
    metrics = RouterMetrics()
    metrics.set_workers({})
    assert "model_name" not in metrics.render().decode(), "a nameless series would stay on the page for ever"
    metrics.set_model("later")
    metrics.finished(summary())
    assert value(metrics, "vllm:prompt_tokens_total", model_name="later") == 100


def test_the_router_s_other_counters() -> None:
    metrics = RouterMetrics("m")
    metrics.stage("tokenize", 0.01)
    metrics.stage_left(Stage.QUEUED, 0.2)
    metrics.rejected("RateLimitError")
    metrics.recovered("redirect")
    metrics.routed(local=True)
    metrics.routed(local=False)
    metrics.disconnected()
    metrics.refused_message("stale")
    metrics.set_inflight(3)
    metrics.http_request("/v1/completions", "POST", 429, 0.1)
    assert value(metrics, "tandem_stage_seconds_sum", stage="tokenize") == 0.01
    assert value(metrics, "tandem_stage_seconds_sum", stage="queued") == 0.2
    assert value(metrics, "tandem_rejected_total", reason="RateLimitError") == 1
    assert value(metrics, "tandem_recoveries_total", remedy="redirect") == 1
    assert value(metrics, "tandem_routed_total", target="decode") == 1
    assert value(metrics, "tandem_routed_total", target="prefill") == 1
    assert value(metrics, "tandem_client_disconnects_total") == 1
    assert value(metrics, "tandem_refused_messages_total", reason="stale") == 1
    assert value(metrics, "tandem_inflight_requests") == 3
    assert value(metrics, "http_requests_total", handler="/v1/completions", method="POST", status="4xx") == 1


def test_engine_totals_advance_counters_and_never_twice() -> None:
    metrics = WorkerMetrics("m", Role.DECODE, Refusals())
    totals = EngineTotals(
        num_preemptions=1, cache_query_tokens=50, cache_hit_tokens=20, prompt_tokens=30, generated_tokens=4
    )
    metrics.set_totals(totals)
    metrics.set_totals(totals)
    assert value(metrics, "vllm:num_preemptions_total", model_name="m", role="decode") == 1
    assert value(metrics, "vllm:prefix_cache_queries_total", model_name="m", role="decode") == 50
    assert value(metrics, "vllm:prefix_cache_hits_total", model_name="m", role="decode") == 20
    assert value(metrics, "tandem_computed_prompt_tokens_total", role="decode") == 30
    assert value(metrics, "tandem_generated_tokens_total", role="decode") == 4


def test_a_worker_s_hand_offs_and_steps() -> None:
    metrics = WorkerMetrics("m", Role.DECODE, Refusals())
    metrics.transferred("shm", 1000, 0.02)
    metrics.transferred("shm", 500, 0.01)
    metrics.handoff_refused(RefuseReason.FULL)
    metrics.lease_expired()
    metrics.stepped(17, 0.004)
    metrics.set_held(2)
    metrics.stage_left(Stage.ADOPTED, 0.1)
    metrics.set_load(Load(num_running=2, num_waiting=1, num_waiting_tokens=99, num_free_blocks=3, num_blocks=4))
    assert value(metrics, "tandem_kv_transfer_bytes_total", transport="shm", role="decode") == 1500
    assert value(metrics, "tandem_kv_transfer_seconds_count", transport="shm", role="decode") == 2
    assert value(metrics, "tandem_handoffs_refused_total", reason="full", role="decode") == 1
    assert value(metrics, "tandem_leases_expired_total", role="decode") == 1
    assert value(metrics, "vllm:iteration_tokens_total_sum", model_name="m", role="decode") == 17
    assert value(metrics, "tandem_held_requests", role="decode") == 2
    assert value(metrics, "tandem_waiting_tokens", role="decode") == 99
    assert value(metrics, "vllm:kv_cache_usage_perc", model_name="m", role="decode") == pytest.approx(0.25)
    assert value(metrics, "tandem_stage_seconds_sum", stage="adopted", role="decode") == 0.1


def test_what_a_router_and_its_workers_have_both_can_be_told_apart() -> None:
    """Scraped under one job, they would be counted twice by a sum that does not say which it means."""
    router, worker = RouterMetrics("m"), WorkerMetrics("m", Role.PREFILL, Refusals())
    router.stage_left(Stage.QUEUED, 0.1)
    worker.stage_left(Stage.QUEUED, 0.1)
    worker.transferred("grpc", 1, 0.1)
    shared = {name for name in names(router) & names(worker) if not name.startswith(("process_", "python_"))}
    shared.discard("tandem_refused_messages")  # each counts what it refused itself
    assert shared == {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "tandem_stage_seconds",
        "tandem_kv_transfer_bytes",
    }
    for page, expected in ((router, False), (worker, True)):
        for family in page.registry.collect():
            if family.name in shared:
                assert {"role" in sample.labels for sample in family.samples} == {expected}, family.name


def test_what_a_worker_refused_is_read_when_the_page_is() -> None:
    refusals = Refusals()
    metrics = WorkerMetrics("m", Role.DECODE, refusals)
    assert value(metrics, "tandem_damaged_blocks_total") == 0
    for reason in Refused:
        assert value(metrics, "tandem_refused_messages_total", reason=reason.value) == 0
        refusals.add(reason)
    refusals.add(Refused.LATE)
    refusals.add_damaged()
    assert value(metrics, "tandem_refused_messages_total", reason="late") == 2
    assert value(metrics, "tandem_refused_messages_total", reason="malformed") == 1
    assert value(metrics, "tandem_damaged_blocks_total") == 1


@pytest.mark.parametrize("page", [RouterMetrics("m"), WorkerMetrics("m", Role.PREFILL, Refusals())])
def test_what_the_ledger_refused_is_read_when_the_page_is(page: MetricsPage) -> None:
    counts = [LedgerCounts(num_refused=2), LedgerCounts(num_refused=3, num_malformed=1)]
    show_ledger(page, lambda: counts[-1], lambda: 5)
    assert value(page, "tandem_ledger_dropped_records_total") == 5
    assert value(page, "tandem_ledger_refused_writes_total") == 3
    assert value(page, "tandem_ledger_malformed_entries_total") == 1
    counts.pop()
    assert value(page, "tandem_ledger_refused_writes_total") == 2


def test_the_kv_memory_is_described_in_labels() -> None:
    metrics = WorkerMetrics("m", Role.DECODE, Refusals())
    metrics.set_cache_config(block_size=16, num_blocks=10, max_concurrency=2.5, prefix_caching=True)
    labels = next(labels for name, labels in samples(metrics) if name == "vllm:cache_config_info")
    assert dict(labels).items() >= {
        ("kv_cache_size_tokens", "160"),
        ("kv_cache_max_concurrency", "2.50"),
        ("block_size", "16"),
        ("num_gpu_blocks", "10"),
    }


def test_two_pages_of_one_process_share_nothing() -> None:
    one, other = RouterMetrics("m"), RouterMetrics("m")
    one.disconnected()
    assert value(other, "tandem_client_disconnects_total") == 0


def test_the_page_carries_its_content_type() -> None:
    body, content_type = RouterMetrics("m").exposition()
    assert content_type.startswith("text/plain")
    assert b"process_cpu_seconds_total" in body


def test_token_buckets() -> None:
    assert token_buckets(100) == (1, 2, 5, 10, 20, 50, 100)
    assert token_buckets(0) == (1,)
