"""What Ray Serve itself takes: requests per second of a no-op graph of two hops, in the settings that Ray offers.

    python -m benchmarks.serving_hops [--rounds 3] [--requests 2000] [--clients 32]

Each setting is a process of its own (Ray reads its variables when it starts): an ingress that awaits one handle, which
awaits another. Settings alternate. Prints requests per second and each setting ÷ Ray's default.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from benchmarks.conditions import describe_conditions, describe_ratio

SETTINGS = {
    "default": {},
    "throughput-optimised": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
    "throughput-optimised, HAProxy": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1"},
}
PORT = 8019
WARM_UP = 200
LIMIT_S = 300


def measure(requests: int, clients: int) -> float:
    """Requests per second, in this process's setting."""
    from fastapi import FastAPI
    from ray import serve

    from benchmarks.http_load import run_load
    from cluster.config import RayConfig
    from cluster.session import ray_session

    api = FastAPI()
    options = {"max_ongoing_requests": 1000, "ray_actor_options": {"num_cpus": 0.1}}

    @serve.deployment(**options)
    class Last:
        async def answer(self) -> int:
            return 1

    @serve.deployment(**options)
    class Middle:
        def __init__(self, last: serve.handle.DeploymentHandle) -> None:
            self._last = last

        async def answer(self) -> int:
            return int(await self._last.answer.remote()) + 1

    @serve.deployment(**options)
    @serve.ingress(api)
    class First:
        def __init__(self, middle: serve.handle.DeploymentHandle) -> None:
            self._middle = middle

        @api.post("/")
        async def answer(self) -> dict[str, int]:
            return {"hops": int(await self._middle.answer.remote())}

    url = f"http://127.0.0.1:{PORT}/"
    with ray_session(RayConfig()):
        quiet = {"log_level": "ERROR", "enable_access_log": False}
        serve.start(http_options={"host": "127.0.0.1", "port": PORT}, logging_config=quiet)
        serve.run(First.bind(Middle.bind(Last.bind())))
        try:
            run_load(url, [{}] * WARM_UP, clients)
            run = run_load(url, [{}] * requests, clients)
        finally:
            serve.shutdown()
    assert all(reply.body == {"hops": 2} for reply in run.replies), "every request takes both hops"
    return len(run.replies) / run.seconds


def main() -> None:
    """Parses the command line and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(f"rate {measure(given.requests, given.clients)}")
        return
    rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for number in range(given.rounds):
        for name, variables in SETTINGS.items():
            command = [sys.executable, "-m", "benchmarks.serving_hops", "--measure"]
            command += ["--requests", str(given.requests), "--clients", str(given.clients)]
            done = subprocess.run(
                command, env={**os.environ, **variables}, capture_output=True, text=True, check=False, timeout=LIMIT_S
            )
            found = [line for line in done.stdout.splitlines() if line.startswith("rate ")]
            if not found:
                raise SystemExit(f"{name} failed:\n{(done.stdout + done.stderr)[-2000:]}")
            rates[name].append(float(found[0].split()[1]))
            print(f"round {number + 1}: {name}: {rates[name][-1]:.0f} requests/s", flush=True)
    print(describe_conditions(("ray",), 0))
    for name, found_rates in rates.items():
        print(f"{name}: median {statistics.median(found_rates):.0f} requests/s")
        if name != "default":
            print("  " + describe_ratio("÷ default", found_rates, rates["default"]))


if __name__ == "__main__":
    main()
