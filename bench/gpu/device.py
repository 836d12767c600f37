"""Where the parts run and how calls are timed there: a GPU, or this CPU on small sizes, for tests of every part."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.timer import median_seconds

Call = Callable[[], object]
_L2_BYTES = 256 << 20  # written between two calls, it leaves nothing of their data in any L2
_SMI_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu",
)  # fmt: skip


def looped(call: Call, count: int) -> Call:
    def calls() -> None:
        for _ in range(count):
            call()

    return calls


class Device(ABC):
    """small: sizes that a CPU manages in seconds."""

    name: str
    small: bool

    @abstractmethod
    def seconds(self, calls: Mapping[Any, Call], *, cold: bool = False) -> dict[Any, float]:
        """Median time of each call; they take turns. cold: none finds its data in the cache."""

    @abstractmethod
    def repeated(self, call: Call, count: int) -> tuple[Call, bool]:
        """`count` calls in one, and whether they go as a graph, without the host's part."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """The device as it is now, its clocks among them."""


class Cuda(Device):
    name, small = "cuda", False

    def __init__(self, budget: float = 0.5) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("bench.gpu: torch sees no GPU; --device cpu goes through the parts on small sizes")
        self._budget = budget  # seconds for each call
        self._flush = torch.empty(_L2_BYTES, dtype=torch.uint8, device="cuda")

    def seconds(self, calls: Mapping[Any, Call], *, cold: bool = False) -> dict[Any, float]:
        once = {}
        for name, call in calls.items():
            for _ in range(3):  # compiles, loads modules, fills the allocator
                call()
            once[name] = self._timed(call)
        rounds = max(10, min(200, int(self._budget / max(once.values(), default=1.0))))
        events: dict[Any, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                if cold:
                    self._flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize()
        return {
            name: statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3
            for name, pairs in events.items()
        }

    def _timed(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return max(start.elapsed_time(end) / 1e3, 1e-6)

    def repeated(self, call: Call, count: int) -> tuple[Call, bool]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for _ in range(count):
                    call()
        except RuntimeError:  # what waits for the device, or allocates, cannot be captured
            torch.cuda.synchronize()
            return looped(call, count), False
        return graph.replay, True

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(0)
        facts = {
            "gpu": properties.name, "multiprocessors": properties.multi_processor_count,
            "memory_gbytes": properties.total_memory / 1e9, "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
        smi = shutil.which("nvidia-smi")
        if smi is not None:
            query = [smi, f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
            answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
            facts.update(zip(_SMI_FIELDS, (part.strip() for part in answer.split(",")), strict=False))
        return facts


class Cpu(Device):
    name, small = "cpu", True

    def __init__(self, clock: Callable[[Mapping[Any, Call]], dict[Any, float]] | None = None) -> None:
        self._clock = clock or (lambda calls: median_seconds(calls, 0.01, least=1))

    def seconds(self, calls: Mapping[Any, Call], *, cold: bool = False) -> dict[Any, float]:
        return self._clock(calls)

    def repeated(self, call: Call, count: int) -> tuple[Call, bool]:
        return looped(call, count), False

    def facts(self) -> dict[str, Any]:
        return {"gpu": "none"}
