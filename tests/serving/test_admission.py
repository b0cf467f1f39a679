from contextlib import ExitStack

import pytest

from serving.admission import Admission
from serving.api_errors import ApiError


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def finish(admission, clock, seconds, times=60):
    """Requests of this duration, one after the other."""
    for _ in range(times):
        with admission.slot():
            clock.now += seconds


def refuse(admission):
    with pytest.raises(ApiError) as refused, admission.slot():
        pass
    assert refused.value.status == 429 and f"try again in {refused.value.retry_after_s} s" in str(refused.value)
    return refused.value.retry_after_s


def test_slots_are_given_up_to_the_limit_and_come_back(clock):
    heard = []
    admission = Admission(2, heard.append, clock)
    with admission.slot(), admission.slot():
        refuse(admission)
        assert admission.in_flight == 2
    with pytest.raises(KeyError), admission.slot():
        raise KeyError
    assert admission.in_flight == 0 and heard == [1, 2, 1, 0, 1, 0]


def test_retry_after_follows_what_requests_take(clock):
    admission = Admission(1, clock=clock)
    finish(admission, clock, 20.0)
    with admission.slot():
        assert refuse(admission) == pytest.approx(20 * 2, abs=1)  # the next slot is for the one refused before


def test_retry_after_grows_with_the_callers_who_were_refused(clock):
    """Four times the capacity: of 64 requests 16 are admitted, and the others fill three more rounds."""
    admission = Admission(16, clock=clock)
    finish(admission, clock, 8.0)
    with ExitStack() as slots:
        for _ in range(16):
            slots.enter_context(admission.slot())
        waits = [refuse(admission) for _ in range(48)]
        assert waits[0] == 1 and waits == sorted(waits) and 24 <= waits[-1] <= 26
        clock.now += 9.0  # those refused longer ago have had their turn
        assert refuse(admission) <= 2


def test_retry_after_has_an_end(clock):
    admission = Admission(1, clock=clock)
    finish(admission, clock, 300.0)
    with admission.slot():
        assert [refuse(admission) for _ in range(20)][-1] == 60
