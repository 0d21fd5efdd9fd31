"""What a benchmark says: results, how they are measured, kept, shown and compared.

Rule: a figure is a list of samples and never one. Where there is a peer a sample is the ratio of two runs, one right
after the other, so that both see the same noise: machines are shared, and a time by itself means little.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tartapefs

_OVERLAP = 0.95  # of all comparisons of an old with a new sample that say "worse", from which on it is no noise
_MATTERS = 1.05  # a median that moved by less is no news


@dataclass(frozen=True, slots=True)
class Result:
    """One row: `samples` in `unit`, whose median should be at least or at most `target`."""

    name: str
    unit: str  # what a sample is: "x the speed of tar", "ms", ...
    samples: tuple[float, ...]
    bound: Literal["at least", "at most"]
    target: float
    note: str = ""  # what the samples were computed from

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        return min(self.samples)

    @property
    def high(self) -> float:
        return max(self.samples)

    @property
    def reached(self) -> bool:
        return self.median >= self.target if self.bound == "at least" else self.median <= self.target

    def reach(self, value: float) -> float:
        """How far `value` is on the way to the target: 1 there, above 1 beyond it."""
        return value / self.target if self.bound == "at least" else self.target / value

    def line(self) -> str:
        """Its row of a Markdown table, in the order of `HEAD`."""
        reached = "yes" if self.reached else "**no**"
        spread = f"{_shown(self.low)} to {_shown(self.high)}" if len(self.samples) > 1 else ""
        target = f"{self.bound} {self.target:,g}"
        return f"| {self.name} | {target} | {_shown(self.median)} {self.unit} | {spread} | {reached} | {self.note} |"


HEAD = "| work | target | median | range | reached | from |\n|---|---|---|---|---|---|"


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def pairs(
    ours: Callable[[], object],
    peer: Callable[[], object],
    rounds: int,
    before: Callable[[], object] = lambda: None,
) -> list[tuple[float, float]]:
    """The seconds that both took, in turn, `before` ahead of each; after a round to warm up, which is dropped."""
    taken = []
    for _ in range(rounds + 1):
        before()
        first = seconds(ours)
        before()
        taken.append((first, seconds(peer)))
    return taken[1:]


def speed(name: str, peer: str, taken: list[tuple[float, float]], target: float) -> Result:
    """How many times the peer's speed."""
    ratios = tuple(theirs / ours for ours, theirs in taken)
    return Result(name, f"x the speed of {peer}", ratios, "at least", target, _medians(taken))


def duration(name: str, peer: str, taken: list[tuple[float, float]], target: float) -> Result:
    """How many times the peer's time."""
    ratios = tuple(ours / theirs for ours, theirs in taken)
    return Result(name, f"x the time of {peer}", ratios, "at most", target, _medians(taken))


def _medians(taken: list[tuple[float, float]]) -> str:
    ours, theirs = (statistics.median(times) for times in zip(*taken, strict=True))
    return f"{ours:.3f} s, {theirs:.3f} s"


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    text = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    return {
        "processor": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "tartapefs": tartapefs.__version__,
        "commit": _commit(),
        "load": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str:
    git = ["git", "-C", os.path.dirname(__file__), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def save(path: Path, results: list[Result]) -> None:
    rows = [asdict(result) | {"median": result.median, "reached": result.reached} for result in results]
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def load(path: Path) -> list[Result]:
    rows = json.loads(path.read_text())["rows"]
    return [
        Result(row["name"], row["unit"], tuple(row["samples"]), row["bound"], row["target"], row["note"])
        for row in rows
    ]


def regressions(old: list[Result], new: list[Result]) -> list[str]:
    """What is worse in `new`, beyond noise, in words: the samples hardly overlap, and the median moved by 5%."""
    found = []
    before = {result.name: result for result in old}
    for result in new:
        was = before.get(result.name)
        if was is None:
            continue
        worse = [result.reach(b) < result.reach(a) for a in was.samples for b in result.samples]
        if sum(worse) >= _OVERLAP * len(worse) and was.reach(was.median) > _MATTERS * was.reach(result.median):
            found.append(
                f"{result.name}: {_shown(result.median)} {result.unit}, was {_shown(was.median)}"
                f" ({_shown(was.low)} to {_shown(was.high)})"
            )
    return found
