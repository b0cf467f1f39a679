"""Running a function in a forked process that dies by SIGKILL at a chosen point."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable

TIMEOUT_S = 120


@dataclasses.dataclass(frozen=True)
class Point:
    """Just before or just after a call of `owner.name` with arguments that `when` accepts."""

    owner: object
    name: str
    before: bool = True
    when: Callable[..., bool] = lambda *_, **__: True
    call: int = 1
    """Which of these calls."""

    def arm(self) -> None:
        original = getattr(self.owner, self.name)
        seen = 0

        def deadly(*arguments: object, **options: object) -> object:
            nonlocal seen
            here = self.when(*arguments, **options)
            seen += here
            if here and self.before and seen == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **options)
            if here and not self.before and seen == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(self.owner, self.name, deadly)


def run_killed(action: Callable[[], object], point: Point) -> None:
    """Run `action` in a child that dies at `point`; asserts that it did.

    A fork, because importing all anew takes ten times as long; the action computes nothing on torch's threads.
    """
    child = os.fork()
    if child == 0:
        try:
            point.arm()
            action()
        finally:
            os._exit(1)  # neither pytest's clean-up nor a traceback's
    until = time.monotonic() + TIMEOUT_S
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"still running after {TIMEOUT_S} s")
        time.sleep(0.01)
    assert os.WIFSIGNALED(ended[1]) and os.WTERMSIG(ended[1]) == signal.SIGKILL, f"reached its end: never at {point}"
