import asyncio
import threading
import time

import pytest

from serving.residents import Residents


class Parts:
    """Loads slowly; notes what happens, and how many load at once."""

    def __init__(self, keep_s=60.0, load_s=0.02):
        self.events, self.load_s, self.at_once, self.most_at_once = [], load_s, 0, 0
        self.residents = Residents(lambda key, thing: self.events.append(f"drop {key}"), keep_s)

    def load(self, key):
        def loads():
            assert threading.current_thread() is not threading.main_thread(), "a load would block the loop"
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            time.sleep(self.load_s)
            self.at_once -= 1
            self.events.append(f"load {key}")
            if key == "bad":
                raise OSError("bad")
            return key.upper()

        return loads

    async def use(self, key, seconds=0.0):
        async with self.residents.held(key, self.load(key)) as thing:
            await asyncio.sleep(seconds)
            return thing


def test_residents_load_each_part_once_one_at_a_time_and_beside_its_users():
    parts = Parts()

    async def all_of_them():
        return await asyncio.gather(*(parts.use(key) for key in ("a", "b", "a", "c", "b")))

    assert asyncio.run(all_of_them()) == ["A", "B", "A", "C", "B"]
    assert parts.events == ["load a", "load b", "load c"] and parts.most_at_once == 1


def test_residents_a_part_that_is_there_is_not_held_up_by_a_load():
    parts = Parts(load_s=0.3)
    parts.residents.add("a", "A")

    async def both():
        slow = asyncio.create_task(parts.use("b"))
        await asyncio.sleep(0.01)
        began = time.perf_counter()
        await parts.use("a")
        took = time.perf_counter() - began
        await slow
        return took

    assert asyncio.run(both()) < 0.2


def test_residents_a_user_who_goes_away_leaves_the_load_to_the_others():
    parts = Parts(load_s=0.1)

    async def leave():
        one, other = asyncio.create_task(parts.use("a")), asyncio.create_task(parts.use("a"))
        await asyncio.sleep(0.02)
        one.cancel()
        return await other

    assert asyncio.run(leave()) == "A" and parts.events == ["load a"]


def test_residents_a_load_that_fails_fails_its_users_and_is_tried_again():
    parts = Parts()

    async def twice():
        for _ in range(2):
            with pytest.raises(OSError, match="bad"):
                await parts.use("bad")

    asyncio.run(twice())
    assert parts.events == ["load bad", "load bad"]


def test_residents_drop_what_is_neither_wanted_nor_used_some_time_after_its_last_use():
    parts = Parts(keep_s=0.2)

    async def use_and_wait():
        await parts.use("old")
        held = asyncio.create_task(parts.use("held", 0.6))
        await parts.use("new")
        parts.residents.keep({"new"})
        await asyncio.sleep(0.1)
        assert "drop old" not in parts.events, "too early"
        await asyncio.sleep(0.4)
        assert "old" not in parts.residents and "held" in parts.residents and "new" in parts.residents
        await held
        await asyncio.sleep(0.5)
        assert "held" not in parts.residents and "new" in parts.residents
        assert await parts.use("old") == "OLD", "what was dropped is loaded when it is asked for again"

    asyncio.run(use_and_wait())
    assert parts.events[3:] == ["drop old", "drop held", "load old"]
