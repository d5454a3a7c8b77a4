"""Ray on this machine: the cache of one process, lost actors and nodes made up for, errors as they were raised."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from pipelines.capture.cache_teacher import capture
from pipelines.capture.executors import ray as executor
from pipelines.capture.executors.ray import Cluster, run
from pipelines.capture.worker import CaptureRequest
from teacher_cache import stopping
from teacher_cache.errors import DataError, KdcliError
from teacher_cache.stopping import Stopped

ray = pytest.importorskip("ray")


@pytest.fixture(scope="class")
def two_cpus() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def doubling(worker: int) -> Callable[[int], int]:
    return lambda shard: 2 * shard


def dying(folder: str, often: int, worker: int) -> Callable[[int], int]:
    """The process of the first ``often`` workers that take shard 3 dies."""

    def task(shard: int) -> int:
        if shard == 3:
            times = len(list(Path(folder).iterdir()))
            if times < often:
                (Path(folder) / str(times)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return shard

    return task


def failing(error: Exception, worker: int) -> Callable[[int], int]:
    def task(shard: int) -> int:
        raise error

    return task


def unloadable(error: Exception, worker: int) -> Callable[[int], int]:
    raise error


@pytest.mark.usefixtures("two_cpus")
class TestOneCluster:
    def test_every_shard_once(self) -> None:
        assert sorted(run(doubling, range(7), 2, Cluster())) == list(range(0, 14, 2))

    def test_as_many_workers_as_there_is_room_for(self) -> None:
        assert executor.places(ray, Cluster(), 0.0) == 2
        with pytest.raises(KdcliError, match="has 0 GPUs and 2 CPUs, too few for one worker of 1 and 1"):
            executor.places(ray, Cluster(gpus=1), 1.0)

    def test_a_lost_shard_is_done_elsewhere(self, tmp_path: Path) -> None:
        assert sorted(run(partial(dying, str(tmp_path), 2), range(6), 2, Cluster())) == list(range(6))
        assert len(list(tmp_path.iterdir())) == 2

    @pytest.mark.exhaustive  # a cluster restarts workers slowly; above one is lost twice, and comes back
    def test_not_for_ever(self, tmp_path: Path) -> None:
        with pytest.raises(KdcliError, match="shard 000003 was lost with its worker 2 times"):
            list(run(partial(dying, str(tmp_path), 9), range(6), 2, Cluster(retries=1)))

    def test_an_error_of_ours_arrives_as_it_was(self) -> None:
        with pytest.raises(DataError, match=r"^row 7 of f\.json: no image$"):
            list(run(partial(failing, DataError("row 7 of f.json: no image")), range(3), 2, Cluster()))

    @pytest.mark.exhaustive  # as above: an error of a worker's task arrives in the same way
    @pytest.mark.parametrize("error", [DataError("no such model"), ValueError("no such thing")])
    def test_a_teacher_that_cannot_be_loaded(self, error: Exception) -> None:
        with pytest.raises(KdcliError, match=f"{error}$"):
            list(run(partial(unloadable, error), range(3), 2, Cluster()))

    @pytest.mark.exhaustive
    def test_any_other_names_its_shard(self) -> None:
        with pytest.raises(KdcliError, match=r"shard 000000 failed on its worker: .*ZeroDivisionError: by nought"):
            list(run(partial(failing, ZeroDivisionError("by nought")), [0], 1, Cluster()))

    def test_a_whole_capture(
        self, alone: Path, cache_files, make_request: Callable[..., CaptureRequest], tmp_path: Path
    ) -> None:
        shown: list[int] = []
        request = make_request(tmp_path / "cache", executor="ray", workers=2)
        capture(request, lambda event, done, total: shown.append(done))
        assert cache_files(tmp_path / "cache") == cache_files(alone) and shown == sorted(shown)


def slow(worker: int) -> Callable[[int], int]:
    def task(shard: int) -> int:
        time.sleep(1.0)
        return shard

    return task


@pytest.mark.exhaustive  # two nodes take long to start; above a worker is lost in its shard
def test_a_node_that_goes_away() -> None:
    """Two nodes of one CPU each; one is removed while its actor works. Its shard, and all that are left, are done by the other."""
    from ray.cluster_utils import Cluster as Nodes

    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1})
    other = nodes.add_node(num_cpus=1)
    try:
        ray.init(address=nodes.address, log_to_driver=False)
        found = []
        for shard in run(slow, range(8), 2, Cluster()):
            found.append(shard)
            if len(found) == 2:
                nodes.remove_node(other)
        assert sorted(found) == list(range(8))
    finally:
        ray.shutdown()
        nodes.shutdown()


@dataclass(frozen=True)
class Placed:
    """A task that knows the folder in which it was unpickled, as a cache's storage does."""

    folder: str = ""

    def __setstate__(self, state: object) -> None:
        object.__setattr__(self, "folder", os.getcwd())

    def __call__(self, worker: int) -> Callable[[int], tuple[str, str]]:
        return lambda shard: (self.folder, os.getcwd())


@pytest.mark.exhaustive  # a cluster of its own; test_slurm.py has such a folder
def test_from_a_folder_with_modules_of_the_users_own(
    own_modules: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Actors import ours, and relative paths begin where the command was given. A signal ends the run at its next look."""
    monkeypatch.chdir(own_modules(tmp_path / "work"))
    here = str(tmp_path / "work")
    with stopping.listening(), pytest.raises(Stopped):
        for number, found in enumerate(run(Placed(), range(99), 1, Cluster())):
            assert found == (here, here)
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
    assert number < 90


def test_no_cluster_there() -> None:
    with pytest.raises(KdcliError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        list(run(doubling, [0], 1, Cluster(address="127.0.0.1:1")))
