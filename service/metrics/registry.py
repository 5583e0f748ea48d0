"""One process's registry, and the bucket lists. Knows no family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, GCCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

# fmt: off
TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)
PER_TOKEN = (
    0.001, 0.0025, 0.005,  # below vLLM's first, 10 ms: small models are faster than that
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
REQUEST = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)
STAGE = (
    0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)
# fmt: on
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
BYTES = tuple(float(1 << power) for power in range(12, 35, 2))


def token_buckets(longest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to ``longest``."""
    steps = (mantissa * 10**exponent for exponent in range(12) for mantissa in (1, 2, 5))
    return tuple(step for step in steps if step <= max(1, longest))


class MetricsPage:
    """A registry of its own, with the process's figures, and how it reads in Prometheus' text format."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def show_total(self, name: str, text: str, read: Callable[[], int]) -> None:
        """A counter that is kept elsewhere, and read whenever the page is."""
        self.registry.register(_KeptElsewhere(name, text, (), lambda: {(): read()}))

    def show_totals(self, name: str, text: str, label: str, read: Callable[[], Mapping[str, int]]) -> None:
        """``show_total`` for a family: ``read`` says the total of each value of ``label``."""
        by_value = _KeptElsewhere(name, text, (label,), lambda: {(value,): total for value, total in read().items()})
        self.registry.register(by_value)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def exposition(self) -> tuple[bytes, str]:
        """The page and its content type."""
        return self.render(), CONTENT_TYPE_LATEST


class _KeptElsewhere(Collector):
    """``read`` gives the totals, by the labels' values."""

    def __init__(
        self, name: str, text: str, labels: tuple[str, ...], read: Callable[[], Mapping[tuple[str, ...], int]]
    ) -> None:
        self._name = name
        self._text = text
        self._labels = labels
        self._read = read

    def describe(self) -> Iterator[CounterMetricFamily]:
        yield self._family()

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = self._family()
        for values, total in self._read().items():
            family.add_metric(values, total)
        yield family

    def _family(self) -> CounterMetricFamily:
        return CounterMetricFamily(self._name, self._text, labels=self._labels)
