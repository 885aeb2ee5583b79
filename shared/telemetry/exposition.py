"""Metrics as text for Prometheus."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import cast

from prometheus_client import GCCollector, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from shared.telemetry.metrics import Family, Histogram, Metrics, Number


class Exposition(Collector):
    """All that one process tells: its families, and what the system knows of it.

    Args:
        metrics: what the process counts.
        labels: added to every sample, such as which worker of several this is.
    """

    def __init__(self, metrics: Metrics, labels: Mapping[str, str] | None = None) -> None:
        self._metrics = metrics
        self._labels = dict(labels or {})
        # A registry of their own: the library's is one per process, and tests have several edges.
        self._own = ProcessCollector(registry=None), GCCollector(CollectorRegistry())

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client's Collector."""
        for family in self._metrics.families():
            yield _metric(family, self._labels)
        for collector in self._own:
            for metric in collector.collect():
                yield _labelled(metric, self._labels)

    def text(self) -> bytes:
        """The text format, version 0.0.4."""
        return generate_latest(self)

    async def render(self) -> bytes:
        """See text; beside the loop, since many routes make many lines."""
        return await asyncio.to_thread(self.text)


def merged(texts: Iterable[bytes]) -> bytes:
    """Several processes' texts as one: the format wants each family in one place.

    Args:
        texts: from `Exposition.text`, each with a label that tells it from the others.
    """
    blocks: OrderedDict[bytes, list[bytes]] = OrderedDict()
    for text in texts:
        block: list[bytes] = []
        for line in text.splitlines(keepends=True):
            if line.startswith(b"# HELP "):
                block = blocks.setdefault(line.split(b" ", 3)[2], [])
            if not line.startswith(b"#") or len(block) < 2:  # HELP and TYPE once
                block.append(line)
    return b"".join(line for block in blocks.values() for line in block)


def _metric(family: Family[Number] | Family[Histogram], extra: Mapping[str, str]) -> Metric:
    metric = Metric(family.name.removesuffix("_total"), family.text, family.kind)
    children = cast("dict[tuple[str, ...], Number | Histogram]", family.children)
    for values, child in list(children.items()):  # the loop's thread may add one
        labels = {**extra, **dict(zip(family.labels, values, strict=True))}
        if isinstance(child, Number):
            metric.add_sample(family.name, labels, child.value)
        else:
            _add_histogram(metric, labels, child)
    return metric


def _add_histogram(metric: Metric, labels: Mapping[str, str], child: Histogram) -> None:
    counts = list(accumulate(child.counts))
    bounds = [*map(str, child.bounds), "+Inf"]
    for bound, count in zip(bounds, counts, strict=True):
        metric.add_sample(f"{metric.name}_bucket", {**labels, "le": bound}, count)
    metric.add_sample(f"{metric.name}_sum", dict(labels), child.total)
    metric.add_sample(f"{metric.name}_count", dict(labels), counts[-1])


def _labelled(metric: Metric, extra: Mapping[str, str]) -> Metric:
    metric.samples = [
        sample._replace(labels={**sample.labels, **extra}) for sample in metric.samples
    ]
    return metric
