"""Where candidates are evaluated, under one contract: see `contract`.

Serial and Together are this process, LocalProcesses supervised ones of this machine, RayActors those of a cluster.
"""

from gpmetric.executors.contract import Executor, Function, Outcome, Unusable
from gpmetric.executors.processes import LocalProcesses
from gpmetric.executors.serial import Serial, Together
from gpmetric.executors.task_clock import OutOfTime, TaskClock

__all__ = [
    "Executor", "Function", "LocalProcesses", "OutOfTime", "Outcome", "Serial", "TaskClock", "Together", "Unusable",
]  # fmt: skip
