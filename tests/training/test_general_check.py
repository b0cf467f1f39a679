import re

import pytest

from tests.training.test_row_losses import losses
from training.adapter_report import GENERAL_TOLERANCE, general_warning
from training.base_model import load_tokenizer
from training.general_check import GeneralLosses, general_rows, load_general
from training.row_losses import Difference

KINDS = {"arithmetic", "common_knowledge", "rewriting", "translation", "conversation", "instructions"}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_general_prompts_are_forty_short_and_different_requests_of_every_kind(language):
    prompts = load_general(language)
    assert len(prompts) == 40
    assert {asked.kind for asked in prompts} == KINDS
    assert len({asked.prompt for asked in prompts}) == 40
    for asked in prompts:
        assert 0 < len(asked.prompt) <= 120
        assert asked.answer == asked.answer.strip() != ""
        assert len(asked.answer) <= 160
    chinese = sum(bool(re.search(r"[\u4e00-\u9fff]", asked.prompt)) for asked in prompts)
    assert chinese == (40 if language == "zh" else 0)


def test_general_rows_score_the_answer_after_its_first_token(base_path):
    tokenizer = load_tokenizer(base_path)
    rows = general_rows(tokenizer, "en")
    for row, asked in zip(rows, load_general("en"), strict=True):
        split = len(row.input_ids) - row.target_tokens
        assert tokenizer.decode(row.input_ids[split:]) == asked.answer[1:], "a token of this model is a byte"
        assert (
            tokenizer.decode(row.input_ids[:split]) == f"<|im_start|>user\n{asked.prompt}<|im_end|>\n"
            f"<|im_start|>assistant\n{asked.answer[0]}"
        )


def test_general_losses_are_worse_where_the_tuned_model_loses_more():
    found = GeneralLosses(losses([2.0, 4.0], [2, 4]), losses([3.0, 6.0], [2, 4])).difference(seed=0)
    assert found.value == pytest.approx(0.5)


def test_general_warning_is_given_above_the_tolerance_only():
    surely = Difference(GENERAL_TOLERANCE + 1, GENERAL_TOLERANCE + 0.5, GENERAL_TOLERANCE + 2, 40)
    told = general_warning("raft", surely)
    assert told is not None
    assert "\n" not in told
    assert f"{surely.value:.2f} nats per token" in told
    assert general_warning("raft", Difference(GENERAL_TOLERANCE + 1, GENERAL_TOLERANCE - 0.1, 9.0, 40)) is None
