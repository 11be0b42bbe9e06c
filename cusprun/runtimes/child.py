"""Runs one function in a fresh Python process: a crash of native code ends that process and not ours.

The request and the answer are JSON; nothing is unpickled. The child ends by itself when the parent is gone.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import IO, Any

from cusprun.errors import Failed, InvalidRequest

TAIL_LINES = 20


def run_in_child(function: Callable[..., Any], *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)`` in a fresh process; ``function`` is a module's top-level name.

    Arguments and result travel as JSON: numbers, strings, lists, dicts; tuples come back as lists.
    What the child writes to stdout or stderr goes to our stderr. Raises InvalidRequest and Failed as the function
    raised them, and Failed with the child's last words when it crashed, was killed or took more than ``timeout`` s.
    """
    request = {"module": function.__module__, "name": function.__qualname__, "args": args, "kwargs": kwargs}
    label = f"{function.__module__}.{function.__qualname__}"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "GGML_NO_BACKTRACE": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cusprun.runtimes.child"],  # -P: the current folder may hold a `cusprun`
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if sys.stderr.isatty() else subprocess.PIPE,
        env=environment,
        text=True,
        encoding="utf-8",
    )
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    listener = threading.Thread(target=_forward, args=(process.stderr, tail), daemon=True)
    listener.start()
    killer = threading.Timer(timeout, process.kill) if timeout is not None else None
    try:
        if killer is not None:
            killer.start()
        answer = _exchange(process, json.dumps(request))
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        if killer is not None:
            killer.cancel()
    listener.join()
    if not answer:
        raise Failed(_last_words(label, code, list(tail), timeout))
    reply = json.loads(answer)
    if "error" in reply:
        raise (InvalidRequest if reply["kind"] == "InvalidRequest" else Failed)(reply["error"])
    return reply["result"]


def _exchange(process: subprocess.Popen[str], request: str) -> str:
    """Hands the request over and reads the answer; our end of stdin stays open, it tells the child that we live."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request + "\n")
        process.stdin.flush()
    except BrokenPipeError:  # it died before it read; its exit code says why
        return ""
    with process.stdout as answers:
        return answers.read()


def _forward(lines: IO[str] | None, tail: deque[str]) -> None:
    for line in lines or ():
        tail.append(line.rstrip())
        print(line, end="", file=sys.stderr, flush=True)


def _last_words(label: str, code: int, tail: list[str], timeout: float | None) -> str:
    if code == -signal.SIGKILL and timeout is not None:
        how = f"was ended after {timeout:.0f} s"
    elif code < 0:
        how = f"crashed with {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (out of memory is the usual reason)"
    else:
        how = f"ended with exit code {code}"
    said = "".join(f"\n  {line}" for line in tail if line)
    return f"the child process of {label} {how}{said}"


def _serve() -> None:
    """The child's side: one request from stdin, one answer on what was stdout when it started."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # native code that prints to stdout must not spoil the answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and the parent ends us
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        function: Any = importlib.import_module(request["module"])
        for part in request["name"].split("."):
            function = getattr(function, part)
        reply = {"result": function(*request["args"], **request["kwargs"])}
    except (InvalidRequest, Failed) as error:
        kind = "InvalidRequest" if isinstance(error, InvalidRequest) else "Failed"
        reply = {"error": str(error), "kind": kind}
    answers.write(json.dumps(reply))
    answers.flush()
    answers.close()
    sys.stderr.flush()
    os._exit(0)  # no teardown: native libraries may crash in theirs, and the answer is out


def _leave_with_parent() -> None:
    """Reads stdin until the parent's end closes, which happens when the parent ends, however it ends."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    _serve()
