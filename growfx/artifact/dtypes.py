"""Map dtype names of the artifact (those of safetensors) to torch dtypes."""

import torch

from growfx.artifact.manifest import ITEMSIZES

__all__ = ["DTYPE_NAMES", "TORCH_DTYPES"]

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C128": torch.complex128,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

assert TORCH_DTYPES.keys() == ITEMSIZES.keys()
