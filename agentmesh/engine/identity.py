"""What KV depends on besides a model: the machine, device and libraries that compute it."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import torch
import transformers

from agentmesh.engine.composition import AT_ONCE
from agentmesh.engine.loading import LoadedModel
from agentmesh.engine.recorded import RecordedStep

CPU_FACTS = Path("/proc/cpuinfo")


def identity(loaded: LoadedModel) -> str:
    """The model's fingerprint with all that decides the last bit of its KV.

    That is device, threads, instruction set, versions, how tokens are divided among forwards, and which of these are
    replayed. KV that one machine has stored is exact on another one of the same identity only.
    """
    device = loaded.model.device
    facts = (
        loaded.fingerprint,
        torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        str(torch.get_num_threads()),
        f"even forwards of {AT_ONCE[device.type]}",
        str(loaded.step.sizes if isinstance(loaded.step, RecordedStep) else ()),
        torch.backends.cpu.get_cpu_capability(),
        torch.__version__,
        transformers.__version__,
    )
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _processor() -> str:
    """The processor's name, where the system tells it."""
    lines = CPU_FACTS.read_text(errors="replace").splitlines() if CPU_FACTS.is_file() else []
    named = [line for line in lines if line.startswith("model name")]
    return named[0] if named else f"{platform.machine()} {platform.processor()}"
