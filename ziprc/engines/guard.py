"""Runs a command that must not outlive its parent, nor leave processes of its own behind. Standard library alone.

A server of vLLM is three processes and one that clears their shared memory away. All stay in the process group that this guard
leads, and become its children when their own parent dies. When the guard's parent has died, of whatever, which Linux tells it,
and on SIGTERM it asks the command to end. When that has ended the rest may follow by itself; what takes too long is killed, and
the whole group after all. The command is killed when the guard is.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
GRACE_S = 5.0  # that a command may take to end
REST_S = 2.0  # that what it leaves behind may take


def prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def kill_group(*_: object) -> None:
    """End everything, this process too."""
    os.killpg(0, signal.SIGKILL)


def main(parent: int, command: list[str]) -> None:
    """Run `command` for the process `parent`, and end with the last of both."""
    own, child = os.getpid(), 0

    def end(*_: object) -> None:
        if not child:
            kill_group()
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(child, signal.SIGTERM)
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)

    def has_died(*_: object) -> None:
        if os.getppid() != parent:  # else a mere thread of the parent has ended
            end()

    def end_with_guard() -> None:  # in the command's process, before it becomes the command
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != own:
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGUSR1, has_died)
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGALRM, kill_group)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)  # when the thread that started this process ends
    if os.getppid() != parent:  # it died before it could be watched
        return
    process = subprocess.Popen(command, preexec_fn=end_with_guard)
    child = process.pid
    process.wait()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, REST_S)
    with contextlib.suppress(ChildProcessError):  # nobody is left
        while True:
            os.wait()
    kill_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
