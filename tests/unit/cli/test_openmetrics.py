"""Reports as OpenMetrics text, as Prometheus' own parsers read them."""

import prometheus_client.openmetrics.parser as strict
import prometheus_client.parser as textfile
import pytest

from tartapefs.cli.openmetrics import openmetrics

FULL = {
    "mountpoint": "/mnt/tape",
    "source": "/srv/data",
    "state": "valid",
    "size": 1 << 60,
    "delivered": 1500,
    "coverage": {"size": 250, "unsure": 0, "ranges": [[0, 250]]},
    "readers": [{}, {}],
    "held": [{}],
    "additions": {"count": 3, "paths": []},
}
# What extended attributes tell, and what is known of a mount whose daemon hangs.
SHORT = {
    "mountpoint": "/m",
    "source": "s",
    "state": "invalid: a",
    "size": 9,
    "delivered": 0,
    "covered": 4,
    "readers": 0,
}
HANGS = {"mountpoint": '/m"\\ \n', "source": "\\n", "state": "unknown: it hangs"}


@pytest.mark.parametrize("parser", [strict, textfile])
def test_as_parsers_read_it(parser: object) -> None:
    families = parser.text_string_to_metric_families(openmetrics([FULL, SHORT, HANGS]) + "\n")  # type: ignore[attr-defined]
    found = {
        (sample.name.removeprefix("tartapefs_"), sample.labels["mountpoint"], sample.labels["source"]): sample.value
        for family in families
        for sample in family.samples
    }
    hangs = (HANGS["mountpoint"], HANGS["source"])
    assert found == {
        ("up", "/mnt/tape", "/srv/data"): 1,
        ("valid", "/mnt/tape", "/srv/data"): 1,
        ("size_bytes", "/mnt/tape", "/srv/data"): 1 << 60,
        ("delivered_bytes_total", "/mnt/tape", "/srv/data"): 1500,
        ("covered_bytes", "/mnt/tape", "/srv/data"): 250,
        ("readers", "/mnt/tape", "/srv/data"): 2,
        ("held_reads", "/mnt/tape", "/srv/data"): 1,
        ("additions", "/mnt/tape", "/srv/data"): 3,
        ("up", "/m", "s"): 1,
        ("valid", "/m", "s"): 0,
        ("size_bytes", "/m", "s"): 9,
        ("delivered_bytes_total", "/m", "s"): 0,
        ("covered_bytes", "/m", "s"): 4,
        ("readers", "/m", "s"): 0,
        ("up", *hangs): 0,
        ("valid", *hangs): 0,
    }


def test_without_mounts() -> None:
    families = list(strict.text_string_to_metric_families(openmetrics([]) + "\n"))
    assert families and not any(family.samples for family in families)
