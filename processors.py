"""How many threads to compute with, and how long they wait for each other: from the processors that this
process may use, and what others leave free.

Scripts import this file before torch, because a look at the load needs half a second: the first one covers
the import of torch.
"""

import contextlib
import ctypes
import os
import re
import threading
import time
from pathlib import Path

THREADS_CHOSEN = "OMP_NUM_THREADS" in os.environ  # by the user, or by torchrun; then nothing changes it
threads = 1  # the number that operations of this process use, see cli.set_threads


def affinity():
    """The processors that this process may use, a set of numbers; without a container's quota."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def available(cgroups="/sys/fs/cgroup", own_cgroup="/proc/self/cgroup"):
    """The number of processors that this process may use: its affinity, or a container's quota if that is
    less.
    """
    n = len(affinity())
    try:
        name = Path(own_cgroup).read_text().split("::")[1].strip().lstrip("/")
    except (OSError, IndexError):  # not Linux, or cgroups of version 1
        name = ""
    group = Path(cgroups, name)
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max", which is no limit
            quota, period = (folder / "cpu.max").read_text().split()
            n = min(n, max(1, int(quota) // int(period)))
    return n


class Load:
    """How many processors other processes keep busy, on average since the last look. 0 where the system does
    not tell.
    """

    def __init__(self):
        self.last = self.now()

    def now(self):
        """→ the clock, the seconds that our processors were busy, those of this process and of its finished
        children
        """
        busy = 0.0
        try:
            ours = affinity()
            for line in Path("/proc/stat").read_text().splitlines():
                name, *ticks = line.split()
                if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in ours:
                    user, nice, system, _, _, irq, softirq, *_ = map(int, ticks)  # idle and iowait left out
                    busy += (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, AttributeError):
            pass
        return time.monotonic(), busy, sum(os.times()[:4])

    def seconds(self):
        """The seconds since the last look."""
        return time.monotonic() - self.last[0]

    def look(self):
        """→ the number of processors that others have used since the last look, a float"""
        (then, busy, own), self.last = self.last, self.now()
        seconds = max(self.last[0] - then, 1e-3)
        return max(0.0, (self.last[1] - busy) - (self.last[2] - own)) / seconds


def free(others):
    """The number of threads to use while other processes keep `others` processors busy, a float."""
    return max(1, min(available(), int(len(affinity()) - others + 0.5)))


load = Load()
crowd = None  # a Load that began when others first needed our processors; None while they do not; see watch


def watch(interval=0.5):
    """Start a thread that tells whether other processes need the processors of our threads (`crowd`), and
    meanwhile makes OpenMP's threads wait for each other for a shorter time, which changes no result. It does
    nothing if the user has set OMP_WAIT_POLICY or GOMP_SPINCOUNT, or if torch computes with another OpenMP
    than GNU's.

    A thread that waits for the other threads of an operation spins for a while, then sleeps. GNU's libgomp
    spins 300,000 times, which is best on an idle machine. On a busy one, the spinning thread keeps a
    processor from the thread that it waits for. libgomp spins only 100 times if it considers the machine
    busy, which it does if the process has more threads in teams than there are processors. So while others
    are busy, a second team is kept, as large as the machine, which does nothing. Measured with two MLPs of
    two threads each on 2 cores, milliseconds a step: 419 with long waits, 16 with short ones; alone 11.1 and
    12.9.
    """
    gomp = loaded_libgomp()
    if gomp and {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}.isdisjoint(os.environ):
        threading.Thread(target=_watch, args=(gomp, interval), daemon=True).start()


def loaded_libgomp():
    """GNU's OpenMP library, if this process has loaded it; otherwise None"""
    with contextlib.suppress(OSError):
        path = re.search(r"/.*/libgomp[^/\n]*$", Path("/proc/self/maps").read_text(), re.MULTILINE)
        return path and ctypes.CDLL(path[0])


def _watch(gomp, interval):
    global crowd

    def keep_team(free_again):
        gomp.GOMP_parallel(gomp.omp_get_thread_num, None, len(affinity()), 0)  # an empty parallel region
        free_again.wait()  # the team ends with this thread

    recent, free_again = Load(), None
    with contextlib.suppress(OSError, RuntimeError):  # such as a limit of threads; the waits stay long
        while True:
            time.sleep(interval)
            crowded = free(recent.look()) < threads
            crowd = (crowd or Load()) if crowded else None
            if crowded and free_again is None:
                free_again = threading.Event()
                threading.Thread(target=keep_team, args=(free_again,), daemon=True).start()
            elif not crowded and free_again is not None:
                free_again.set()
                free_again = None
