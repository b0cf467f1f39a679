"""How one prediction scores in the tasks `labels` and `api_calls`, and where there is no answer to give.

In: a prediction and a rubric. Out: rows of numbers for `evaluation.metrics`, which names and defines the metrics.
Not covered: which API a call names (evaluation/api_calls.py).
"""

from __future__ import annotations

from evaluation.api_calls import ApiCall, find_call
from evaluation.records import Prediction
from evaluation.rubric import Rubric
from training import text_match

Score = tuple[float, ...]
NOT_APPLICABLE: Score = (0.0, 0.0)


def abstained(prediction: Prediction) -> Score:
    """Whether the strategy said that it does not know, or nothing at all; a failed row did not."""
    return float(prediction.answer.abstained and not prediction.answer.error), 1.0


def unanswerable(prediction: Prediction) -> Score:
    """Right where it abstains; a question that merely states no answer is not scored."""
    return abstained(prediction) if prediction.question.unanswerable else NOT_APPLICABLE


def label_of(text: str, rubric: Rubric) -> str:
    """The label that an answer begins with; of several, the longest; an empty string for none."""
    units = text_match.chinese_units if rubric.language == "zh" else text_match.plain_words
    words = units(text)
    found = [label for label in rubric.labels if (wanted := units(label)) and words[: len(wanted)] == wanted]
    return max(found, key=len, default="")


def accuracy(prediction: Prediction, rubric: Rubric) -> Score:
    """Whether the answer begins with an accepted label."""
    if not prediction.question.answers:
        return unanswerable(prediction)
    golden = {answer.strip().lower() for answer in prediction.question.answers}
    return float(label_of(prediction.answer.answer, rubric) in golden), 1.0


def label_counts(prediction: Prediction, rubric: Rubric) -> Score:
    """Per label: right, predicted, golden. With several accepted labels the predicted one counts if it is among them,
    otherwise the first."""
    count = len(rubric.labels)
    row = [0.0] * (3 * count)
    golden = [answer.strip().lower() for answer in prediction.question.answers]
    if not golden:
        return tuple(row)
    predicted = label_of(prediction.answer.answer, rubric)
    meant = predicted if predicted in golden else golden[0]
    row[2 * count + rubric.labels.index(meant)] = 1.0
    if predicted:
        row[count + rubric.labels.index(predicted)] = 1.0
        row[rubric.labels.index(predicted)] = float(predicted == meant)
    return tuple(row)


def unparsed(prediction: Prediction, rubric: Rubric) -> Score:
    """Whether the answer begins with no label."""
    return float(not label_of(prediction.answer.answer, rubric)), 1.0


def functional_accuracy(prediction: Prediction, rubric: Rubric) -> Score:
    """Whether the call is an API of the golden one's domain."""
    domains = {rubric.apis.cards[g.doc_id][0] for g in prediction.question.golden if g.doc_id in rubric.apis.cards}
    if not domains:
        return unanswerable(prediction)
    return float(bool(domains & rubric.apis.domains.get(_call(prediction), frozenset()))), 1.0


def golden_call(prediction: Prediction, rubric: Rubric) -> Score:
    """Whether the call is the golden one."""
    calls = {rubric.apis.cards[g.doc_id][1] for g in prediction.question.golden if g.doc_id in rubric.apis.cards}
    if not calls:
        return unanswerable(prediction)
    return float(_call(prediction) in calls), 1.0


def hallucinated_call(prediction: Prediction, rubric: Rubric) -> Score:
    """Whether the call is no API of the corpus; an abstention is not."""
    answer = prediction.answer
    if answer.error or answer.abstained:
        return 0.0, 1.0
    return float(_call(prediction) not in rubric.apis.domains), 1.0


def _call(prediction: Prediction) -> ApiCall:
    """The call that the answer names; one that matches nothing where it names none."""
    return find_call(prediction.answer.answer) or ApiCall("", "")
