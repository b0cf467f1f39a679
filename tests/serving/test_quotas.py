import asyncio
import pickle
import time

import pytest

from cluster.errors import UserError
from serving.api_errors import ApiError
from serving.config import TenantConfig
from serving.interfaces import ANYBODY, Caller, FeedbackUnavailableError
from serving.quotas import DAY_S, HandleLedger, KeyQuotas, QuotaLedger, QuotaReplica, Refusal, has_quotas, open_ledger
from serving.token_use import TokenUse

TENANTS = {
    "minute": TenantConfig(requests_per_minute=3),
    "day": TenantConfig(tokens_per_day=100),
    "both": TenantConfig(requests_per_minute=3, tokens_per_day=100),
    "free": TenantConfig(),
}
NOON = 20_000 * DAY_S + DAY_S / 2


class Clock:
    def __init__(self, now=NOON):
        self.now = now

    def __call__(self):
        return self.now


def caller(tenant, key="k-1"):
    return Caller(tenant=tenant, key_id=key)


def setup(store=None):
    clock = Clock()
    ledger = QuotaLedger(store, clock)
    return KeyQuotas(TENANTS, ledger), ledger, clock


async def refusal(quotas, who):
    with pytest.raises(ApiError) as raised:
        await quotas.admit(who)
    return raised.value


async def spent(quotas, who, tokens):
    """Counts tokens and waits until they are counted."""
    quotas.spend(who, tokens)
    await asyncio.gather(*quotas._spending)


def test_requests_beyond_the_minutes_quota_are_429_and_retry_after_is_exact():
    async def story():
        quotas, _, clock = setup()
        for second in (0, 10, 20):
            clock.now = NOON + second
            await quotas.admit(caller("minute"))
        clock.now = NOON + 25.5
        error = await refusal(quotas, caller("minute"))
        assert (error.status, error.code) == (429, "rate_limit_exceeded")
        assert error.headers()["Retry-After"] == "35"  # 34.5 s, in whole seconds
        clock.now = NOON + 59.9
        await refusal(quotas, caller("minute"))
        clock.now = NOON + 25.5 + 35
        await quotas.admit(caller("minute"))
        assert (await refusal(quotas, caller("minute"))).retry_after_s == 10  # the next leaves the minute at 70

    asyncio.run(story())


def test_no_minute_holds_more_than_the_quota_whenever_requests_come():
    async def story():
        quotas, _, clock = setup()
        admitted = []
        for step in range(600):  # one every 0.7 s: refused ones must not count
            clock.now = NOON + 0.7 * step
            try:
                await quotas.admit(caller("minute"))
                admitted.append(clock.now)
            except ApiError:
                pass
        assert max(sum(0 <= late - early < 60 for late in admitted) for early in admitted) == 3
        assert len(admitted) == 3 * 7, "420 s are 7 minutes, each used in full"

    asyncio.run(story())


def test_keys_of_a_tenant_count_apart():
    async def story():
        quotas, _, _ = setup()
        for _ in range(3):
            await quotas.admit(caller("minute", "k-1"))
        await refusal(quotas, caller("minute", "k-1"))
        await quotas.admit(caller("minute", "k-2"))

    asyncio.run(story())


def test_tokens_beyond_the_days_quota_are_429_until_midnight_utc():
    async def story():
        quotas, _, clock = setup()
        await spent(quotas, caller("day"), 99)
        await quotas.admit(caller("day"))
        await spent(quotas, caller("day"), 50)  # what is under way goes on
        error = await refusal(quotas, caller("day"))
        assert (error.code, error.retry_after_s) == ("insufficient_quota", DAY_S // 2)
        clock.now = 20_001 * DAY_S
        await quotas.admit(caller("day"))

    asyncio.run(story())


def test_a_request_that_takes_no_tokens_counts_for_the_minute_alone():
    async def story():
        quotas, _, _ = setup()
        await spent(quotas, caller("both"), 100)
        assert (await refusal(quotas, caller("both"))).code == "insufficient_quota"
        for _ in range(3):
            await quotas.admit(caller("both"), takes_tokens=False)
        with pytest.raises(ApiError) as raised:
            await quotas.admit(caller("both"), takes_tokens=False)
        assert raised.value.code == "rate_limit_exceeded"

    asyncio.run(story())


def test_a_request_refused_for_its_tokens_is_no_request_of_the_minute():
    async def story():
        quotas, _, clock = setup()
        clock.now = 20_001 * DAY_S - 5
        await spent(quotas, caller("both"), 100)
        for _ in range(5):
            await refusal(quotas, caller("both"))
        clock.now += 5
        for _ in range(3):
            await quotas.admit(caller("both"))

    asyncio.run(story())


class Unreachable:
    def __init__(self, wait_s=0.0):
        self.asked = 0
        self.wait_s = wait_s

    async def take(self, *_):
        self.asked += 1
        await asyncio.sleep(self.wait_s)
        raise ConnectionError

    spend = take


@pytest.mark.parametrize("who", [ANYBODY, caller("free"), caller("unknown"), caller("minute", "")])
def test_whoever_has_no_quota_asks_no_ledger(who):
    async def story():
        ledger = Unreachable()
        quotas = KeyQuotas(TENANTS, ledger)
        await quotas.admit(who)
        quotas.spend(who, 10)
        await asyncio.sleep(0)
        assert ledger.asked == 0

    asyncio.run(story())


def test_an_unreachable_ledger_lets_in_and_says_so_once(caplog):
    async def story():
        ledger = Unreachable()
        quotas = KeyQuotas(TENANTS, ledger)
        for _ in range(5):
            await quotas.admit(caller("both"))
            await spent(quotas, caller("both"), 10)
        assert ledger.asked == 10

    asyncio.run(story())
    assert [record.message for record in caplog.records] == [
        "quotas cannot be counted, requests are let in: ConnectionError"
    ]


def test_a_ledger_that_does_not_answer_holds_nobody_up(monkeypatch):
    monkeypatch.setattr("serving.quotas.LEDGER_TIMEOUT_S", 0.05)
    began = time.monotonic()
    asyncio.run(KeyQuotas(TENANTS, Unreachable(wait_s=30)).admit(caller("minute")))
    assert time.monotonic() - began < 5


def test_tokens_of_the_day_outlast_a_restart(tmp_path):
    url = f"sqlite:///{tmp_path}/feedback.db"

    async def before():
        quotas, ledger, _ = setup(TokenUse(url, "recipe"))
        await spent(quotas, caller("day"), 60)
        await spent(quotas, caller("day"), 30)
        await spent(quotas, caller("day", "k-2"), 5)
        await ledger.save()
        await spent(quotas, caller("day"), 10)
        ledger.close()  # writes the rest

    async def after():
        quotas, ledger, clock = setup(TokenUse(url, "recipe"))
        await refusal(quotas, caller("day"))
        await quotas.admit(caller("day", "k-2"))
        clock.now += DAY_S
        await quotas.admit(caller("day"))
        await spent(quotas, caller("day"), 1)
        await ledger.save()
        ledger.close()

    asyncio.run(before())
    asyncio.run(after())
    kept = TokenUse(url, "recipe")
    assert kept.load(20_000) == {}, "yesterday's rows are gone"
    assert kept.load(20_001) == {"k-1": 1}
    assert TokenUse(url, "other").load(20_001) == {}


def test_counts_go_on_while_the_database_is_away_and_are_written_later(tmp_path, caplog):
    store = TokenUse(f"sqlite:///{tmp_path}/feedback.db", "recipe")
    works = store.add

    def fails(*_):
        raise FeedbackUnavailableError("gone")

    async def story():
        quotas, ledger, _ = setup(store)
        store.add = fails
        await spent(quotas, caller("day"), 60)
        await ledger.save()
        await spent(quotas, caller("day"), 30)
        store.add = works
        await ledger.save()
        assert store.load(20_000) == {"k-1": 90}
        ledger.close()

    asyncio.run(story())
    assert "not saved" in caplog.text


def test_saving_starts_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.quotas.SAVE_EVERY_S", 0.01)
    store = TokenUse(f"sqlite:///{tmp_path}/feedback.db", "recipe")

    async def story():
        quotas, ledger, _ = setup(store)
        for more in (1, 2):
            await spent(quotas, caller("day"), more)
            await ledger._saver
        assert store.load(20_000) == {"k-1": 3}
        ledger.close()

    asyncio.run(story())


def test_without_a_database_the_ledger_counts_in_memory(tmp_path, caplog):
    async def story(ledger):
        await ledger.spend("k-1", 5)
        assert await ledger.take("k-1", None, 5) == Refusal("tokens_per_day", pytest.approx(DAY_S / 2, abs=DAY_S / 2))
        ledger.close()

    asyncio.run(story(open_ledger("", "recipe")))
    with pytest.raises(UserError, match=r"feedback\.url"):
        open_ledger("mysql://x/y", "recipe")


def test_the_shared_ledger_answers_through_a_handle(tmp_path):
    """The handle's shape is Serve's: `handle.method.remote(…)`, awaited."""

    class Remote:
        def __init__(self, method):
            self.remote = method

    class Handle:
        def __init__(self, replica):
            self.take, self.spend = Remote(replica.take), Remote(replica.spend)

    async def story():
        replica = QuotaReplica(f"sqlite:///{tmp_path}/feedback.db", "recipe")
        first, second = (KeyQuotas(TENANTS, HandleLedger(Handle(replica))) for _ in range(2))
        for quotas in (first, second, first):
            await quotas.admit(caller("both"))
        assert (await refusal(second, caller("both"))).code == "rate_limit_exceeded"
        await spent(first, caller("day"), 100)
        assert (await refusal(second, caller("day"))).code == "insufficient_quota"

    asyncio.run(story())
    assert pickle.loads(pickle.dumps(Refusal("tokens_per_day", 1.0))) == Refusal("tokens_per_day", 1.0)


def test_has_quotas_tells_whether_anything_is_counted():
    assert has_quotas(TENANTS)
    assert not has_quotas({"free": TenantConfig()})
