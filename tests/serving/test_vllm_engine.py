"""vLLM held to the engines' conformance suite, on CPU or GPU: `make test-vllm`. Skipped where vLLM is not installed,
but for what is told without it."""

import gc
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest

from cluster.errors import ArtifactError, UserError
from serving.config import GenerationConfig, VllmConfig
from serving.vllm_engine import VllmEngine
from tests.serving.engine_conformance import WINDOW, EngineConformance, ask, mixed_requests
from tests.serving.fakes import wait_until
from tests.serving.tiny import make_adapter, make_base

INSTALLED = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed; make test-vllm")
GENERATION = GenerationConfig(
    engine="vllm", batch_rows=4, vllm=VllmConfig(enforce_eager=True, max_loras=4, max_lora_rank=16)
)


def start_vllm(base, adapters):
    return VllmEngine(base, adapters, GENERATION, "float32")


def core_pids(engine):
    return [process.pid for process in engine._llm.engine_core.resources.engine_manager.processes]


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.fixture(autouse=True, scope="module")
def little_memory():
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed")
def test_open_without_vllm_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"generation\.engine: vllm is not installed here"):
        start_vllm(tmp_path, {})


@pytest.mark.slow
class TestVllm(EngineConformance):
    __test__ = INSTALLED  # thirty skips would say no more than one

    @pytest.fixture(scope="class")
    def start(self):
        return start_vllm

    def test_load_adapter_of_too_large_a_rank_names_the_setting(self, engine, models, tmp_path):
        large = make_adapter(models.base, tmp_path / "large", 9, rank=32)
        with pytest.raises(ArtifactError, match=r"rank 32, generation\.vllm\.max_lora_rank is 16: set it to 32"):
            engine.load_adapter("large", large)

    def test_load_adapter_without_a_place_names_the_setting_and_takes_one_that_is_freed(
        self, engine, models, reference
    ):
        engine.load_adapter("fourth", models.adapters["raft"])  # every place is taken now: base rows stay base rows
        requests = mixed_requests(8)
        assert [c.text for c in engine.generate(requests)] == [reference(r)[1] for r in requests]
        with pytest.raises(UserError, match=r"`fifth` finds no place: generation\.vllm\.max_loras is 4"):
            engine.load_adapter("fifth", models.adapters["raft"])
        engine.unload_adapter("fourth")
        engine.load_adapter("fifth", models.adapters["raft"])
        engine.unload_adapter("fifth")

    def test_load_adapter_of_dora_is_refused_by_vllm_and_the_engine_lives_on(self, engine, models, tmp_path):
        dora = Path(shutil.copytree(models.adapters["raft"], tmp_path / "dora"))
        config = json.loads((dora / "adapter_config.json").read_text())
        (dora / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
        with pytest.raises(ArtifactError, match="vLLM refuses it"):
            engine.load_adapter("dora", dora)
        assert engine.generate([ask("fine")])[0].finish_reason == "length"

    def test_prefix_is_read_once_by_all_requests_of_an_adapter(self, engine):
        """vLLM tells nothing in a completion: its own count of cached tokens is looked up."""
        system = {"role": "system", "content": "Instructions. " * 30}
        generate, cached = engine._llm.generate, []

        async def watched(*args, **kwargs):
            async for output in generate(*args, **kwargs):
                cached.append(output.num_cached_tokens)
                yield output

        engine._llm.generate = watched
        try:
            for i in range(2):
                engine.generate([ask(f"question {i}", "raft", str(i), system, max_new_tokens=1)])
        finally:
            engine._llm.generate = generate
        assert len(cached) == 2 and cached[0] < 50 and cached[1] >= 256  # whole blocks: of 128 tokens on CPU

    def test_close_ends_vllms_process(self, start, models):
        engine = start(models.base, {})
        pids = core_pids(engine)
        assert pids and not any(map(gone, pids))
        engine.close()
        assert wait_until(lambda: all(map(gone, pids)), 20)

    def test_engine_that_is_forgotten_ends_vllms_process(self, start, models):
        engine = start(models.base, {})
        pids, watch = core_pids(engine), weakref.ref(engine)
        del engine
        gc.collect()
        assert watch() is None
        assert wait_until(lambda: all(map(gone, pids)), 20)


@pytest.mark.slow
@needs_vllm
def test_process_that_is_killed_takes_vllms_process_with_it(tmp_path):
    base = make_base(tmp_path / "base", window=WINDOW, head_dim=32)
    script = tmp_path / "replica.py"
    script.write_text(
        textwrap.dedent(f"""
        import pathlib, time
        from tests.serving.test_vllm_engine import core_pids, start_vllm
        if __name__ == "__main__":
            engine = start_vllm(pathlib.Path({str(base)!r}), {{}})
            print("PIDS", *core_pids(engine), flush=True)
            time.sleep(600)
        """)
    )
    root = Path(__file__).parents[2]
    replica = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    try:
        line = next(line for line in replica.stdout if line.startswith("PIDS"))
        pids = [int(pid) for pid in line.split()[1:]]
        assert pids and not any(map(gone, pids))
    finally:
        replica.send_signal(signal.SIGKILL)
        replica.wait()
    assert wait_until(lambda: all(map(gone, pids)), 20)
