"""Methods that grow a network from a sparse seed, and the rule that stops them."""
