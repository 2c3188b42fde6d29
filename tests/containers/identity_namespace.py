"""Run a command in a user namespace that maps every id onto itself.

The command holds all capabilities over that namespace, also where root itself lacks some, as in a sandbox; so
`apptainer build` can hand them on to `%post`. Needs root. Usage: identity_namespace.py COMMAND [ARGUMENT …]
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x00020000  # linux/sched.h
IDS = 65536


def main(command: list[str]) -> int:
    """The exit code of the command; OSError when the kernel allows no user namespace."""
    unshared, mapped = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
            print(f"unshare: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
            os._exit(125)
        os.write(unshared[1], b"x")
        os.read(mapped[0], 1)
        os.execvp(command[0], command)
    os.close(unshared[1])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: os.kill(child, n))
    if os.read(unshared[0], 1):
        for kind in ("uid_map", "gid_map"):
            with open(f"/proc/{child}/{kind}", "w") as handle:
                handle.write(f"0 0 {IDS}\n")
        os.write(mapped[1], b"x")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
