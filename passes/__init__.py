"""Graph transformations and analyses, one a file, each a plain function named after what it does.

`PASSES` lists them in the order a model travels: the file, and the function in it to call.
"""

from typing import Final

__all__ = ["PASSES"]

PASSES: Final = {
    "record": "record",
    "free_batch": "free_batch",
    "check_recording": "record_checked",
    "mask": "wrap",
    "list_unmasked": "list_unmasked",
    "path_products": "path_products",
    "connect": "connect",
    "seed": "seed_masks",
    "walks": "walk_masks",
    "fold_norm": "fold_norm",
    "compact": "compact",
    "plan_channels": "plan_channels",
    "lower": "lower",
}
