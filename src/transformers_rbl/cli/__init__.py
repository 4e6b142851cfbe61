"""`rbl`, the command line: build, inspect and convert codebooks; evaluate and calibrate pruned models."""

from .app import app


__all__ = ["app"]
