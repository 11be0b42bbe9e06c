"""Functions that a child process runs in test_child.py; each ends in its own way."""

import ctypes
import os
import sys
import time
from typing import Any

from cusprun.errors import Failed, InvalidRequest


def echo(*args: Any, **kwargs: Any) -> dict[str, Any]:
    print("a line that native code might print")
    return {"args": args, "kwargs": kwargs, "pid": os.getpid()}


def read_null() -> int:
    sys.stderr.write("about to read address 0\n")
    return ctypes.c_int.from_address(0).value


def refuse() -> None:
    raise InvalidRequest("write --context 512 instead")


def fail() -> None:
    raise Failed("the file broke in the middle")


def divide() -> float:
    return 1 / 0


def sleep(seconds: float, started: str) -> None:
    with open(started, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(seconds)
