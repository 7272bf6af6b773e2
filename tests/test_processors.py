"""Tests of processors.py."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cli
import processors
import runs
import train
import training_state
from tests.conftest import assert_same_runs, fit, outcome

WATCH = processors.watch  # the fixture `quick` replaces it


def test_processors_are_those_of_the_affinity_and_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(processors.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    own = tmp_path / "cgroup"
    own.write_text("0::/\n")
    for quota, expected in (("max 100000", 64), ("200000 100000", 2), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(quota + "\n")
        assert processors.available(tmp_path, own) == expected
    own.write_text("0::/slice/job\n")  # the least of the groups around it counts
    (tmp_path / "slice/job").mkdir(parents=True)
    (tmp_path / "slice/cpu.max").write_text("400000 100000\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert processors.available(tmp_path, own) == 4
    assert processors.available(tmp_path / "none", tmp_path / "none") == 64
    monkeypatch.setattr(processors, "available", lambda: 8)
    # of 64, others need more than 56 before this process gets fewer than its 8
    assert [processors.free(others) for others in (0.0, 55.9, 57.0, 60.4, 63.2, 70.0)] == [8, 8, 7, 4, 1, 1]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not tell")
def test_the_load_is_that_of_other_processes():
    load = processors.Load()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:  # busy itself, which does not count
            pass
        busy = load.look()
        other.kill()
    assert 0.3 < busy < processors.available() or processors.available() == 1


@pytest.mark.skipif(not processors.loaded_libgomp() or platform.machine() != "x86_64"
                    or processors.available() < 2,
                    reason="no libgomp, pauses of another length, or one processor")
def test_threads_wait_for_a_shorter_time_while_others_are_busy():
    code = """
import os, processors, time, torch
from pathlib import Path

def tasks():
    return {path.name for path in Path("/proc/self/task").iterdir()}

def sleeps():  # how often the second thread of operations slept, that would spin through so short a pause
    def switches():
        status = Path(f"/proc/self/task/{worker}/status").read_text()
        return int(status.split("nonvoluntary")[0].split("voluntary_ctxt_switches:")[1])
    before = switches()
    for _ in range(50):
        numbers.exp()
        pause = time.perf_counter() + 3e-4
        while time.perf_counter() < pause:
            pass
    return switches() - before

def settle(n):
    end = time.monotonic() + 60
    while len(tasks()) != n and time.monotonic() < end:
        time.sleep(0.05)
    return len(tasks()) == n

torch.set_num_threads(2)
processors.threads = 2
team = len(processors.affinity())
before = tasks()
numbers = torch.ones(2**17)
worker, = tasks() - before
others = 0
processors.free = lambda load: 2 - others
processors.watch(0.05)
n = len(tasks())
alone = sleeps()
others = 1
print(settle(n + team), sleeps() > alone + 20)
others = 0
print(settle(n), sleeps() < alone + 20)
"""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment,
                         cwd=Path(processors.__file__).parent)
    assert (ran.stdout, ran.stderr) == ("True True\nTrue True\n", "")


def test_waits_that_the_user_has_chosen_stay(monkeypatch):
    started = []
    monkeypatch.setattr(processors.threading, "Thread", lambda **options: SimpleNamespace(
        start=lambda: started.append(options)))
    monkeypatch.setattr(processors, "loaded_libgomp", lambda: "libgomp")
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        with monkeypatch.context() as chosen:
            chosen.setenv(name, "1")
            WATCH()
    assert not started
    WATCH()
    assert len(started) == 1


def test_scripts_watch_how_busy_others_are(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(processors, "watch", lambda: started.append(True))
    assert outcome(lambda argv: None, [], capsys) == (0, "")
    assert started == [True]


def test_threads_change_between_epochs_and_a_resumed_run_goes_on_with_them(folder, workplace, monkeypatch):
    if cli.MOST_THREADS < 2:
        pytest.skip("one thread")
    before, seen = torch.get_num_threads(), []

    class Loads:
        def __init__(self, *others):
            self.others = list(others)

        def look(self):
            return self.others.pop(0)

        def seconds(self):
            return 2
    monkeypatch.setattr(processors, "THREADS_CHOSEN", False)
    monkeypatch.setattr(processors, "available", lambda: 2)
    monkeypatch.setattr(processors.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    train_epoch = train.train_epoch
    monkeypatch.setattr(train, "train_epoch", lambda *args: seen.append(torch.get_num_threads())
                        or train_epoch(*args))
    try:
        for name, epochs in (("whole", 3), ("run", 1)):
            monkeypatch.setattr(processors, "load", Loads(1.0, 1.0, 0.0, 0.0))  # at first, after epochs
            fit(folder, epochs=epochs)
            for root in ("results", "checkpoints") if name == "whole" else ():
                Path(root, "run").rename(Path(root, "whole"))
        assert runs.load_checkpoint("checkpoints/run/last.pt")["threads"] == 1
        monkeypatch.setattr(processors, "load", Loads(0.0, 0.0))
        torch.set_num_threads(2)
        train.main(["--resume", "checkpoints/run/last.pt", "--epochs", "3"])
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 2, 1, 1, 2]
    assert_same_runs(*((workplace / "results" / name, workplace / "checkpoints" / name)
                       for name in ("whole", "run")))


def test_a_run_makes_room_in_the_middle_of_an_epoch_and_a_resumed_run_goes_on_with_that(
        folder, workplace, monkeypatch):
    if cli.MOST_THREADS < 2:
        pytest.skip("one thread")
    before, seen, killed_at = torch.get_num_threads(), {}, None
    monkeypatch.setattr(processors, "THREADS_CHOSEN", False)
    monkeypatch.setattr(processors, "available", lambda: 2)
    monkeypatch.setattr(processors.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(processors, "load", SimpleNamespace(look=lambda: 0.0, seconds=lambda: 2))
    monkeypatch.setattr(processors, "crowd", None)
    after_step = training_state.Saver.after_step

    def step(saver):
        seen.setdefault(saver.state.step, torch.get_num_threads())
        crowded = SimpleNamespace(look=lambda: 1.0, seconds=lambda: 2)
        processors.crowd = crowded if saver.state.step in (3, 14) else None
        after_step(saver)
        if saver.state.step == killed_at:
            raise MemoryError  # as good as a kill: nothing more is written
    monkeypatch.setattr(training_state.Saver, "after_step", step)
    try:
        fit(folder, epochs=2)
        whole, seen = seen, {}
        for root in ("results", "checkpoints"):
            Path(root, "run").rename(Path(root, "whole"))
        killed_at = 6
        with pytest.raises(MemoryError):
            fit(folder, epochs=2)
        state = runs.load_checkpoint("checkpoints/run/last.pt")
        assert (state["step"], state["threads"]) == (3, 1)
        killed_at, seen = None, {}
        torch.set_num_threads(2)
        train.main(["--resume", "checkpoints/run/last.pt"])
    finally:
        torch.set_num_threads(before)
    assert list(whole.values()) == [2] * 3 + [1] * 7 + [2] * 4 + [1] * 6
    assert seen == {step: whole[step] for step in range(4, 21)}
    assert_same_runs(*((workplace / "results" / name, workplace / "checkpoints" / name)
                       for name in ("whole", "run")))


@pytest.mark.parametrize("by_user", [True, False])
def test_the_number_of_threads_that_the_user_or_the_machine_allows_counts_when_a_run_goes_on(
        folder, workplace, capsys, monkeypatch, by_user):
    monkeypatch.setattr(processors, "THREADS_CHOSEN", by_user)
    monkeypatch.setattr(processors, "available", torch.get_num_threads)
    monkeypatch.setattr(cli, "adapt_threads", lambda: None)
    fit(folder, epochs=1)
    checkpoint, chosen = runs.load_checkpoint(Path("checkpoints/run/last.pt")), torch.get_num_threads()
    assert checkpoint["threads"] == chosen
    runs.save_checkpoint(Path("checkpoints/run/last.pt"), {**checkpoint, "threads": chosen + 1})
    train.main(["--resume", "checkpoints/run/last.pt", "--epochs", "2"])
    assert torch.get_num_threads() == chosen
    assert f"was computed with {chosen + 1} threads, not {chosen}, so" in capsys.readouterr().err
