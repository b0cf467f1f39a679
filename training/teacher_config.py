"""The recipe's `teacher` section: who writes questions, how many, of which kinds, at which price and pace.

Imports no torch, ray, faiss or HTTP client. Keys are never in a recipe: it names the environment variable.
"""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from cluster.config import Section

QuestionKind = Literal["fact", "comparison", "reasoning", "unanswerable"]
QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)


class TeacherConfig(Section):
    """How questions are generated from the index's chunks."""

    engine: Literal["endpoint", "local"] = "endpoint"
    """`endpoint`: any OpenAI-compatible HTTP API; `local`: a model through rayft's own engine, in this process."""
    model: str = ""
    """Name of the model at the endpoint; for `local` a model as in `model.base` (empty takes `model.base`)."""
    base_url_env: str = Field(default="OPENAI_BASE_URL", min_length=1)
    """Environment variable that holds the endpoint's base URL, such as `http://127.0.0.1:8000/v1`."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; empty for an endpoint without keys."""
    prompt_path: str = ""
    """A prompt file of your own (see training/prompts/questions_en.yaml); empty takes the language's."""
    directory: str = ".rayft/teacher"
    """Where replies are kept (`<directory>/<recipe name>/`): local disk, never an object store."""
    kinds: tuple[QuestionKind, ...] = ("fact", "comparison", "reasoning")
    """Kinds of question, asked in turn. `unanswerable` questions, which no chunk answers, have no golden place: RAFT
    rows teach to abstain from them, and tests expect that."""
    questions_per_chunk: int = Field(default=3, ge=1, le=50)
    """Questions asked of each chunk."""
    examples: int = Field(default=1, ge=0)
    """Worked examples of the prompt file to show; a strong teacher needs none, and each costs its tokens every time."""
    min_chunk_chars: int = Field(default=80, ge=1)
    """Chunks with fewer characters are not asked about."""
    answer_chars: int = Field(default=120, ge=1)
    """Longest answer, in characters: told to the teacher, and checked."""
    reasoning: bool = False
    """Ask for a short reasoning beside each answer (`metadata.reasoning`; see `prompt.reasoning`)."""
    near_duplicate: float = Field(default=0.75, gt=0, le=1)
    """Two questions about one document with the same answer are one when they share this much of their words."""
    temperature: float = Field(default=0.7, ge=0, le=2)
    """0 is greedy."""
    max_tokens: int = Field(default=1500, ge=16)
    """Most tokens of a reply."""
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    """What the endpoint is asked to keep to; one that refuses it is asked for less, and that is said."""
    concurrency: int = Field(default=8, ge=1, le=1024)
    """Requests in flight at once: also the most that a crash can make you pay twice."""
    request_timeout_s: float = Field(default=120, gt=0)
    """Deadline of one request, in seconds."""
    attempts: int = Field(default=6, ge=1)
    """Most requests for one reply when the endpoint is busy, fails or hangs."""
    backoff_s: float = Field(default=1, gt=0)
    """The first wait is drawn from 0 to this many seconds; the range doubles with each further attempt."""
    longest_wait_s: float = Field(default=120, gt=0)
    """Longest wait, in seconds. An endpoint that asks for a longer one (`Retry-After`) ends the job."""
    reply_attempts: int = Field(default=2, ge=1)
    """Most replies paid for per chunk when one cannot be read or was cut off."""
    input_price: float = Field(default=0, ge=0)
    """Price of a million prompt tokens, in any currency."""
    output_price: float = Field(default=0, ge=0)
    """Price of a million reply tokens, in the same currency."""

    @model_validator(mode="after")
    def _kinds_differ(self) -> Self:
        if not self.kinds:
            raise ValueError(f"kinds is empty: name some of {', '.join(QUESTION_KINDS)}")
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds names {', '.join(self.kinds)}: each kind once")
        return self
