"""Counting, and what a scrape makes of it."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shared.telemetry import metrics as module
from shared.telemetry.calls import server_durations
from shared.telemetry.exposition import Exposition, merged
from shared.telemetry.metrics import OTHER, Metrics


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by its name and labels, as Prometheus' own parser reads them."""
    families = text_string_to_metric_families(text.decode())
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in families
        for one in family.samples
    }


def test_a_counter_tells_what_was_added_under_its_labels():
    metrics = Metrics()
    metrics.counter("doors_total", "Doors.", "colour").of('"red"\n').value += 2
    told = samples(Exposition(metrics).text())
    assert told["doors_total", (("colour", '"red"\n'),)] == 2


def test_a_histogram_counts_a_value_in_every_bucket_that_holds_it():
    metrics = Metrics()
    waits = metrics.histogram("wait_seconds", "Waits.", bounds=(1.0, 2.0)).of()
    for value in (0.5, 1.0, 1.5, 9.0):
        waits.observe(value)
    told = samples(Exposition(metrics).text())
    buckets = [told["wait_seconds_bucket", (("le", le),)] for le in ("1.0", "2.0", "+Inf")]
    assert buckets == [2, 3, 4]
    assert (told["wait_seconds_count", ()], told["wait_seconds_sum", ()]) == (4, 12.0)


def test_what_is_watched_is_asked_at_each_scrape():
    metrics, guests = Metrics(), [1, 2]
    metrics.watch(metrics.gauge("guests", "Guests."), lambda: len(guests))
    exposition = Exposition(metrics)
    assert samples(exposition.text())["guests", ()] == 2
    guests.clear()
    assert samples(exposition.text())["guests", ()] == 0


def test_callers_cannot_make_a_family_grow_for_ever(monkeypatch):
    monkeypatch.setattr(module, "CHILDREN_MAX", 3)
    family = Metrics().counter("reasons_total", "Reasons.", "reason")
    for number in range(10):
        family.of(str(number)).value += 1
    assert [(values, child.value) for values, child in family.children.items()] == [
        (("0",), 1),
        (("1",), 1),
        (("2",), 1),
        ((OTHER,), 7),
    ]


def test_a_name_that_is_asked_for_again_is_the_same_family():
    metrics = Metrics()
    assert metrics.counter("a_total", "A.", "x") is metrics.counter("a_total", "A.", "x")


@pytest.mark.parametrize(
    ("name", "labels"),
    [("a", ()), ("A_total", ()), ("known_total", ()), ("known_total", ("y",))],
    ids=["no _total", "capital", "fewer labels", "other labels"],
)
def test_a_name_that_would_confuse_is_refused(name, labels):
    metrics = Metrics()
    metrics.counter("known_total", "Known.", "x")
    with pytest.raises(ValueError, match=name):
        metrics.counter(name, "Text.", *labels)


def test_a_child_has_a_value_for_each_label():
    with pytest.raises(ValueError, match="has the labels"):
        Metrics().counter("a_total", "A.", "x").of("1", "2")


def test_a_process_tells_what_the_system_knows_of_it():
    told = samples(Exposition(Metrics(), {"worker": "1"}).text())
    assert told["process_resident_memory_bytes", (("worker", "1"),)] > 1_000_000
    assert told["process_cpu_seconds_total", (("worker", "1"),)] > 0


def test_the_texts_of_several_workers_are_one_with_each_family_once():
    texts = []
    for worker in ("0", "1"):
        metrics = Metrics()
        metrics.counter("doors_total", "Doors.").of().value = int(worker) + 1
        metrics.histogram("wait_seconds", "Waits.").of().observe(1)
        texts.append(Exposition(metrics, {"worker": worker}).text())
    text = merged(texts)
    assert text.count(b"# TYPE doors_total counter\n") == 1
    told = samples(text)
    assert [told["doors_total", (("worker", worker),)] for worker in "01"] == [1, 2]
    assert len(told) == sum(len(samples(each)) for each in texts)


def test_durations_are_kept_only_where_somebody_can_read_them():
    assert server_durations(Metrics()) is None
    metrics = Metrics(is_served=True)
    durations = server_durations(metrics)
    assert durations is not None
    durations.note("/a.b.C/Do", "OK", 0)
    labels = {"rpc_service": "a.b.C", "rpc_method": "Do", "rpc_grpc_status_code": "OK"}
    told = samples(Exposition(metrics).text())
    assert told["rpc_server_duration_seconds_count", tuple(sorted(labels.items()))] == 1
