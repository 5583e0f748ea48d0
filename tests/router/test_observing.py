"""What happens to requests reaches metrics, stage observers and the ledger."""

from __future__ import annotations

import pytest

from kvtransfer.ledger.records import HandoffRecord
from proto.control import Failed, RejectReason
from proto.errors import LocalFault, NoWorker
from proto.ids import Epoch, RequestId
from proto.ids import Generation as Try
from proto.lifecycle import Stage
from proto.request import FinishReason, SamplingParams
from router.attempt import Rules
from router.contract import NewRequest
from router.flow import Flow
from router.observing import RouterListener, RouterPage, summary_of
from router.openai.generation import Generation
from router.policy import Weights
from service.metrics import RouterMetrics
from tests.support.fleet import House, token
from tests.support.http import served_model


class Ledger:
    def __init__(self) -> None:
        self.records: list[HandoffRecord] = []

    def advance(self, record: HandoffRecord) -> None:
        self.records.append(record)


class Stages:
    def __init__(self) -> None:
        self.seen: list[tuple[Stage, float]] = []

    def entered(self, request: RequestId, stage: Stage, at: float) -> None:
        self.seen.append((stage, at))


class Watched(House):
    """A house whose flow reports to real metrics."""

    def __init__(self, *names: str) -> None:
        super().__init__(*names)
        self.metrics, self.stages, self.ledger = RouterMetrics("tiny"), Stages(), Ledger()
        listener = RouterListener(self.metrics, self.stages, self.ledger)
        self.flow = Flow(
            self.fleet, self.index, self.admission, Rules(), Weights(disagg_threshold=0), listener, self.timers
        )

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels or None)


async def test_a_request_leaves_its_numbers() -> None:
    house = Watched("p1", "d1")
    stream = await house.start(max_tokens=3)
    house.timers.advance(2.0)
    house.says("p1", token(stream.id, 0))
    house.reports("d1", stream.id, Stage.ADOPTED, num_bytes=4096)
    house.timers.advance(0.5)
    house.says("d1", token(stream.id, 0), token(stream.id, 1), token(stream.id, 2, last=True))

    model = {"model_name": "tiny"}
    assert house.value("vllm:time_to_first_token_seconds_sum", **model) == 2.0
    assert house.value("vllm:inter_token_latency_seconds_sum", **model) == 0.5
    assert house.value("vllm:inter_token_latency_seconds_count", **model) == 2
    assert house.value("vllm:generation_tokens_total", **model) == 3
    assert house.value("tandem_requests_total", finish="length") == 1
    assert house.value("tandem_duplicate_tokens_total") == 1
    assert house.value("tandem_routed_total", target="prefill") == 1
    assert house.value("tandem_request_kv_transfer_bytes_sum") == 4096
    assert house.value("tandem_stage_seconds_sum", stage="routed") == 2.0

    assert house.stages.seen[0] == (Stage.RECEIVED, 100.0)
    assert [stage for stage, _ in house.stages.seen][-2:] == [Stage.DECODING, Stage.FINISHED]
    last = house.ledger.records[-1]
    assert (last.stage, last.generation) == (Stage.FINISHED, 1)
    orders = [record.order for record in house.ledger.records]
    assert orders == sorted(orders)


async def test_a_prompt_s_computation_is_from_its_first_chunk_to_the_end() -> None:
    house = Watched("p1", "d1")
    stream = await house.start(max_tokens=3)
    waited, computed, handed_over, decoded = 8.0, 4.0, 2.0, 1.0
    house.reports("p1", stream.id, Stage.QUEUED)
    house.timers.advance(waited)
    house.reports("p1", stream.id, Stage.PREFILLING)
    house.timers.advance(computed)
    house.reports("p1", stream.id, Stage.SEALED, num_cached=1)
    house.says("p1", token(stream.id, 0))
    house.timers.advance(handed_over)
    house.reports("d1", stream.id, Stage.ADOPTED, num_bytes=4096)
    house.reports("d1", stream.id, Stage.DECODING)
    house.timers.advance(decoded)
    house.says("d1", token(stream.id, 1), token(stream.id, 2, last=True))

    model = {"model_name": "tiny"}
    assert house.value("vllm:request_queue_time_seconds_sum", **model) == waited
    assert house.value("vllm:request_inference_time_seconds_sum", **model) == computed + handed_over + decoded
    assert house.value("vllm:request_params_max_tokens_sum", **model) == 3
    assert house.value("vllm:request_max_num_generation_tokens_sum", **model) == 3
    prompt = house.value("vllm:request_prompt_tokens_sum", **model)
    assert prompt is not None
    assert house.value("vllm:request_prefill_kv_computed_tokens_sum", **model) == prompt - 1


async def test_the_ledger_sees_every_try() -> None:
    house = Watched("p1", "d1", "d2")
    stream = await house.start()
    house.rejects("p1", stream.id, RejectReason.REFUSED, held=True)
    routed = [record for record in house.ledger.records if record.stage is Stage.ROUTED]
    assert [record.generation for record in routed] == [1, 2]
    assert {record.decode_epoch for record in routed} == {"epoch-d1", "epoch-d2"}
    assert {record.prefill_epoch for record in routed} == {"epoch-p1"}
    assert house.value("tandem_recoveries_total", remedy="redirect") == 1
    await stream.aclose()
    assert house.value("tandem_client_disconnects_total") == 1
    assert house.value("tandem_requests_total", finish="abort") == 1


async def test_prompts_that_fail_together_are_failures_and_no_disconnects() -> None:
    house = Watched("p1", "d1")
    model = served_model()
    requests = [NewRequest(prompt=(at, 7), params=SamplingParams(max_tokens=9)) for at in (5, 6)]
    generation = await Generation.start(house.flow, model, requests)
    first = house.last_attach()[1].request.id
    house.flow.message_came(Epoch("epoch-p1"), Failed(first, Try(1), 500, "x", "broken"))
    with pytest.raises(LocalFault, match="broken"):
        await generation.collect()
    await generation.aclose()
    assert not house.value("tandem_client_disconnects_total")
    assert house.value("tandem_requests_total", finish="error") == 2
    assert not house.value("tandem_requests_total", finish="abort")
    assert house.aborts_to("p1")


async def test_requests_that_never_began_are_counted_by_reason() -> None:
    house = Watched()
    with pytest.raises(NoWorker):
        await house.start()
    assert house.value("tandem_rejected_total", reason=NoWorker.kind) == 1


async def test_a_summary_names_how_it_ended() -> None:
    house = House("p1", "d1")
    stopped, failed = await house.start(n=2), await house.start()
    house.says("p1", token(stopped.id, 0, last=True))
    stopped.stop_choice(1)
    house.timers.advance(1_000.0)
    first, second = (summary_of(end) for end in house.heard.ends)
    assert (first.finish, first.num_choices, first.num_generated, first.num_longest) == (FinishReason.STOP, 2, 1, 1)
    assert (second.finish, second.decode_s, second.inference_s) == (FinishReason.ERROR, None, None)
    assert failed.id != stopped.id


def test_gauges_are_fresh_when_they_are_read() -> None:
    metrics = RouterMetrics()
    page = RouterPage(metrics, lambda: metrics.set_inflight(7))
    page.http_request("/v1/models", "GET", 200, 0.1)
    page.stage("template", 0.2)
    body, content_type = page.exposition()
    assert b"tandem_inflight_requests 7.0" in body
    assert b'tandem_stage_seconds_count{stage="template"} 1.0' in body
    assert content_type.startswith("text/plain")
