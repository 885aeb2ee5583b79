"""Numbers that a process counts, at the price of a plain addition.

No lock and no library: the loop's thread adds, and a scrape reads from another one, which may see
a histogram whose sum is one observation ahead of its buckets. `shared.telemetry.exposition` writes
them down for Prometheus.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

# Whatever callers send, a family grows no further; what comes later is counted as "other".
CHILDREN_MAX = 4096
OTHER = "other"
# From a cache hit on loopback to the longest deadline of a unary call (s).
DURATION_BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip

_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Number:
    """One counter or gauge; a counter's value is only ever added to."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0


class Histogram:
    """How often values fell between bounds.

    Attributes:
        bounds: ascending; a value equal to a bound belongs below it.
        counts: one per bound, and one for all that is greater.
        total: the sum of all values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


Child = TypeVar("Child", Number, Histogram)


class Family(Generic[Child]):
    """One metric: a child for each set of label values. Made by `Metrics`."""

    def __init__(
        self, name: str, text: str, kind: str, labels: Sequence[str], make: Callable[[], Child]
    ) -> None:
        self.name = name
        self.text = text
        self.kind = kind
        self.labels = tuple(labels)
        self.children: dict[tuple[str, ...], Child] = {}
        self._make: Callable[[], Child] = make

    def of(self, *values: str) -> Child:
        """The child of these label values, made at its first use: keep it.

        Args:
            values: one for each label, in the order of the labels; never an id or a path.

        Raises:
            ValueError: there are more or fewer than labels.
        """
        child = self.children.get(values)
        if child is not None:
            return child
        if len(values) != len(self.labels):
            raise ValueError(f"{self.name} has the labels {self.labels}, not {values}")
        if len(self.children) >= CHILDREN_MAX:
            values = (OTHER,) * len(self.labels)
        return self.children.setdefault(values, self._make())


class Metrics:
    """The families of one process; a name that is asked for again is the same family.

    Args:
        is_served: whether anybody can read them; what costs more than an addition is left out
            where nobody can.
    """

    def __init__(self, *, is_served: bool = False) -> None:
        self.is_served = is_served
        self._families: dict[str, Family[Number] | Family[Histogram]] = {}
        self._watched: list[tuple[Family[Number], tuple[str, ...], Callable[[], float]]] = []

    def counter(self, name: str, text: str, *labels: str) -> Family[Number]:
        """What only grows.

        Args:
            name: in base units, ending in "_total".
            text: one sentence: what is counted.
            labels: names of labels whose values are few and known.

        Raises:
            ValueError: it is no name of a counter, or another family has it.
        """
        if not name.endswith("_total"):
            raise ValueError(f"{name}: the name of a counter ends in _total")
        return self._numbers(name, text, "counter", labels)

    def gauge(self, name: str, text: str, *labels: str) -> Family[Number]:
        """What goes up and down; see counter."""
        return self._numbers(name, text, "gauge", labels)

    def watch(self, family: Family[Number], read: Callable[[], float], *values: str) -> None:
        """Ask for a number at each scrape, from the scrape's thread.

        Args:
            family: a counter or gauge.
            read: gives the child's value; quick, and safe beside the loop's thread.
            values: the child's label values.
        """
        family.of(*values)
        self._watched.append((family, values, read))

    def histogram(
        self, name: str, text: str, *labels: str, bounds: Sequence[float] = DURATION_BOUNDS_S
    ) -> Family[Histogram]:
        """What is distributed, usually durations; see counter.

        Args:
            name: in base units: "_seconds", "_bytes".
            text: one sentence.
            labels: as a counter's.
            bounds: ascending.
        """
        family = Family(name, text, "histogram", labels, lambda: Histogram(bounds))
        return self._known(family)

    def families(self) -> list[Family[Number] | Family[Histogram]]:
        """All of them by name, after what is watched was asked."""
        for family, values, read in self._watched:
            family.of(*values).value = read()
        return [self._families[name] for name in sorted(self._families)]

    def _numbers(self, name: str, text: str, kind: str, labels: Sequence[str]) -> Family[Number]:
        return self._known(Family(name, text, kind, labels, Number))

    def _known(self, family: Family[Child]) -> Family[Child]:
        if not _NAME.fullmatch(family.name):
            raise ValueError(f"{family.name!r} is no name of a metric")
        known = self._families.setdefault(family.name, family)
        if (known.kind, known.labels) != (family.kind, family.labels):
            raise ValueError(f"{family.name} is a {known.kind} with the labels {known.labels}")
        return known  # type: ignore[return-value]  # of the same kind, so of the same children
