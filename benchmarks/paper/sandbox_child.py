"""Inside the sandbox's process: drop rights, run the program, and report that it finished.

Started as ``python -I -c``, so it imports the standard library alone. Its standard input is one line of
JSON (see `sandbox.run`) and then the program.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

NOBODY = 65534
PATHS = (str, bytes, os.PathLike)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
    "os.setxattr", "os.symlink", "os.truncate", "os.utime", "shutil.rmtree",
}  # fmt: skip
REFUSED = (
    "_posixsubprocess.", "os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.spawn",
    "os.system", "pty.", "resource.", "signal.pthread_kill", "socket.", "subprocess.", "syslog.",
)  # fmt: skip


def limit(limits: dict[str, int]) -> None:
    """Set hard limits on what the process may use."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def guard(folder: str) -> None:
    """Refuse, from now on, to write outside of a folder, to start processes and to use sockets.

    An audit hook cannot be taken off again by Python code.
    """

    real, text = os.path.realpath, os.fsdecode  # programs may put something else in their place

    def inside(path: Any) -> bool:
        return isinstance(path, int) or real(text(path)).startswith(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith("ctypes."):  # what can do without it catches this error
            raise ImportError("the sandbox refuses ctypes")
        if event.startswith(REFUSED):
            raise PermissionError(f"the sandbox refuses {event}")
        if event == "open":
            path, mode, flags = arguments
            writes = flags & WRITING if isinstance(flags, int) else set(mode or "") & set("wax+")
            if writes and path is not None and not inside(path) and path != os.devnull:
                raise PermissionError(f"the sandbox refuses to write {path!r}")
        elif event in CHANGES and not all(inside(a) for a in arguments if isinstance(a, PATHS)):
            raise PermissionError(f"the sandbox refuses {event} outside of its folder")

    sys.addaudithook(hook)


def main() -> None:
    """Run the program; the secret is written to a descriptor of its own only if it came to its end."""
    order = json.loads(sys.stdin.buffer.readline())
    program = sys.stdin.buffer.read().decode()
    secret, tell = order["secret"].encode(), order["tell"]
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
    if order["drop"]:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    limit(order["limits"])
    guard(os.path.realpath(os.getcwd()) + os.sep)
    exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    os.write(tell, secret)


if __name__ == "__main__":
    main()
