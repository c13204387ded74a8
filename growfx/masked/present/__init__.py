"""Storage of present edges only: values, gradients and optimizer state of a layer as vectors over its mask."""
