"""Build models by name, and find the name of a model."""

from growfx.models.build import ModelIdentity, create_model

__all__ = ["ModelIdentity", "create_model"]
