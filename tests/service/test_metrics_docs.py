"""docs/metrics.md names what is on the pages, and nothing else but what it says is left out."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from kvtransfer.fences import Refusals
from kvtransfer.ledger.publisher import PublisherCounts
from kvtransfer.ledger.replies import LedgerCounts
from proto.control import Role
from service.metrics import RouterMetrics, WorkerMetrics, show_ledger, show_publisher

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
PRESENT, LEFT_OUT = TEXT.split("## Left out\n")
ABSENT = {
    name
    for row in LEFT_OUT.splitlines()
    if row.startswith("| `")
    for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])
}
OF_ANY_PROCESS = ("process_", "python_gc_")


def router() -> CollectorRegistry:
    page = RouterMetrics("m")
    show_ledger(page, LedgerCounts, lambda: 0)
    return page.registry


def worker(role: Role) -> CollectorRegistry:
    page = WorkerMetrics("m", role, Refusals())
    page.set_cache_config(block_size=16, num_blocks=1, max_concurrency=1.0, prefix_caching=True)
    show_ledger(page, LedgerCounts, lambda: 0)
    show_publisher(page, lambda: PublisherCounts(0, 0, 0, 0))
    return page.registry


def families(registry: CollectorRegistry) -> dict[str, str]:
    """Their kinds, by the names that a page has."""
    return {
        f"{family.name}_total" if family.type == "counter" else family.name: family.type
        for family in registry.collect()
    }


EVERY = families(router()) | families(worker(Role.PREFILL)) | families(worker(Role.DECODE))


def test_every_family_of_every_page_is_named() -> None:
    missing = {name for name in EVERY if not name.startswith(OF_ANY_PROCESS) and not re.search(rf"`{name}`", PRESENT)}
    assert not missing
    for prefix in OF_ANY_PROCESS:
        assert f"`{prefix}*`" in PRESENT


@pytest.mark.parametrize("series", sorted(set(re.findall(r"(?:vllm:|tandem_|http_)[a-z0-9_]+", PRESENT))))
def test_what_is_named_is_there(series: str) -> None:
    family = re.sub(r"_(bucket|sum|count)$", "", series)
    assert series in EVERY or EVERY.get(family) == "histogram"


@pytest.mark.parametrize("name", sorted(ABSENT))
def test_what_is_left_out_is_not_there(name: str) -> None:
    assert not [there for there in EVERY if fnmatchcase(there, name)]


def test_something_is_left_out() -> None:
    assert {"vllm:lora_requests_info", "vllm:nixl_*"} <= ABSENT
