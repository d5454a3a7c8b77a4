"""Run shards on a Ray cluster: actors that each hold a teacher take one shard after the other; what a lost one had goes elsewhere.

A shard is committed put-if-absent and named by content, so one that was done twice (an actor that only seemed lost) is one shard.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import chdir, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import pipelines
from teacher_cache import stopping
from teacher_cache.errors import KdcliError

MakeTask = Callable[[int], Callable[[int], Any]]
START = -1
"""In a shard's place: the actor is building its task."""


@dataclass(frozen=True)
class Cluster:
    """Where actors run.

    Attributes:
        address: of a running cluster (``auto``, ``ray://…``); None: ``RAY_ADDRESS``, else one on this machine for the run.
        gpus: of one actor; None: one where the cluster has any. cpus: of one actor.
        retries: how often a shard goes elsewhere after its actor was lost.
    """

    address: str | None = None
    gpus: float | None = None
    cpus: float = 1.0
    retries: int = 3


class RayWorker:
    """The actor.

    Args:
        folder: of the command, where relative paths begin; those in a task do when it is unpickled.
    """

    def __init__(self, folder: str):
        with suppress(OSError):  # another machine may not have it
            os.chdir(folder)

    def start(self, make_task: MakeTask, number: int, threads: int) -> None:
        """Build the task, which loads the teacher. No part of ``__init__``, whose errors Ray tells as the death of the actor."""
        if not torch.cuda.is_available():
            torch.set_num_threads(threads)
        self._task = make_task(number)

    def run(self, shard: int) -> Any:
        return self._task(shard)


@dataclass
class Pool:
    """Actors of one run, ``size`` of them. One that the cluster has no room for (a node is gone, or to come) keeps no shard waiting."""

    ray: Any
    actor: Any
    make_task: Any
    size: int
    threads: int
    folder: str = field(default_factory=os.getcwd)
    starting: dict[Any, Any] = field(default_factory=dict)
    idle: list[Any] = field(default_factory=list)
    running: dict[Any, tuple[Any, int]] = field(default_factory=dict)
    made: int = 0

    def fill(self) -> None:
        """Ask for actors in place of those that are lost."""
        while len(self.starting) + len(self.idle) + len(self.running) < self.size:
            worker = self.actor.remote(self.folder)
            self.starting[worker.start.remote(self.make_task, self.made, self.threads)] = worker
            self.made += 1

    def give(self, shard: int) -> None:
        worker = self.idle.pop()
        self.running[worker.run.remote(shard)] = (worker, shard)

    def wait(self) -> Any:
        """The next of ``starting`` or ``running`` that is done. Ray would take an exception that a signal raises for a death of its own."""
        done: list[Any] = []
        while not done:
            stopping.check()
            done, _ = self.ray.wait([*self.running, *self.starting], num_returns=1, timeout=1.0)
        return done[0]

    def drop(self, worker: Any) -> None:
        """It is lost, or seems so: it must not go on beside the one that takes its place."""
        with suppress(Exception):
            self.ray.kill(worker)

    def close(self) -> None:
        for worker in [*self.idle, *self.starting.values(), *(worker for worker, _ in self.running.values())]:
            self.drop(worker)


def import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise KdcliError("--executor ray needs Ray: pip install 'kdcli[ray]'") from None
    return ray


def run(make_task: MakeTask, shards: Sequence[int], workers: int, cluster: Cluster) -> Generator[Any, None, None]:
    """Results of ``task(shard)`` as they end. An error of a task's own stops the job; a lost actor's shard is tried elsewhere.

    Args:
        make_task: pickled to every actor. workers: actors; 0: as many as the cluster has GPUs, else CPUs for.
    """
    with stopping.held():
        yield from _run(import_ray(), make_task, shards, workers, cluster)


def _run(
    ray: Any, make_task: MakeTask, shards: Sequence[int], workers: int, cluster: Cluster
) -> Generator[Any, None, None]:
    started = not ray.is_initialized()
    if started:
        connect(ray, cluster)
    try:
        gpus = cluster.gpus if cluster.gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
        size = min(workers or places(ray, cluster, gpus), len(shards))
        actor = ray.remote(num_gpus=gpus, num_cpus=cluster.cpus, max_restarts=0)(RayWorker)
        threads = max(1, int(cluster.cpus))
        pool = Pool(ray, actor, ray.put(make_task), size, threads)
        yield from shards_of(pool, shards, cluster.retries)
    finally:
        if started:
            ray.shutdown()


def connect(ray: Any, cluster: Cluster) -> None:
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    try:
        if address and (place := address.removeprefix("ray://").rpartition(":"))[2].isdecimal():
            socket.create_connection((place[0], int(place[2])), timeout=10).close()  # Ray itself would wait for minutes
        handlers = {number: signal.getsignal(number) for number in stopping.SIGNALS}
        # Ray has its workers import from the folder in which it was asked first: a user's own pipelines/ would be taken for ours.
        with chdir(Path(pipelines.__file__).parents[1]):
            # Without an address Ray would join whatever cluster ran here last.
            ray.init(address=address or "local", log_to_driver=False, include_dashboard=None if address else False)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray has one of its own
                signal.signal(number, handler)
    except (OSError, ValueError, RuntimeError) as error:
        raise KdcliError(f"no Ray cluster at {address or 'this machine'}: {str(error).splitlines()[0]}") from None


def places(ray: Any, cluster: Cluster, gpus: float) -> int:
    """How many actors the cluster has room for now."""
    has = ray.cluster_resources()
    room = [has.get("CPU", 1) // cluster.cpus, *([has.get("GPU", 0) // gpus] if gpus else [])]
    if min(room) < 1:
        raise KdcliError(
            f"the Ray cluster has {has.get('GPU', 0):g} GPUs and {has.get('CPU', 0):g} CPUs, too few for one worker of "
            f"{gpus:g} and {cluster.cpus:g}"
        )
    return int(min(room))


def shards_of(pool: Pool, shards: Sequence[int], retries: int) -> Iterator[Any]:
    """One shard an actor at a time, in the order given; those of lost actors first."""
    from ray.exceptions import RayActorError, RayTaskError  # died, unavailable and never started are kinds of the first

    waiting, losses = deque(shards), Counter[int]()
    try:
        while waiting or pool.running:
            pool.size = min(pool.size, len(waiting) + len(pool.running))
            pool.fill()
            while waiting and pool.idle:
                pool.give(waiting.popleft())
            ref = pool.wait()
            worker, shard = pool.running.pop(ref) if ref in pool.running else (pool.starting.pop(ref), START)
            try:
                result = pool.ray.get(ref)
            except RayTaskError as error:
                raise own_error(error, shard) from None
            except RayActorError as error:
                pool.drop(worker)
                losses[shard] += 1
                if losses[shard] > retries:
                    raise lost(shard, losses[shard], error) from None
                if shard != START:
                    waiting.appendleft(shard)
            else:
                pool.idle.append(worker)
                if shard != START:
                    yield result
    finally:
        pool.close()


def lost(shard: int, times: int, error: Exception) -> KdcliError:
    what = (
        "a worker died while it loaded the teacher" if shard == START else f"shard {shard:06d} was lost with its worker"
    )
    return KdcliError(
        f"{what} {times} times ({str(error).splitlines()[0]}): committed shards are kept; run the command again, with smaller "
        "--batch-tokens or fewer --workers if memory ran out"
    )


def own_error(error: Any, shard: int) -> Exception:
    """What the task raised, as it was raised there where that is one of ours."""
    cause = error.cause
    if isinstance(cause, KdcliError):
        return cause
    last = (str(error).strip().splitlines() or ["no message"])[-1]
    what = "a worker could not load the teacher" if shard == START else f"shard {shard:06d} failed on its worker"
    return KdcliError(f"{what}: {last}")
