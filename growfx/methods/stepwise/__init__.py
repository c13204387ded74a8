"""Methods that work step by step in any training loop."""
