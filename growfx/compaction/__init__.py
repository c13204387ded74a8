"""The plan by which a network is made smaller, and how it is applied to a model."""
