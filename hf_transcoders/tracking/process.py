"""Whether the process that wrote a record still lives."""

import hashlib
import os
import platform
import uuid
from typing import Any

import psutil


def this_process() -> dict[str, Any]:
    """What tells this process from every other, on this machine and elsewhere; the machine's name does not show."""
    process = psutil.Process()
    return {"pid": process.pid, "started": process.create_time(), "machine": _machine()}


def is_gone(process: dict[str, Any]) -> bool | None:
    """
    Whether a recorded process has ended.

    Args:
        process (`dict[str, Any]`): As [`this_process`] gave it.

    Returns:
        `bool`, or `None` where it cannot be known: it ran on another machine, or in another container.
    """
    if process.get("machine") != _machine():
        return None
    try:
        found = psutil.Process(process["pid"])
        # The number may have been given to another process since.
        return abs(found.create_time() - process["started"]) > 1 or found.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (psutil.AccessDenied, KeyError, TypeError, ValueError):
        return None


def _machine() -> str:
    # Containers may share a machine's name and network card, and still not see each other's processes.
    namespace = "/proc/self/ns/pid"
    visible = os.readlink(namespace) if os.path.exists(namespace) else ""
    return hashlib.sha256(f"{platform.node()} {uuid.getnode()} {visible}".encode()).hexdigest()[:16]
