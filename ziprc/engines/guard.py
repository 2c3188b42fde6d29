"""Runs a command that must not outlive its parent, nor leave processes of its own behind. Standard library alone.

A server of vLLM is three processes. All stay in the process group that this guard leads; Linux tells it when the parent has died,
of whatever; then, on SIGTERM, and when the command ends, the guard kills the whole group, itself last.
"""

import ctypes
import os
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(parent: int, command: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it died before it could be watched
        return
    subprocess.Popen(command).wait()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
