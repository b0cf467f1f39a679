"""A process that is killed, with a child that does not listen to SIGTERM and a grandchild."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serving import orphan_guard
from tests.serving.fakes import wait_until

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""
REPLICA = f"""
import os, subprocess, sys, time
guard = subprocess.Popen([sys.executable, {orphan_guard.__file__!r}, str(os.getpid())], stdin=subprocess.DEVNULL)
child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.PIPE, text=True)
print(guard.pid, child.pid, child.stdout.readline().strip(), flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_guard_ends_the_descendants_of_a_killed_process_and_then_itself():
    replica = subprocess.Popen([sys.executable, "-c", REPLICA], stdout=subprocess.PIPE, text=True)
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        pids = [int(pid) for pid in replica.stdout.readline().split()]
        assert set(orphan_guard.descendants({replica.pid})) == set(pids)
        assert not wait_until(lambda: not set(pids) <= set(orphan_guard.processes()), 2.5), "nothing ends before"
        replica.send_signal(signal.SIGKILL)
        replica.wait()
        assert wait_until(lambda: not set(pids) & set(orphan_guard.processes()), 30)
        assert bystander.poll() is None
    finally:
        replica.kill()
        bystander.kill()
        bystander.wait()
