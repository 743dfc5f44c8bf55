"""Shuts a process in before it runs a stranger's code, and tells what that code tries.

On Linux the kernel does it: namespaces of its own (no network, no other process to see, signal or
outlive), Landlock (no file but Python's and an empty folder), limits on memory and files. Python's
audit events tell what was tried. Elsewhere only the limits and the events are there, which stop
accidents and not malice: grade on Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

FILE = 2**26  # bytes of the largest file it may write
NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x08000000  # user, process, network, IPC
NO_NEW_PRIVILEGES, DUMPABLE = 38, 4
READ = 1 << 2 | 1 << 3
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many rights on files Landlock knew in which version

TOLD = {
    "os.fork": "started a process",
    "os.forkpty": "started a process",
    "os.posix_spawn": "started a process",
    "os.system": "started a process",
    "os.exec": "started a process",
    "os.spawn": "started a process",
    "subprocess.Popen": "started a process",
    "os.kill": "sent a signal",
    "os.killpg": "sent a signal",
    "socket.connect": "used the network",
    "socket.bind": "used the network",
    "socket.sendto": "used the network",
    "ctypes.dlopen": "loaded a library",
    "ctypes.dlsym": "loaded a library",
    "sys.setprofile": "watched the interpreter",
    "sys.settrace": "watched the interpreter",
    "gc.get_objects": "looked through the interpreter's objects",
    "gc.get_referrers": "looked through the interpreter's objects",
    "sys._getframe": "looked through the interpreter's frames",
    "sys._current_frames": "looked through the interpreter's frames",
}
FROM_TORCH = {"sys._getframe", "ctypes.dlsym", "sys._current_frames"}  # that it does all day


def limit(gigabytes: float) -> None:
    """Limit memory, files and core dumps, where the system lets one."""
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        for kind, most in (("DATA", int(gigabytes * 2**30)), ("FSIZE", FILE), ("CORE", 0)):
            with contextlib.suppress(AttributeError, ValueError, OSError):
                resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, most))


def hide_memory() -> None:
    """Let no other process of the same user read this one's memory."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(DUMPABLE, 0, 0, 0, 0)


def alone() -> bool:
    """Enter namespaces of its own; the next child is the first process in them."""
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None, use_errno=True).unshare(NAMESPACES) == 0


def lock(readable: Iterable[Path], writable: Path) -> bool:
    """Leave this process those folders, and no other file; say whether the kernel can."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        return False
    every = (1 << RIGHTS.get(version, 16)) - 1
    parts = [every, 3 if version >= 4 else 0, 3 if version >= 6 else 0]  # files, network, signals
    attribute = struct.pack("QQQ", *parts)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rules = libc.syscall(444, attribute, len(attribute), 0)
    for folder, rights in [*((f, READ) for f in readable), (writable, every & ~1)]:
        if folder.exists():
            rights = rights if folder.is_dir() else rights & (1 << 1 | 1 << 2)
            place = os.open(folder, os.O_PATH | os.O_CLOEXEC)
            libc.syscall(445, rules, 1, struct.pack("=Qi", rights, place), 0)
            os.close(place)
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    done = libc.syscall(446, rules, 0) == 0
    os.close(rules)
    return bool(done)


def watch(tell: Callable[[str], None], readable: Iterable[Path], writable: Path) -> None:
    """Refuse what an exercise never needs, and tell of it."""
    allowed = tuple(str(folder) for folder in (*readable, writable))
    said: set[str] = set()

    def say(words: str) -> None:
        if words not in said:
            said.add(words)
            tell(words)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in TOLD and event not in FROM_TORCH:
            if event == "ctypes.dlopen" and arguments[0] is None:
                return
            say(TOLD[event])
            raise PermissionError(f"no exercise needs this ({event})")
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            writing = isinstance(arguments[2], int) and arguments[2] & 3
            ours = (str(writable),) if writing else allowed
            if not path.startswith(ours):
                if writing or Path(path).exists():  # others are searched for, by imports
                    say(f"{'wrote to' if writing else 'read'} {path}")
                raise PermissionError(13, "no exercise needs this file", path)
        if event in ("os.listdir", "os.scandir"):
            path = os.path.realpath(os.fsdecode(arguments[0] or "."))  # type: ignore[arg-type]
            if not path.startswith(allowed):
                say(f"read {path}")
                raise PermissionError(13, "no exercise needs this folder", path)

    sys.addaudithook(hook)
