"""How many threads to compute with: from the processors that this process may use, and what others leave
free.

Scripts import this file before torch, because OpenMP reads its settings when torch is imported.
"""

import os
import time
from pathlib import Path

# A thread that waits for the others of an operation spins for a moment, then sleeps. By default it spins
# 300,000 times, also while another process needs its processor. Measured with two MLPs of two threads each on
# 2 cores, milliseconds a step: 150 with 40,000, 54 with 10,000, 27 with 3,000, 21 with 1,000. Alone (11.2 to
# 12.6 ms), 10,000 take 1.03 of the time of 300,000, 3,000 take 1.05, 1,000 take 1.10; the CNN takes 1.02
# with 3,000.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

CHOSEN = "OMP_NUM_THREADS" in os.environ  # by the user, or by torchrun; nothing here changes it then


def available(cgroups="/sys/fs/cgroup", own_cgroup="/proc/self/cgroup"):
    """The number of processors that this process may use: its affinity, or a container's quota if that is
    less.
    """
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        name = Path(own_cgroup).read_text().split("::")[1].strip().lstrip("/")
    except (OSError, IndexError):  # not Linux, or cgroups of version 1
        name = ""
    folder = Path(cgroups, name)
    for folder in (folder, *folder.parents):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            n = min(n, max(1, int(quota) // int(period)))
        except (OSError, ValueError):  # no such file, or "max", which is no limit
            continue
    return n


class Load:
    """How many processors other processes keep busy, on average since the last look. 0 where the system does
    not tell.
    """

    def __init__(self):
        self.last = self.now()

    def now(self):
        """→ the clock, the seconds that our processors were busy, those of this process and its children"""
        busy = 0.0
        try:
            ours = os.sched_getaffinity(0)
            for line in Path("/proc/stat").read_text().splitlines():
                name, *ticks = line.split()
                if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in ours:
                    user, nice, system, _, _, irq, softirq, *_ = map(int, ticks)  # idle and iowait left out
                    busy += (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, AttributeError):
            pass
        return time.monotonic(), busy, sum(os.times()[:4])

    def seconds(self):
        """Since the last look."""
        return time.monotonic() - self.last[0]

    def look(self):
        """→ the number of processors that others have used since the last look, a float"""
        (then, busy, own), self.last = self.last, self.now()
        seconds = max(self.last[0] - then, 1e-3)
        return max(0.0, (self.last[1] - busy) - (self.last[2] - own)) / seconds


def free(others):
    """The number of threads to use beside others that keep so many processors busy."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(available(), int(processors - others + 0.5)))


load = Load()  # from here on, so that the first look covers the import of torch
