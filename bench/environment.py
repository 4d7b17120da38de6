"""Where a figure was measured: the machine, the versions, the commit, the clocks."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..kernels.evidence import architecture

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, Any]:
    """What a figure means nothing without: the machine, the versions, the commit."""
    now = datetime.datetime.now(datetime.timezone.utc)
    on_gpu = torch.cuda.is_available()
    found: dict[str, Any] = {
        "date": now.date().isoformat(),
        "time": now.time().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "undivided": _version("undivided"),
        "revision": _revision(),
        "gpu": torch.cuda.get_device_name() if on_gpu else "none",
        "architecture": architecture(torch.device("cuda" if on_gpu else "cpu")),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if on_gpu:
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "ptxas": os.environ.get("TRITON_PTXAS_PATH"),
            "clocks": clocks(torch.device("cuda")),
        }
    return found


def clocks(device: torch.device, run: Callable[[], Any] | None = None) -> str | None:
    """SM clock, memory clock, power and temperature while `run` runs, if nvidia-smi is there to say so.

    Without something to do a GPU slows down and saves power within milliseconds, which is not what was timed.
    """
    if device.type != "cuda":
        return None
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={_uuid(device)}"]
    try:
        asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None
    end = time.monotonic() + 10
    with asked:
        while asked.poll() is None and time.monotonic() < end:
            if run is None:
                time.sleep(0.01)
            else:
                run()
                torch.cuda.synchronize(device)
        asked.kill()
        answer = asked.communicate()[0].strip()
    return answer if asked.returncode == 0 else None


def _uuid(device: torch.device) -> str:
    """What nvidia-smi calls a GPU; its numbers are others than PyTorch's under CUDA_VISIBLE_DEVICES."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"GPU-{uuid}" if uuid else str(device.index or 0)


def _answer(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _revision() -> str | None:
    """The commit, where the checkout came with its history."""
    if not (ROOT / ".git").exists():
        return None
    return _answer("git", "-C", str(ROOT), "describe", "--always", "--dirty")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
