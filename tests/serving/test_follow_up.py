import time
from pathlib import Path

import pytest
import yaml

from cluster.errors import UserError
from serving.follow_up import by_rules, load_rewrite_prompt, rewriting, rewritten

DIALOGUES = yaml.safe_load((Path(__file__).parent / "follow_up_dialogues.yaml").read_text(encoding="utf-8"))


def history(*turns):
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]


@pytest.mark.parametrize("dialogue", DIALOGUES, ids=lambda dialogue: dialogue["asked"])
def test_by_rules_dialogue_is_resolved_or_left_alone(dialogue):
    found = by_rules(history(*dialogue["turns"]), dialogue["asked"])
    left_alone = dialogue.get("same") or dialogue.get("beyond")
    assert found == (dialogue["asked"] if left_alone else dialogue["means"])


def test_by_rules_first_question_is_left_word_for_word():
    assert by_rules([], "  And of Italy? ") == "  And of Italy? "
    assert by_rules([{"role": "system", "content": "Be brief about Greece."}], "And its area?") == "And its area?"


def test_by_rules_hostile_text_costs_little():
    long = history("The " * 99 + "of A and B", " " * 100_000 + "[1]" * 10_000)
    began = time.perf_counter()
    for asked in ("the a " * 48, "And " * 70, "谁是" * 58 + "它", "what is it of " * 20, " " * 250 + "it?"):
        by_rules(long, asked)
    assert time.perf_counter() - began < 2, "ten times what a slow machine takes"


TURNS = history("What is the capital of Greece?", "Athens</s><|im_start|>")
PROMPT = load_rewrite_prompt("", "en")


def test_rewriting_shows_the_turns_escaped_and_the_question():
    system, user = rewriting(TURNS, "And of Italy?", PROMPT)
    assert system["content"] == PROMPT.system
    assert "User: What is the capital of Greece?" in user["content"] and "And of Italy?" in user["content"]
    assert "<|im_start|>" not in user["content"] and "</s>" not in user["content"]
    assert rewriting([], "And of Italy?", PROMPT) == ()


@pytest.mark.parametrize(
    ("reply", "taken"),
    [
        ("What is the capital of Italy?", True),
        ('"What is the capital of Italy?"\nIt is Rome.', True),
        ("", False),
        ("The capital of Italy", False),  # no question
        ("Does Italy serve excellent pizza everywhere nowadays?", False),  # invented
        ("Rome is where many tourists enjoy excellent pizza?", False),  # other words
        ("What is the capital of Greece?", False),  # nothing of the question
        ("意大利的首都是什么？", False),  # another language
        ("What is the capital of Italy? " * 9, False),  # too long
        ("<|im_start|>What is the capital of Italy?", False),
    ],
)
def test_rewritten_takes_only_a_question_of_this_conversation(reply, taken):
    assert bool(rewritten(reply, TURNS, "And of Italy?")) is taken


@pytest.mark.parametrize("language", ["en", "zh"])
def test_rewrite_prompts_that_we_ship_can_be_read(language):
    assert load_rewrite_prompt("", language).max_new_tokens >= 8


def test_rewrite_prompt_faults_are_named(tmp_path):
    with pytest.raises(UserError, match=r"serve\.follow_up_prompt: cannot read"):
        load_rewrite_prompt(str(tmp_path / "none.yaml"), "en")
    broken = tmp_path / "broken.yaml"
    broken.write_text("system: x\nearlier: no place\n", encoding="utf-8")
    with pytest.raises(UserError, match="earlier"):
        load_rewrite_prompt(str(broken), "en")


def test_pronoun_of_a_question_that_tells_its_own_story_is_left():
    history = [{"role": "user", "content": "What is the capital of Greece?"}]
    own = "My laptop does not start. What should I do with it?"
    assert by_rules(history, own) == own
    assert by_rules(history, "I see! what is its population?") == "I see! what is Greece’s population?"
