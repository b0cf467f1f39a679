import json
import shutil
import threading

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from cluster.errors import ArtifactError
from serving import adapted_model, transformers_engine
from serving.engine import GenerationRequest
from serving.transformers_engine import TransformersEngine
from tests.serving.fakes import wait_until
from tests.serving.tiny import WINDOW, make_adapter, make_base

SYSTEM = {"role": "system", "content": "Answer the question from the documents, in a few words."}


def ask(text, adapter=None, request_id="r", system=SYSTEM, **settings):
    settings = {"max_new_tokens": 16, **settings}
    return GenerationRequest(request_id, (system, {"role": "user", "content": text}), adapter, **settings)


def mixed_requests(n=14):
    """Different lengths of prompt and answer, adapters in turn."""
    adapters = (None, "raft", "finetuned")
    return [
        ask("word " * (i * 5 % 11) + f"question {i}", adapters[i % 3], str(i), max_new_tokens=8 + 3 * (i % 5))
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def engine(tiny_models):
    engine = TransformersEngine(tiny_models.base, tiny_models.adapters, "float32", batch_rows=4, threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(tiny_models):
    """What transformers' own `generate` says with one PEFT model at a time: nothing shared with the engine."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.base)
    models = {None: LlamaForCausalLM.from_pretrained(tiny_models.base).eval()}
    for name, path in tiny_models.adapters.items():
        models[name] = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_models.base), path).eval()

    def greedy(request):
        ids = tokenizer.apply_chat_template(list(request.messages), add_generation_prompt=True, return_tensors="pt")
        ids = ids["input_ids"]
        with torch.inference_mode():
            out = models[request.adapter].generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request.max_new_tokens,
                do_sample=False,
            )
        return ids.shape[1], tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return greedy


def test_generate_mixed_adapters_equal_each_model_alone(engine, reference):
    requests = mixed_requests()
    completions = engine.generate(requests)
    assert [c.request_id for c in completions] == [r.request_id for r in requests]
    assert [(c.prompt_tokens, c.text) for c in completions] == [reference(r) for r in requests]
    texts = {reference(ask("same", adapter, max_new_tokens=12))[1] for adapter in (None, "raft", "finetuned")}
    assert len(texts) == 3, "the adapters must change what is said, or this test compares nothing"


def test_generate_without_prefix_sharing_or_grouped_attention_says_the_same(engine, tiny_models, monkeypatch):
    requests = mixed_requests()
    shared = [c.text for c in engine.generate(requests)]
    monkeypatch.setattr(adapted_model, "MIN_PREFIX_TOKENS", 10**6)
    monkeypatch.setattr(adapted_model, "use_grouped_attention", lambda model: None)
    plain = TransformersEngine(tiny_models.base, tiny_models.adapters, "float32", batch_rows=4, threads=1)
    try:
        assert [c.text for c in plain.generate(requests)] == shared
        assert not plain._model._prefixes
    finally:
        plain.close()
    assert engine._model._prefixes, "the prefix path was not taken"


def test_generate_shared_prefix_is_read_once(tiny_models, monkeypatch, reference):
    engine = TransformersEngine(tiny_models.base, tiny_models.adapters, "float32", batch_rows=8, threads=1)
    read = []
    original = engine._model.forward
    monkeypatch.setattr(
        engine._model, "forward", lambda ids, *rest: read.append(tuple(ids.shape)) or original(ids, *rest)
    )
    long = {"role": "system", "content": "Instructions. " * 30}
    requests = [ask(f"question {i}" + " x" * i, "raft", str(i), long, max_new_tokens=4) for i in range(8)]
    try:
        assert [c.text for c in engine.generate(requests)] == [reference(r)[1] for r in requests]
        first = [shape for shape in read if shape[1] > 1]
        assert len(first) == 2 and first[0][0] == 1 and first[0][1] > 400 and first[1][1] < 100
        engine.generate(requests)
        assert len([shape for shape in read if shape[1] > 1]) == 3, "the second time only the questions are read"
    finally:
        engine.close()


def test_generate_sampling_depends_on_the_seed_and_not_on_neighbours(engine):
    alone = engine.generate([ask("roll", seed=5, temperature=1.5)])[0].text
    crowd = [ask(f"other {i}", "raft", temperature=1.5, seed=i) for i in range(3)]
    beside = engine.generate([*crowd, ask("roll", seed=5, temperature=1.5)])[-1].text
    other = engine.generate([ask("roll", seed=6, temperature=1.5)])[0].text
    assert alone == beside != other


def test_generate_stop_string_ends_before_it(engine, reference):
    full = reference(ask("stop here", max_new_tokens=16))[1]
    stop = full[5:7]
    completion = engine.generate([ask("stop here", stop=(stop,))])[0]
    assert completion.finish_reason == "stop"
    assert completion.text == full[: full.index(stop)]


def test_generate_limits_and_counts_tokens(engine, tiny_models):
    completion = engine.generate([ask("count", max_new_tokens=7)])[0]
    assert (completion.finish_reason, completion.completion_tokens) == ("length", 7)
    assert completion.generation_ms > 0


def test_generate_end_of_turn_token_ends_the_text(tiny_models, tmp_path):
    base = shutil.copytree(tiny_models.base, tmp_path / "base")
    request = ask("end", max_new_tokens=16)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer.apply_chat_template(list(request.messages), add_generation_prompt=True, return_tensors="pt")
    said = LlamaForCausalLM.from_pretrained(base).generate(**ids, max_new_tokens=16, do_sample=False)
    tokens = said[0, ids["input_ids"].shape[1] :].tolist()
    path = base / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [tokens[3]]}))
    engine = TransformersEngine(base, {}, "float32", threads=1)
    try:
        completion = engine.generate([request])[0]
        assert completion.finish_reason == "stop"
        assert completion.completion_tokens == tokens.index(tokens[3])
    finally:
        engine.close()


def test_generate_prompt_over_the_window_fails_alone(engine):
    long, fine = engine.generate([ask("x" * WINDOW), ask("fine")])
    assert (long.finish_reason, long.error_code) == ("error", "context_length_exceeded")
    assert str(WINDOW) in long.error
    assert fine.finish_reason == "length" and not fine.error


def test_generate_unknown_adapter_fails_alone_and_names_those_loaded(engine):
    unknown, fine = engine.generate([ask("a", "nobody"), ask("b", "raft")])
    assert unknown.error_code == "unknown_adapter" and "raft, finetuned" in unknown.error
    assert fine.finish_reason == "length"


def test_generate_failing_step_ends_its_rows_and_not_the_engine(engine, monkeypatch, reference):
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


def test_stream_pieces_join_to_the_completion(engine, reference):
    request = ask("stream me", "finetuned", max_new_tokens=24)
    stream = engine.stream(request)
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == stream.result().text == reference(request)[1]


def test_stream_joins_a_running_batch_and_both_are_exact(engine, reference):
    first = ask("the first", "raft", max_new_tokens=60)
    stream = engine.stream(first)
    pieces = iter(stream)
    begun = next(pieces)
    second = ask("the second", "finetuned", max_new_tokens=5)
    assert engine.generate([second])[0].text == reference(second)[1]
    assert not stream.result().error
    assert begun + "".join(pieces) == reference(first)[1]


def test_stream_cancelled_frees_its_slot(engine):
    stream = engine.stream(ask("endless", max_new_tokens=3000))
    next(iter(stream))
    stream.cancel()
    assert stream.result().error_code == "cancelled"
    assert wait_until(lambda: not engine._active())
    assert stream.result().completion_tokens < 3000


def test_submit_reader_that_fails_is_cancelled(engine):
    def broken(text):
        raise ConnectionError("gone")

    ticket = engine.submit(ask("x", max_new_tokens=3000), broken)
    assert ticket.completion.result(30).error_code == "cancelled"


def test_submit_from_many_threads_each_gets_its_own(engine, reference):
    requests = mixed_requests(9)
    found = {}
    threads = [
        threading.Thread(target=lambda r=r: found.update({r.request_id: engine.generate([r])[0].text}))
        for r in requests
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {r.request_id: reference(r)[1] for r in requests}


def test_close_ends_what_is_under_way_and_what_comes_later(tiny_models):
    engine = TransformersEngine(tiny_models.base, {}, "float32", batch_rows=1, threads=1)
    running = engine.submit(ask("running", max_new_tokens=3000))
    waiting = engine.submit(ask("waiting"))
    engine.close()
    engine.close()
    assert not engine.alive
    assert {ticket.completion.result(5).error_code for ticket in (running, waiting)} == {"closed"}
    assert engine.generate([ask("late")])[0].error_code == "closed"


def test_prefill_is_bounded_by_padded_tokens(engine, monkeypatch, reference):
    monkeypatch.setattr(transformers_engine, "PREFILL_TOKENS", 200)
    requests = mixed_requests(8)
    assert [c.text for c in engine.generate(requests)] == [reference(r)[1] for r in requests]


def test_open_adapter_of_another_base_is_refused(tiny_models, tmp_path):
    other = make_base(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    model = LlamaForCausalLM.from_pretrained(other)
    smaller = type(model)(type(model.config)(**{**config, "hidden_size": 32, "head_dim": 8}))
    smaller.save_pretrained(other)
    adapter = make_adapter(other, tmp_path / "adapter", 3)
    with pytest.raises(ArtifactError, match=r"adapter `raft`.*does not fit"):
        TransformersEngine(tiny_models.base, {"raft": adapter}, "float32", threads=1)


def test_open_adapter_without_safetensors_is_refused_unread(tiny_models, tmp_path):
    adapter = shutil.copytree(tiny_models.adapters["raft"], tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ArtifactError, match=r"no adapter_model\.safetensors"):
        TransformersEngine(tiny_models.base, {"raft": adapter}, "float32", threads=1)
