"""A run in a process of its own, watched by one that survives what a row does to the engine."""

from batchgen.supervision.line import Assignment, EarlierWork, Worker
from batchgen.supervision.supervisor import supervise

__all__ = ["Assignment", "EarlierWork", "Worker", "supervise"]
