"""Check whether the process that wrote a record is still running."""

import hashlib
import os
import platform
import uuid
from typing import Any

import psutil


def this_process() -> dict[str, Any]:
    """Identifies this process among all processes on all machines, without the name of the machine."""
    process = psutil.Process()
    return {"pid": process.pid, "started": process.create_time(), "machine": _machine()}


def is_gone(process: dict[str, Any]) -> bool | None:
    """
    Checks whether a recorded process has ended.

    Args:
        process (`dict[str, Any]`): Process, as recorded by [`this_process`].

    Returns:
        `bool`, or `None` if it cannot be known because the process ran on another machine or in another container.
    """
    if process.get("machine") != _machine():
        return None
    try:
        found = psutil.Process(process["pid"])
        # The id may belong to another process by now.
        return abs(found.create_time() - process["started"]) > 1 or found.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (psutil.AccessDenied, KeyError, TypeError, ValueError):
        return None


def _machine() -> str:
    # Containers may share the name and network card of a machine without seeing each other's processes.
    namespace = "/proc/self/ns/pid"
    visible = os.readlink(namespace) if os.path.exists(namespace) else ""
    return hashlib.sha256(f"{platform.node()} {uuid.getnode()} {visible}".encode()).hexdigest()[:16]
