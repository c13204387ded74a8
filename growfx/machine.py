"""Describe the machine and the library versions that measurements depend on."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from growfx.version import __version__

__all__ = ["machine_facts", "processor", "versions"]


def versions() -> dict[str, str]:
    """Return the versions of Python and the libraries that results depend on."""
    others = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy", "scipy")}
    return {"growfx": __version__, "python": platform.python_version(), **others}


def machine_facts() -> dict[str, Any]:
    """Processor, number of cores, accelerator and system."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    name = str(accelerator) if accelerator is not None else None
    if accelerator is not None and accelerator.type == "cuda":
        name = torch.cuda.get_device_name()
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "accelerator": name,
        "system": f"{platform.system()} {platform.machine()}",
    }


def processor() -> str:
    """The processor's model name, as the system knows it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
