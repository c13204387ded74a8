"""Counter-based random numbers: one uniform number for each (seed, stream, layer, flat index of the edge).

The generator is counter-based (Philox 4x64, Salmon et al., SC 2011): a layer's stream is keyed by its name
and *advanced* to an edge's index. A draw therefore does not depend on the order of the layers, on the device,
on how a layer is cut into chunks, or on the number of processes.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

__all__ = ["EdgeKeys"]

_WORDS_PER_COUNT = 4  # one Philox counter value yields four 64-bit words
_HALF_STEP = 2.0**-54  # numpy's doubles are multiples of 2^-53, zero among them


@dataclass(frozen=True)
class EdgeKeys:
    """The uniform numbers of one draw.

    `stream` tells draws of one seed apart (e.g. `"seed mask"`, `"growth round 3"`).
    """

    seed: int
    stream: str

    def generator(self, layer: str, start: int = 0) -> np.random.Generator:
        """Return a generator whose next double belongs to edge `start` (flat index) of `layer`."""
        if start < 0:
            raise ValueError(f"expected a flat index `start`, got {start}")
        digest = hashlib.sha256(f"{int(self.seed)}\0{self.stream}\0{layer}".encode()).digest()
        philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
        philox.advance(start // _WORDS_PER_COUNT)
        generator = np.random.Generator(philox)
        generator.random(start % _WORDS_PER_COUNT)
        return generator

    def uniform(self, layer: str, start: int, count: int) -> np.ndarray:
        """Return float64 numbers in the open interval (0, 1) for edges `start` .. `start + count - 1`."""
        values = self.generator(layer, start).random(count)
        values += _HALF_STEP
        # 1 - 2^-53 + 2^-54 rounds up to 1.0, whose exponential variate would be infinite
        return np.minimum(values, 1.0 - 2.0**-53, out=values)
