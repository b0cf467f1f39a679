"""The embedded engine held to the engines' conformance suite, and what is particular to it."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from cluster.errors import ArtifactError
from serving import adapted_model, transformers_engine
from serving.prompt_tokens import PromptTokens
from serving.transformers_engine import TransformersEngine
from tests.serving.engine_conformance import RANKS, EngineConformance, ask, mixed_requests
from tests.serving.fakes import wait_until


def start_transformers(base, adapters, batch_rows=4):
    return TransformersEngine(base, adapters, "float32", batch_rows=batch_rows, threads=1)


class TestTransformers(EngineConformance):
    @pytest.fixture(scope="class")
    def start(self):
        return start_transformers

    def test_generate_without_prefix_sharing_or_grouped_attention_says_the_same(self, engine, models, monkeypatch):
        requests = mixed_requests(14)
        shared = [c.text for c in engine.generate(requests)]
        assert engine._model._prefixes, "the prefix path was not taken"
        monkeypatch.setattr(adapted_model, "MIN_PREFIX_TOKENS", 10**6)
        monkeypatch.setattr(adapted_model, "use_grouped_attention", lambda model: None)
        plain = start_transformers(models.base, models.adapters)
        try:
            assert [c.text for c in plain.generate(requests)] == shared
            assert not plain._model._prefixes
        finally:
            plain.close()

    def test_generate_shared_prefix_is_read_once(self, models, monkeypatch, reference):
        engine = start_transformers(models.base, models.adapters, batch_rows=8)
        read = []
        original = engine._model.forward
        monkeypatch.setattr(
            engine._model, "forward", lambda ids, *rest: read.append(tuple(ids.shape)) or original(ids, *rest)
        )
        long = {"role": "system", "content": "Instructions. " * 30}
        requests = [ask(f"long {i}" + " x" * i, "raft", str(i), long, max_new_tokens=4) for i in range(8)]
        try:
            assert [c.text for c in engine.generate(requests)] == [reference(r)[1] for r in requests]
            first = [shape for shape in read if shape[1] > 1]
            assert len(first) == 2 and first[0][0] == 1 and first[0][1] > 400 and first[1][1] < 100
            engine.generate(requests)
            assert len([shape for shape in read if shape[1] > 1]) == 3, "the second time only the questions are read"
        finally:
            engine.close()

    def test_generate_failing_step_ends_its_rows_and_not_the_engine(self, engine, monkeypatch, reference):
        original = engine._model.forward
        calls = iter(range(1000))

        def broken(*args):
            if next(calls) == 3:
                raise RuntimeError("out of memory\nand a traceback")
            return original(*args)

        monkeypatch.setattr(engine._model, "forward", broken)
        failed = engine.generate([ask("one"), ask("two", "raft")])
        assert {c.error_code for c in failed} == {"internal"} and "traceback" not in failed[0].error
        assert engine.alive
        assert engine.generate([ask("one")])[0].text == reference(ask("one"))[1]

    def test_stream_cancelled_frees_its_slot(self, engine):
        stream = engine.stream(ask("endless", max_new_tokens=900))
        next(iter(stream))
        stream.cancel()
        stream.result()
        assert wait_until(lambda: not engine._active())

    def test_prefill_is_bounded_by_padded_tokens(self, engine, monkeypatch, reference):
        monkeypatch.setattr(transformers_engine, "PREFILL_TOKENS", 200)
        requests = mixed_requests(8)
        assert [c.text for c in engine.generate(requests)] == [reference(r)[1] for r in requests]

    def test_generate_dora_adapter_runs_in_batches_of_its_own(self, engine, models, reference, tmp_path):
        """PEFT refuses to mix such rows with others; loaded while others run, it must not end them."""
        torch.manual_seed(4)
        tuned = get_peft_model(
            LlamaForCausalLM.from_pretrained(models.base),
            LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, task_type="CAUSAL_LM"),
        )
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        tuned.save_pretrained(tmp_path / "dora")
        running = [engine.submit(r) for r in mixed_requests(4)]
        engine.load_adapter("dora", tmp_path / "dora")
        requests = [ask(f"question {i}", adapter) for i, adapter in enumerate(("dora", "raft", None, "dora"))]
        found = engine.generate(requests)
        engine.unload_adapter("dora")
        assert [t.completion.result().text for t in running] == [reference(r)[1] for r in mixed_requests(4)]
        assert [c.text for c in found[1:3]] == [reference(r)[1] for r in requests[1:3]]
        alone = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(models.base), tmp_path / "dora").eval()
        for request, completion in ((requests[0], found[0]), (requests[3], found[3])):
            ids = torch.tensor([engine._model.tokens.encode(request.messages)])
            said = alone.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
            assert completion.text == engine._model.tokens.decode(said)

    def test_unload_the_last_adapter_leaves_the_plain_base_model(self, models, reference):
        engine = start_transformers(models.base, {})
        try:
            for _ in range(2):
                engine.load_adapter("raft", models.adapters["raft"])
                assert engine.generate([ask("q", "raft")])[0].text == reference(ask("q", "raft"))[1]
                engine.unload_adapter("raft")
            assert not [name for name, _ in engine._model._slots.model.named_modules() if "lora" in name]
            assert engine.generate([ask("q")])[0].text == reference(ask("q"))[1]
        finally:
            engine.close()

    def test_load_adapter_from_many_threads_at_once_loads_each_once(self, models, reference):
        engine = start_transformers(models.base, {})
        try:
            with ThreadPoolExecutor(6) as threads:
                list(threads.map(lambda name: engine.load_adapter(name, models.adapters[name]), [*RANKS] * 2))
            assert set(engine.adapters) == set(RANKS) and len(engine._model._slots) == 3
            requests = mixed_requests(8)
            assert [c.text for c in engine.generate(requests)] == [reference(r)[1] for r in requests]
        finally:
            engine.close()

    def test_load_adapter_reads_files_beside_running_rows(self, engine, models, monkeypatch):
        """The engine's thread goes on while an adapter's files are read, however long that takes."""
        original = engine._model.read

        def slow(name, directory):
            before = len(pieces)
            assert wait_until(lambda: len(pieces) > before + 20)
            return original(name, directory)

        monkeypatch.setattr(engine._model, "read", slow)
        pieces = []
        ticket = engine.submit(ask("long", "raft", max_new_tokens=900), pieces.append)
        engine.load_adapter("slow", models.adapters["third"])
        ticket.cancel()
        engine.unload_adapter("slow")

    def test_open_end_of_turn_named_in_the_generation_settings_ends_the_text(self, models, tmp_path):
        base = shutil.copytree(models.base, tmp_path / "base")
        ids = torch.tensor([PromptTokens(base).encode(ask("end").messages)])
        said = LlamaForCausalLM.from_pretrained(base).generate(input_ids=ids, max_new_tokens=12, do_sample=False)
        tokens = said[0, ids.shape[1] :].tolist()
        path = base / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [tokens[3]]}))
        engine = start_transformers(base, {})
        try:
            completion = engine.generate([ask("end")])[0]
            assert (completion.finish_reason, completion.completion_tokens) == ("stop", tokens.index(tokens[3]))
        finally:
            engine.close()

    def test_open_adapter_of_another_base_is_refused(self, models, tiny_models):
        with pytest.raises(ArtifactError, match=r"adapter `raft`.*does not fit"):
            start_transformers(models.base, {"raft": tiny_models.adapters["raft"]})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestTransformersOnGpu(EngineConformance):
    @pytest.fixture(scope="class")
    def start(self):
        return lambda base, adapters: TransformersEngine(base, adapters, "float32", batch_rows=4, device="cuda")

    def test_engine_in_bfloat16_stands_on_the_device_with_its_adapters(self, models):
        engine = TransformersEngine(models.base, models.adapters, "auto", device="cuda")
        try:
            placed = {(str(p.device.type), p.dtype) for p in engine._model._slots.model.parameters()}
            assert placed == {("cuda", torch.bfloat16)}
            assert {c.finish_reason for c in engine.generate(mixed_requests(8))} <= {"length", "stop"}
        finally:
            engine.close()
