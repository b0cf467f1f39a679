"""What a benchmark's figures were measured under, and the ratio of two sides that took turns.

In: the packages that matter, a seed. Out: lines for the benchmark's output. Not covered: the measurements.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path


def describe_conditions(packages: Sequence[str], seed: int) -> str:
    """Machine, load average (1, 5 and 15 minutes), versions and seed, in one line."""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    cores = len(os.sched_getaffinity(0))
    machine = f"{_cpu_name()}, {cores} cores, load {describe_load()}"
    return f"{machine}; Python {platform.python_version()}, {versions}; seed {seed}"


def describe_load() -> str:
    """Load average over 1, 5 and 15 minutes."""
    return " ".join(f"{load:.1f}" for load in os.getloadavg())


def describe_ratio(name: str, ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Median and range of `ours` ÷ `theirs`, round by round."""
    ratios = [mine / peer for mine, peer in zip(ours, theirs, strict=True)]
    return f"{name}: median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
