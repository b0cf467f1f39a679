"""What every engine must do, whatever runs inside: one suite, run against each (test_transformers_engine.py,
test_vllm_engine.py). A subclass gives the fixture `start`: a function that starts an engine."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from cluster.errors import ArtifactError, UserError
from serving.engine import GenerationRequest
from serving.prompt_tokens import PromptTokens
from tests.serving.tiny import make_adapter, make_base, make_speaker

WINDOW = 1024
SPOKEN = "é首🙂 abcdefSTOPuvw"  # no byte twice; characters of two, three and four bytes
SYSTEM = {"role": "system", "content": "Answer the question from the documents, in a few words."}
RANKS = {"raft": 4, "adapter/finetuned/1.2": 8, "third": 16}
ADAPTERS = (None, *RANKS)


@dataclass(frozen=True)
class Models:
    base: Path
    adapters: dict[str, Path]
    speaker: Path


def ask(text, adapter=None, request_id="r", system=SYSTEM, **settings):
    settings = {"max_new_tokens": 12, **settings}
    return GenerationRequest(request_id, (system, {"role": "user", "content": text}), adapter, **settings)


def mixed_requests(n):
    """Different lengths of prompt and answer, base and adapters in turn."""
    return [
        ask("word " * (i * 5 % 11) + f"question {i}", ADAPTERS[i % 4], str(i), max_new_tokens=4 + 3 * (i % 5))
        for i in range(n)
    ]


class EngineConformance:
    @pytest.fixture(scope="class")
    def models(self, tmp_path_factory):
        directory = tmp_path_factory.mktemp("conformance")
        base = make_base(directory / "base", window=WINDOW, head_dim=32)
        adapters = {
            name: make_adapter(base, directory / f"adapter{seed}", seed, rank)
            for seed, (name, rank) in enumerate(RANKS.items(), start=1)
        }
        return Models(base, adapters, make_speaker(directory / "speaker", SPOKEN))

    @pytest.fixture(scope="class")
    def engine(self, start, models):
        engine = start(models.base, models.adapters)
        yield engine
        engine.close()

    @pytest.fixture(scope="class")
    def speaker(self, start, models):
        engine = start(models.speaker, {})
        yield engine
        engine.close()

    @pytest.fixture(scope="class")
    def reference(self, models):
        """What transformers' own `generate` says with one PEFT model at a time: (prompt tokens, text)."""
        tokenizer = AutoTokenizer.from_pretrained(models.base)
        plain = {None: LlamaForCausalLM.from_pretrained(models.base).eval()}
        for name, path in models.adapters.items():
            plain[name] = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(models.base), path).eval()
        known = {}

        def greedy(request):
            key = (request.messages[-1]["content"], request.adapter, request.max_new_tokens)
            if key not in known:
                messages = list(request.messages)
                ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
                ids = ids["input_ids"]
                with torch.inference_mode():
                    out = plain[request.adapter].generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=request.max_new_tokens,
                        do_sample=False,
                    )
                text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
                known[key] = (ids.shape[1], text)
            return known[key]

        return greedy

    def test_generate_mixed_adapters_equal_each_model_alone(self, engine, reference):
        requests = mixed_requests(12)
        completions = engine.generate(requests)
        assert [c.request_id for c in completions] == [r.request_id for r in requests]
        assert [(c.prompt_tokens, c.text) for c in completions] == [reference(r) for r in requests]
        texts = {reference(ask("same", adapter))[1] for adapter in ADAPTERS}
        assert len(texts) == 4, "the adapters must change what is said, or this test compares nothing"

    def test_submit_64_mixed_requests_at_once_each_gets_its_own(self, engine, reference):
        """Base and three adapters, streamed and whole, long and short, every ninth cancelled after its first piece."""
        requests = mixed_requests(64)
        begun = threading.Barrier(16)

        def whole(request):
            return engine.generate([request])[0].text

        def streamed(request):
            stream = engine.stream(request)
            text = "".join(stream)
            assert text == stream.result().text
            return text

        def cancelled(request):
            stream = engine.stream(request)
            next(iter(stream), "")
            stream.cancel()
            return stream.result().text

        def serve(place):
            if place < 16:
                begun.wait(60)
            kind = cancelled if place % 9 == 4 else (whole, streamed)[place // 4 % 2]
            return kind(requests[place])

        with ThreadPoolExecutor(16) as threads:
            said = list(threads.map(serve, range(64)))
        for place, (request, text) in enumerate(zip(requests, said, strict=True)):
            expected = reference(request)[1]
            if place % 9 == 4:  # where the cut fell inside a character, its first bytes show as U+FFFD
                assert expected.startswith(text.rstrip("\ufffd")), place
            else:
                assert text == expected, place

    def test_generate_other_neighbours_change_nothing(self, engine):
        watched = ask("watched", "raft", "w", max_new_tokens=16)
        crowds = [
            [ask(f"{word} {i}", adapter, f"{word}{i}", max_new_tokens=16) for i in range(5)]
            for word, adapter in (("alpha", None), ("gamma", "third"), ("omega", "raft"))
        ]
        found = {engine.generate([*crowd, watched])[-1].text for crowd in crowds}
        assert len(found) == 1

    def test_generate_sampling_depends_on_the_seed_and_not_on_neighbours(self, engine):
        alone = engine.generate([ask("roll", seed=5, temperature=1.5)])[0].text
        crowd = [ask(f"other {i}", "raft", temperature=1.5, seed=i) for i in range(3)]
        beside = engine.generate([*crowd, ask("roll", seed=5, temperature=1.5)])[-1].text
        other = engine.generate([ask("roll", seed=6, temperature=1.5)])[0].text
        assert alone == beside != other

    def test_generate_top_p_zero_is_greedy(self, engine, reference):
        completion = engine.generate([ask("roll", seed=5, temperature=1.5, top_p=0.0)])[0]
        assert completion.text == reference(ask("roll"))[1]

    def test_generate_limits_and_counts_tokens(self, engine, reference):
        completion = engine.generate([ask("count", max_new_tokens=7)])[0]
        assert (completion.finish_reason, completion.completion_tokens) == ("length", 7)
        assert completion.prompt_tokens == reference(ask("count"))[0]
        assert completion.generation_ms > 0

    def test_prompt_tokens_counts_what_the_engine_reads(self, engine, models):
        tokens = PromptTokens(models.base)
        for request in mixed_requests(4):
            assert tokens.count(request.messages) == engine.generate([request])[0].prompt_tokens
        assert tokens.window == WINDOW

    def test_generate_end_of_turn_ends_the_text_and_is_not_counted(self, speaker):
        completion = speaker.generate([ask("speak", max_new_tokens=100)])[0]
        assert (completion.text, completion.finish_reason) == (SPOKEN, "stop")
        assert completion.completion_tokens == len(SPOKEN.encode())

    def test_generate_stop_string_across_tokens_ends_before_it(self, speaker):
        before, _ = SPOKEN.split("STOP")
        request = ask("speak", max_new_tokens=100, stop=("nowhere", "STOP"))
        completion = speaker.generate([request])[0]
        assert (completion.text, completion.finish_reason) == (before, "stop")
        assert completion.completion_tokens == len(before.encode())
        stream = speaker.stream(request)
        pieces = list(stream)
        assert "".join(pieces) == before == stream.result().text
        assert len(pieces) > 3 and not any("S" in piece for piece in pieces)

    def test_generate_stop_string_that_never_comes_changes_nothing(self, speaker):
        completion = speaker.generate([ask("speak", max_new_tokens=100, stop=("efSTOPx",))])[0]
        assert (completion.text, completion.completion_tokens) == (SPOKEN, len(SPOKEN.encode()))

    def test_stream_shows_whole_characters_only(self, speaker):
        pieces = list(speaker.stream(ask("speak", max_new_tokens=100)))
        assert pieces[:3] == ["é", "首", "🙂"]
        assert "".join(pieces) == SPOKEN

    def test_stream_cut_inside_a_character_says_so(self, speaker):
        stream = speaker.stream(ask("speak", max_new_tokens=3))
        assert "".join(stream) == stream.result().text == "é\ufffd"
        assert stream.result().finish_reason == "length"

    def test_stream_pieces_join_to_the_completion(self, engine, reference):
        request = ask("stream me", "third", max_new_tokens=24)
        stream = engine.stream(request)
        pieces = list(stream)
        assert len(pieces) > 3
        assert "".join(pieces) == stream.result().text == reference(request)[1]

    def test_stream_joins_a_running_batch_and_both_are_exact(self, engine, reference):
        first = ask("the first", "raft", max_new_tokens=60)
        stream = engine.stream(first)
        pieces = iter(stream)
        begun = next(pieces)
        second = ask("the second", "third", max_new_tokens=5)
        assert engine.generate([second])[0].text == reference(second)[1]
        assert begun + "".join(pieces) == reference(first)[1]

    def test_generate_prompt_over_the_window_fails_alone(self, engine):
        long, fine = engine.generate([ask("x" * WINDOW), ask("fine")])
        assert (long.finish_reason, long.error_code) == ("error", "context_length_exceeded")
        assert str(WINDOW) in long.error and long.completion_tokens == 0
        assert fine.finish_reason == "length" and not fine.error

    def test_generate_prompt_that_just_fits_is_answered(self, engine):
        used = engine.generate([ask("")])[0].prompt_tokens
        room = WINDOW - used - 4
        fits, over = engine.generate([ask("x" * n, max_new_tokens=4) for n in (room, room + 1)])
        assert (fits.finish_reason, fits.completion_tokens) == ("length", 4)
        assert over.error_code == "context_length_exceeded"

    def test_generate_unknown_adapter_fails_alone_and_names_those_loaded(self, engine):
        unknown, fine = engine.generate([ask("a", "nobody"), ask("b", "raft")])
        assert unknown.error_code == "unknown_adapter" and "raft, adapter/finetuned/1.2" in unknown.error
        assert fine.finish_reason == "length"

    def test_stream_cancelled_while_running_ends_at_once(self, engine):
        stream = engine.stream(ask("endless", max_new_tokens=900))
        next(iter(stream))
        stream.cancel()
        completion = stream.result()
        assert (completion.finish_reason, completion.error_code) == ("error", "cancelled")
        assert completion.completion_tokens < 900

    def test_submit_cancelled_while_waiting_ends_before_those_that_run(self, engine, reference):
        running = [engine.submit(ask(f"endless {i}", max_new_tokens=900, request_id=str(i))) for i in range(4)]
        waiting = engine.submit(ask("waiting"))
        waiting.cancel()
        assert waiting.completion.result(60).error_code == "cancelled"
        assert not any(ticket.completion.done() for ticket in running)
        for ticket in running:
            ticket.cancel()
        assert {ticket.completion.result(60).error_code for ticket in running} == {"cancelled"}
        assert engine.generate([ask("after")])[0].text == reference(ask("after"))[1], "the slots are free again"

    def test_cancel_after_the_end_has_no_effect(self, engine):
        ticket = engine.submit(ask("short", max_new_tokens=2))
        completion = ticket.completion.result(60)
        ticket.cancel()
        assert completion.finish_reason == "length" and engine.alive

    def test_submit_reader_that_fails_is_cancelled(self, engine):
        def broken(text):
            raise ConnectionError("gone")

        assert engine.submit(ask("x", max_new_tokens=900), broken).completion.result(60).error_code == "cancelled"

    def test_load_adapter_while_a_request_runs_and_unload_once_its_requests_have_ended(self, engine, models, reference):
        long = ask("long", "raft", max_new_tokens=120)
        running = engine.stream(long)
        pieces = iter(running)
        begun = next(pieces)
        engine.load_adapter("late/1.0", models.adapters["third"])
        assert "late/1.0" in engine.adapters
        found = engine.generate([ask("question", "late/1.0")])[0]
        assert found.text == reference(ask("question", "third"))[1]
        last = engine.submit(ask("last", "late/1.0", max_new_tokens=40))
        engine.unload_adapter("late/1.0")
        assert (
            last.completion.done()
            and last.completion.result().text == reference(ask("last", "third", max_new_tokens=40))[1]
        ), "unloading waits for those that had been asked"
        assert "late/1.0" not in engine.adapters
        assert engine.generate([ask("question", "late/1.0")])[0].error_code == "unknown_adapter"
        assert begun + "".join(pieces) == reference(long)[1], "what ran beside it is exact"

    def test_load_adapter_of_a_name_that_was_unloaded_answers_with_the_new_one(self, engine, models, reference):
        """Nothing that was read with the old one (its prefixes) may be used for the new one."""
        for adapter in ("raft", "third"):
            engine.load_adapter("again", models.adapters[adapter])
            assert engine.generate([ask("question", "again")])[0].text == reference(ask("question", adapter))[1]
            engine.unload_adapter("again")

    def test_load_adapter_twice_and_unload_an_unknown_one_have_no_effect(self, engine, models):
        before = engine.adapters
        engine.load_adapter("raft", models.adapters["third"])
        engine.unload_adapter("nobody")
        assert engine.adapters == before

    def test_load_adapter_that_does_not_serve_is_refused_and_the_engine_lives_on(
        self, engine, models, reference, tmp_path
    ):
        def copy(name):
            return Path(shutil.copytree(models.adapters["raft"], tmp_path / name))

        other = make_base(tmp_path / "other", window=WINDOW, head_dim=16)
        damaged, pickled, empty, foreign = copy("damaged"), copy("pickled"), tmp_path / "none", copy("foreign")
        weights = damaged / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
        config = json.loads((foreign / "adapter_config.json").read_text())
        (foreign / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
        unfit = make_adapter(other, tmp_path / "unfit", 3)
        for directory, said in (
            (unfit, "does not fit this base model"),
            (damaged, "cannot be read"),
            (pickled, r"no adapter_model\.safetensors"),
            (empty, r"no adapter_model\.safetensors"),
            (foreign, "only LORA is served"),
        ):
            with pytest.raises(ArtifactError, match=f"adapter `bad`.*{said}") as raised:
                engine.load_adapter("bad", directory)
            assert "\n" not in str(raised.value)
        assert "bad" not in engine.adapters and engine.alive
        requests = mixed_requests(4)
        assert [c.text for c in engine.generate(requests)] == [reference(r)[1] for r in requests]

    def test_close_ends_what_is_under_way_and_what_comes_later(self, start, models):
        engine = start(models.base, {"raft": models.adapters["raft"]})
        tickets = [engine.submit(ask(f"running {i}", "raft", max_new_tokens=900)) for i in range(6)]
        stream = engine.stream(ask("streamed", max_new_tokens=900))
        engine.close()
        engine.close()
        assert not engine.alive
        assert {ticket.completion.result(5).error_code for ticket in tickets} == {"closed"}
        assert stream.result().error_code == "closed" and isinstance("".join(stream), str)
        assert engine.generate([ask("late")])[0].error_code == "closed"
        with pytest.raises(UserError, match="the engine is closed"):
            engine.load_adapter("late", models.adapters["third"])
        engine.unload_adapter("raft")
