"""State of the global random generators: Python's, numpy's, torch's on the CPU and on one accelerator."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["randomness_of", "set_randomness"]


def randomness_of(device: torch.device) -> dict[str, Any]:
    """The state of every global generator, and of the accelerator `device`, as tensors and numbers."""
    version, words, python_normal = random.getstate()
    name, keys, position, has_normal, normal = np.random.get_state()  # noqa: NPY002 - timm's transforms draw from it
    return {
        "python": {"version": version, "words": torch.tensor(words), "normal": python_normal},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_normal": int(has_normal),
            "normal": float(normal),
        },
        "torch": torch.get_rng_state(),
        "device": None if device.type == "cpu" else _on(device, "get_rng_state"),
    }


def set_randomness(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `randomness_of` returned; the accelerator's state only on one of the same type."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["normal"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    legacy = (numpy["name"], keys, numpy["position"], numpy["has_normal"], numpy["normal"])
    np.random.set_state(legacy)  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and state["device"] is not None:
        _on(device, "set_rng_state", state["device"])


def _on(device: torch.device, function: str, *arguments: Any) -> Any:
    # not every accelerator's function takes a device, but all follow the current one
    with torch.accelerator.device_index(device.index):
        return getattr(torch.get_device_module(device), function)(*arguments)
