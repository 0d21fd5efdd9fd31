"""The reads that are held, without a mount: interrupts, killed readers, the end."""

import errno
import os
import threading

from tartapefs.mount.hold import Hold


def test_an_interrupt_that_comes_before_the_read_is_held() -> None:
    """Two threads take requests from the kernel, in any order."""
    answers: list[tuple[int, int]] = []
    hold = Hold(lambda number, error: answers.append((number, error)))
    hold.interrupt(8)
    hold.add(6, os.getpid(), 0, 1)
    hold.add(8, os.getpid(), 0, 1)
    assert answers == [(8, errno.EINTR)]
    hold.interrupt(6)
    assert answers == [(8, errno.EINTR), (6, errno.EINTR)]
    hold.add(10, 0, 0, 1)
    hold.end()
    hold.add(12, 0, 0, 1)
    assert answers[2:] == [(10, errno.EIO), (12, errno.EIO)]
    assert hold.reads() == []


def test_readers_of_which_nothing_is_known_are_held_until_the_end() -> None:
    """Such as those in another PID namespace."""
    hold, ended = Hold(lambda number, error: None), threading.Event()
    hold.add(2, 0, 0, 1)
    looks = []

    def is_mounted() -> bool:
        looks.append(len(hold.reads()))
        if len(looks) == 2:
            ended.set()
        return len(looks) < 2

    hold.watch(is_mounted, ended)
    assert looks == [1, 1]
    assert hold.reads() == []
