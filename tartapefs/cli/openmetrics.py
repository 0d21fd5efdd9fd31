"""Reports of mounts as OpenMetrics text, which Prometheus and its node exporter read.

Source: https://prometheus.io/docs/specs/om/open_metrics_spec/
"""

from collections.abc import Callable, Iterator
from typing import Any

Facts = dict[str, Any]

# Name, type, help text, and the value in a report, None where it says nothing of it.
_METRICS: tuple[tuple[str, str, str, Callable[[Facts], int | None]], ...] = (
    ("up", "gauge", "Whether the daemon answers.", lambda facts: not facts["state"].startswith("unknown")),
    ("valid", "gauge", "Whether the folder is as recorded.", lambda facts: facts["state"] == "valid"),
    ("size_bytes", "gauge", "The size of the archive.", lambda facts: facts.get("size")),
    ("delivered_bytes", "counter", "What readers were given.", lambda facts: facts.get("delivered")),
    (
        "covered_bytes",
        "gauge",
        "How much of the archive was delivered at least once.",
        lambda facts: facts.get("covered", facts.get("coverage", {}).get("size")),
    ),
    ("readers", "gauge", "How often the archive is open.", lambda facts: _count(facts.get("readers"))),
    ("held_reads", "gauge", "Reads that wait since the folder differs.", lambda facts: _count(facts.get("held"))),
    ("additions", "gauge", "Names that were added.", lambda facts: facts.get("additions", {}).get("count")),
)


def _count(value: object) -> int | None:
    return len(value) if isinstance(value, list) else value if isinstance(value, int) else None


def _label(value: object) -> str:
    return str(value).replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def openmetrics(reports: list[Facts]) -> str:
    """One family a metric, one sample a mount, with the labels `mountpoint` and `source`."""
    return "\n".join((*_lines(reports), "# EOF"))


def _lines(reports: list[Facts]) -> Iterator[str]:
    for name, kind, text, value_in in _METRICS:
        yield f"# TYPE tartapefs_{name} {kind}"
        yield f"# HELP tartapefs_{name} {text}"
        suffix = "_total" if kind == "counter" else ""
        for facts in reports:
            if (value := value_in(facts)) is not None:
                labels = f'mountpoint="{_label(facts["mountpoint"])}",source="{_label(facts["source"])}"'
                yield f"tartapefs_{name}{suffix}{{{labels}}} {int(value)}"
