"""Who runs what: claims, kills, retries and several workers, with processes that are played."""

from __future__ import annotations

import json
import os
import signal
import threading

import pytest

from qlora_kernels.finetune.errors import BadInput, Interrupted, RunError
from qlora_kernels.sweep.command import _all_failed
from qlora_kernels.sweep.queue import Queue, summary
from qlora_kernels.sweep.worker import Crew, visible_devices


def crew(queue, played, workers=1, devices=(), **changes):
    said = []
    made = Crew(queue, workers, devices, lambda result: result.value(None), say=said.append,
                start=played, **changes)  # fmt: skip
    made.said = said
    return made


@pytest.mark.parametrize("workers", [1, 3])
def test_every_finetune_is_run_once(tmp_path, planned, played, workers):
    queue = Queue(tmp_path, planned)
    assert queue.fill() == 4
    crew(queue, played, workers).run()
    assert sorted(played.started) == [p.key for p in planned]
    assert summary(queue) == {"complete": 4, "running": 0, "waiting": 0, "failed": 0}
    # The same command again has nothing to do, and a larger sweep only what is new.
    again = Queue(tmp_path, planned)
    assert again.fill() == 0
    crew(again, played).run()
    assert len(played.started) == 4


def test_a_database_serves_as_well(tmp_path, planned, played):
    queue = Queue(tmp_path, planned[:2], storage=f"sqlite:///{tmp_path}/sweep.db")
    queue.fill()
    crew(queue, played).run()
    assert summary(queue)["complete"] == 2
    assert [t.state.name for t in queue.study.trials] == ["COMPLETE"] * 2
    assert queue.study.best_value == 2.0


def test_a_storage_that_cannot_be_opened(tmp_path, planned):
    with pytest.raises(BadInput, match="sqlite:////nowhere/at/all.db cannot be opened"):
        Queue(tmp_path, planned, storage="sqlite:////nowhere/at/all.db")
    with pytest.raises(BadInput, match="cannot be opened"):
        Queue(tmp_path, planned, storage="no url")


def test_two_queues_of_one_folder_share_the_work(tmp_path, planned, played):
    queues = [Queue(tmp_path, planned) for _ in range(2)]
    assert [queue.fill() for queue in queues] == [4, 0]
    first, second = queues[0].take(), queues[1].take()
    assert first.planned.key != second.planned.key
    crews = [crew(queue, played) for queue in queues]
    for queue, claim in zip(queues, (first, second), strict=True):
        queue.put_back(claim)
    threads = [threading.Thread(target=c._work, args=(0,)) for c in crews]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(played.started) == [p.key for p in planned]


def test_what_a_killed_worker_ran_is_put_back(tmp_path, planned):
    queue = Queue(tmp_path, planned[:1])
    queue.fill()
    claim = queue.take()
    other = Queue(tmp_path, planned[:1])
    assert other.take() is None and other.pending() == 1  # it lives
    child = os.dup(claim.lock)  # a process that it started, and that outlives it
    os.close(claim.lock)
    assert other.take() is None
    os.close(child)
    assert other.fill() == 0  # it is in the queue already, as running
    again = other.take()
    assert again.planned.key == claim.planned.key and again.attempt == 1  # no failure


def test_failures_are_tried_again_and_then_reported(tmp_path, planned, played):
    queue = Queue(tmp_path, planned, retries=2)
    queue.fill()
    played.ends = {"k0": [1, 1, 0], "k1": [-9], "k2": [2]}
    made = crew(queue, played)
    made.run()
    starts = [played.started.count(f"k{i}") for i in range(4)]
    assert starts == [3, 3, 1, 1]  # exit code 2 is what was given: not again
    assert summary(queue)["complete"] == 2
    failed = {f.key: f for f in queue.failures()}
    assert failed["k1"].attempts == 3 and "killed by SIGKILL" in failed["k1"].why
    assert failed["k2"].why == "words of 2"
    assert sum("will be tried again" in line for line in made.said) == 4
    # Mended, they are tried as often as before; what is complete is left alone.
    played.ends = {}
    later = Queue(tmp_path, planned, retries=2)
    assert later.fill() == 0
    assert later.fill(retry_failed=True) == 2
    crew(later, played).run()
    assert later.failures() == [] and summary(later)["complete"] == 4


def test_more_retries_than_before(tmp_path, planned, played):
    played.ends = {"k0": [1]}
    queue = Queue(tmp_path, planned[:1], retries=0)
    queue.fill()
    crew(queue, played).run()
    assert played.started == ["k0"]
    later = Queue(tmp_path, planned[:1], retries=1)
    assert later.fill() == 1
    crew(later, played).run()
    assert later.failures()[0].attempts == 2


def test_a_result_that_is_not_one_is_a_failure(tmp_path, planned, played, monkeypatch):
    queue = Queue(tmp_path, planned[:1], retries=0)
    queue.fill()
    made = crew(queue, played)
    made.value = lambda result: (_ for _ in ()).throw(BadInput("the loss is nan"))
    made.run()
    assert queue.failures()[0].why == "the loss is nan"


def test_all_failed_says_each_reason_once(planned):
    from qlora_kernels.sweep.queue import Failure

    failures = [Failure("k0", 2, "out of memory"), Failure("k1", 2, "out of memory"),
                Failure("k2", 1, "no such file")]  # fmt: skip
    words = _all_failed(planned, failures)
    assert words.count("out of memory") == 1 and "r 0, seed 0 and 1 more: out of memory" in words
    assert "r 8, seed 0: no such file" in words and "all 3" in words


def test_a_finetune_that_is_no_longer_asked_for_is_not_run(tmp_path, planned, played):
    Queue(tmp_path, planned).fill()
    queue = Queue(tmp_path, planned[:2])
    queue.fill()
    crew(queue, played).run()
    assert sorted(played.started) == ["k0", "k1"]


def test_a_signal_stops_the_processes_and_keeps_their_place(tmp_path, planned, played):
    queue = Queue(tmp_path, planned)
    queue.fill()
    played.ends = {p.key: ["runs"] for p in planned}
    made = crew(queue, played, workers=2)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    timer.start()
    with pytest.raises(Interrupted) as caught:
        made.run()
    assert caught.value.signal == signal.SIGTERM
    assert played.signals == [signal.SIGTERM] * 2 and len(played.started) == 2
    assert signal.getsignal(signal.SIGTERM) is before
    assert summary(queue) == {"complete": 0, "running": 0, "waiting": 4, "failed": 0}
    played.signals.clear()
    played.ends = {}
    crew(queue, played).run()
    assert summary(queue)["complete"] == 4


def test_gpus_are_dealt_out(tmp_path, planned, played, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert visible_devices() == ["2", "5"]
    queue = Queue(tmp_path, planned)
    queue.fill()
    made = crew(queue, played, workers=2, devices=visible_devices())
    assert [made._environment(i)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["2", "5", "2"]
    made.run()
    assert {e["CUDA_VISIBLE_DEVICES"] for e in played.environments} <= {"2", "5"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == []


def test_an_error_of_the_crew_itself_is_raised(tmp_path, planned, played):
    queue = Queue(tmp_path, planned)
    queue.fill()
    made = crew(queue, lambda *a: (_ for _ in ()).throw(RunError("the disk is full")), workers=2)
    with pytest.raises(RunError, match="the disk is full"):
        made.run()


def test_a_request_says_all_that_a_process_needs(tmp_path, planned, played):
    queue = Queue(tmp_path, planned[:1])
    queue.fill()
    crew(queue, played, keep="nothing").run()
    request = json.loads((tmp_path / "trials" / "k0" / "trial.json").read_text())
    assert request["settings"] == {"r": 0} and request["keep"] == "nothing"
    assert request["parent"] == os.getpid()
