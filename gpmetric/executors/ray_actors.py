"""Workers of a Ray cluster: one actor each, on whatever node has room; nodes may leave and join meanwhile.

Ray moves the actors, and says what became of them; it retries nothing by itself, so that who is to blame is known here.
Model and statistics are read by each actor from where the driver has them: a file system that all nodes share.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any

from gpmetric.errors import GpmetricError, InputError
from gpmetric.executors.contract import Function, answer, in_one_line
from gpmetric.executors.supervised import Message, Supervised, Worker
from gpmetric.plain import log_plainly
from gpmetric.provenance import versions

__all__ = ["RayActors", "connect"]

_LOG = logging.getLogger(__name__)
# of a cluster that begins here: nothing is sent anywhere, and workers are what the machine is for
_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_ANSWER_SECONDS = 10.0
_PATIENCE = 15.0  # seconds for a cluster to find room for the first worker, after which it is said what is missing


def connect(address: str) -> Any:
    """The module ray, connected: `auto` joins the cluster of this machine, or begins one on it.

    Raises:
        InputError: Ray is not installed, or there is no cluster at the address.
    """
    os.environ.update({name: value for name, value in _SETTINGS.items() if name not in os.environ})
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs Ray, which is not installed: pip install 'gpmetric[ray]'") from error
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in ("auto", here):
            raise InputError(f"--ray {address}: this process is in the cluster {here}, and can be in one only")
        return ray
    _check_answers(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    try:
        try:
            ray.init(address=address, **quiet)
        except ConnectionError:
            if address != "auto":
                raise
            ray.init(address="local", include_dashboard=False, **quiet)
    except (ConnectionError, ValueError, RuntimeError, AssertionError, OSError) as error:
        told = (
            f"no cluster answers there ({in_one_line(error):.200}); one that asks for a token wants RAY_AUTH_MODE=token"
        )
        raise InputError(f"--ray {address}: {told}") from error
    return ray


def _check_answers(address: str) -> None:
    """Refuses a HOST:PORT where nobody listens, which Ray would take minutes to say."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--ray {address}: nobody answers there ({error})") from error


class RayActors(Supervised):
    """An actor for each worker.

    Args:
        address: of the cluster, as of `connect`.
        factory, arguments: as of `LocalProcesses`.
        workers: actors at most; as many as there is room for in the cluster by default.
        cpus, gpus: what each takes of its node; parts of a GPU are shared.
        supervision: as of `Supervised`.
    """

    def __init__(
        self,
        address: str,
        factory: Callable[..., Function],
        arguments: tuple[Any, ...] = (),
        workers: int | None = None,
        cpus: float = 1.0,
        gpus: float = 0.0,
        **supervision: Any,
    ) -> None:
        self._ray = connect(address)
        room = _room(self._ray, cpus, gpus)
        if not room:
            needed = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
            raise InputError(f"--ray {address}: no node of the cluster has {needed} for a worker")
        super().__init__(workers or room, **supervision)
        self._factory, self._arguments = factory, arguments
        self._actor = self._ray.remote(_Actor).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
        )

    def _start(self, slot: int) -> Worker:
        actor = self._actor.remote()
        return Worker(slot, [actor, actor.place.remote(), None], placed=False)  # the last: its node

    def _send(self, worker: Worker, candidate: Any, smaller: bool) -> bool:
        worker.handle[1] = worker.handle[0].answer.remote(candidate, smaller)
        return True

    def _listen(self, workers: Sequence[Worker], patience: float | None) -> list[tuple[Worker, Message]]:
        waiting = {worker.handle[1]: worker for worker in workers if worker.handle[1] is not None}
        if not waiting:
            return []
        references = list(waiting)
        if patience is None and not any(worker.placed for worker in workers):
            patience = _PATIENCE
        ready, _ = self._ray.wait(references, num_returns=1, timeout=patience)
        if not ready and not any(worker.placed for worker in workers):
            free = {name: amount for name, amount in self._ray.available_resources().items() if name in ("CPU", "GPU")}
            _LOG.warning("waiting for room in the cluster, which has free: %s", free or "nothing")
        if ready:  # and whatever else is
            ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        return [(waiting[one], self._heard(waiting[one], one)) for one in ready]

    def _heard(self, worker: Worker, reference: Any) -> Message:
        exceptions = self._ray.exceptions
        worker.handle[1] = None
        try:
            message: Message = self._ray.get(reference)
        except exceptions.OutOfMemoryError:
            return ("starved", "out of memory")
        except exceptions.ActorUnavailableError:
            return ("gone", "its node does not answer")
        except exceptions.RayActorError as error:
            with_node = "its node has died" in str(error) or not self._is_alive(worker.handle[2])
            return ("gone", "its node was lost") if with_node else ("lost", "its process died")
        except exceptions.RayError as error:
            return ("lost", in_one_line(error)[:200])
        if message[0] == "placed":
            worker.handle[2] = message[1]
            worker.handle[1] = worker.handle[0].start.remote(self._factory, self._arguments, versions())
        return message

    def _is_alive(self, node: str | None) -> bool:
        return node is None or any(one["NodeID"] == node and one["Alive"] for one in self._ray.nodes())

    def _end(self, worker: Worker, patience: float) -> None:
        self._ray.kill(worker.handle[0], no_restart=True)


class _Actor:
    """A worker, in a process of a node."""

    def place(self) -> Message:
        """Which node it is on."""
        import ray

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        log_plainly()
        return ("placed", ray.get_runtime_context().get_node_id())

    def start(self, factory: Callable[..., Function], arguments: tuple[Any, ...], driver: dict[str, str]) -> Message:
        """Makes the function."""
        here = versions()
        if different := [f"{name} {here.get(name)} for {one}" for name, one in driver.items() if here.get(name) != one]:
            told = f"node {platform.node()} has not the driver's versions: {'; '.join(different)}"
            return ("refused", GpmetricError.__name__, told)
        try:
            self._function = factory(*arguments)
        except GpmetricError as refusal:
            return ("refused", type(refusal).__name__, f"on node {platform.node()}: {refusal}")
        except Exception as bug:
            return ("unstarted", in_one_line(bug))
        return ("ready",)

    def answer(self, candidate: Any, smaller: bool) -> Message:
        """What `contract.answer` gives."""
        return answer(self._function, candidate, smaller)


def _room(ray: Any, cpus: float, gpus: float) -> int:
    """Workers that the nodes have room for."""
    count = 0
    for node in ray.nodes():
        if node["Alive"]:
            there = node["Resources"]
            rooms = [there.get(name, 0.0) / one for name, one in (("CPU", cpus), ("GPU", gpus)) if one]
            count += int(min(rooms) + 1e-9) if rooms else 1
    return count
