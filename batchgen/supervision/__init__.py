"""A run in a process of its own, watched by one that survives what a row does to the engine."""

from batchgen.supervision.line import Assignment, Worker
from batchgen.supervision.supervisor import supervise

__all__ = ["Assignment", "Worker", "supervise"]
