"""An offline batch runner for language models."""

__version__ = "0.1.0"
