"""Run a model once and write down every operator."""

from growfx.passes.record.recording import record

__all__ = ["record"]
