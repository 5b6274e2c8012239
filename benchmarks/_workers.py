"""A Python process beside this one, which may crash or hang without harm.

It answers one question at a time. Whoever asks learns of an exception, of its death and of its
silence alike by an exception; the next question starts a new process. `main` is its other end.
"""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

ROOT = Path(__file__).parent.parent

T = TypeVar("T")


class Died(Exception):
    """The process ended, or was ended since it did not answer."""


class Raised(Exception):
    """What was asked raised this."""


class Worker:
    """A process that is started when it is first asked.

    variables: of its environment, besides those of this one.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = variables
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Any = None

    def ask(self, function: Callable[..., T], *arguments: Any, timeout: float) -> T:
        """What `function`, a module's own, returns there within `timeout` seconds.

        Raises:
            Died: there is no answer, and no process any more.
            Raised: the function raised.
        """
        if self._process is None:
            self._start()
        process, pipe = self._process, self._pipe  # another thread may close both
        assert process is not None
        try:
            pipe.send((function, arguments))
            if not pipe.poll(timeout):
                self.close()
                raise Died(f"no answer within {timeout:.0f} s")
            fine, answer = pipe.recv()
        except (EOFError, OSError, TypeError):  # the last of a pipe that was closed meanwhile
            try:
                code = process.wait(5)
            except subprocess.TimeoutExpired:
                code = None
            self.close()
            raise Died(f"the process ended with exit code {code}") from None
        if not fine:
            raise Raised(answer)
        result: T = answer
        return result

    def _start(self) -> None:
        self._pipe, other = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import {__name__} as w; w.main({other.fileno()})"],
            cwd=ROOT,
            env={**os.environ, **self.variables},
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
        )
        other.close()  # so that its end is heard

    def close(self) -> None:
        """End the process, whatever it does."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            self._pipe.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def serve(pipe: Any) -> None:
    """Answer until nobody asks any more."""
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = True, function(*arguments)
        except Exception as problem:
            traceback.print_exc()
            answer = False, f"{type(problem).__name__}: {problem}"[:500]
        try:
            pipe.send(answer)
        except OSError:  # nobody waits for it
            return


def main(number: int) -> None:
    """Answer what comes by the open file of this number."""
    try:
        serve(Connection(number))
    except KeyboardInterrupt:  # meant for the process that asks
        sys.exit(130)
