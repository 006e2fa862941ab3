"""How fast a run goes and how much memory it takes, measured on this process."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import torch

GIB = 2.0**30


class Throughput:
    """Turns what optimizer steps processed into rates; the clock starts when this is made.

    Args:
        device: where the model runs; GPU memory is measured only on CUDA.
        clock: seconds, monotonic.
    """

    def __init__(self, device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter) -> None:
        self._device = torch.device(device)
        self._clock = clock
        self._last = clock()
        self._steps, self._tokens, self._people = 0, 0.0, 0.0

    def add(self, tokens: float, people: float) -> None:
        """Count one step.

        Args:
            tokens: real tokens of the step, over all ranks.
            people: people whose answers the step learned from, over all ranks.
        """
        self._steps, self._tokens, self._people = self._steps + 1, self._tokens + tokens, self._people + people

    def row(self) -> dict[str, float]:
        """Rates of the steps since the last row (or since this was made).

        Returns:
            ``seconds`` (of one step, their mean), ``tokens_per_second``, ``people_per_second``, ``memory_gib`` (peak
            resident) and, on CUDA, ``gpu_memory_gib`` (peak allocated).
        """
        now = self._clock()
        seconds = max(now - self._last, 1e-9)
        rates = {
            "seconds": seconds / max(self._steps, 1),
            "tokens_per_second": self._tokens / seconds,
            "people_per_second": self._people / seconds,
        }
        self._last, self._steps, self._tokens, self._people = now, 0, 0.0, 0.0
        return rates | memory(self._device)


def memory(device: torch.device | str = "cpu") -> dict[str, float]:
    """Peak memory of this process in GiB: ``memory_gib`` resident and, on CUDA, ``gpu_memory_gib`` allocated by
    PyTorch.
    """
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    usage = {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    if torch.device(device).type == "cuda":
        usage["gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    return usage
