"""Recipe sections of the training room: questions, prompt, samples, model, LoRA, retriever (the router's is
in training/router_config.py).

Imports no torch, ray or faiss.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from cluster.config import Section
from retrieval.config import QuestionColumns, RetrievalRecipe
from training.router_config import IntentTraining
from training.teacher_config import TeacherConfig

QUESTION_FILES = ("path", "test_path", "train_path")
"""Keys of `questions` that name files: what is in these counts, not how they are called."""


class QuestionsConfig(Section):
    """Questions with answers, and how they are split."""

    path: str = ""
    """Questions: rayft's or BEIR's .jsonl, a BEIR folder, SQuAD's .json (1.1 or 2.0), .csv or .parquet."""
    test_path: str = ""
    """A second file of test questions; without it, questions that carry no `split` are split by document."""
    train_path: str = ""
    """A further file of questions that only train, such as `rayft feedback export` writes: how the others are split
    stays as it is, and those about a document that is held out, or that repeat a test question, are left out."""
    columns: QuestionColumns = QuestionColumns()
    """Columns of .jsonl, .csv and .parquet."""
    test_documents_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Share of documents held out whole when rayft splits (test_new_documents); 0 tests new questions alone."""
    test_questions_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the other documents' questions held out (test_new_questions)."""
    near_duplicate: float = Field(default=0.9, gt=0, le=1)
    """Two questions with the same answer about the same document are one when they share this much of their words:
    the later one is left out, and a training question that repeats a test question always."""


class PromptConfig(Section):
    """What the model is shown and taught to write."""

    path: str = ""
    """A prompt file of your own (see training/prompts/en.yaml); empty takes the language's."""
    quotes: bool = True
    """Targets carry a verbatim quote before the answer."""
    reasoning: bool = False
    """Targets carry the question's reasoning (`questions.columns.reasoning`) before the quote, where there is one."""


class SamplesConfig(Section):
    """How RAFT samples are made from questions and the index."""

    raft_rows: int = Field(default=160, ge=1)
    """Most RAFT rows; kinds of question and documents are spread evenly."""
    dsf_rows: int = Field(default=300, ge=1)
    """Most closed-book rows."""
    validation_rows: int = Field(default=24, ge=0)
    """Most rows of each objective that are kept from training to validate it. They are drawn from the training
    questions that are left over, so that they cost no training row where there are enough questions; at most a fifth
    of the rows where there are not."""
    golden_fraction: float = Field(default=0.9, ge=0, le=1)
    """P: share of rows that keep the golden passage."""
    distractors: int | tuple[int, int] = 2
    """Distractor passages per row beside the golden one: a number, or `[least, most]`, drawn per row."""
    distractor_source: Literal["mined", "random", "mixed", "same_heading"] = "mined"
    """`mined`: what the index finds for the question; `random`: any chunk; `mixed`: half and half; `same_heading`:
    half of what other documents say under the golden passage's heading, half mined. Measure before you leave `mined`:
    on the Factbook, whose documents share a form, `same_heading` lowered EM from 0.83 to 0.59."""
    mining_depth: int = Field(default=24, ge=1)
    """Hits searched per question to mine distractors from: enough that filtering leaves some."""
    near_duplicate: float = Field(default=0.9, gt=0, le=1)
    """Share of words in common with the golden passage from which a passage is no distractor."""
    without_golden: Literal["memorise", "abstain", "drop"] = "memorise"
    """Target of a row without its golden passage: the answer without a quote, an abstention, or no row at all.
    Questions that have no answer at all (`unanswerable`) are always taught to abstain."""
    max_answer_chars: int = Field(default=120, ge=1)
    """Questions with a longer first answer are left out (and counted)."""
    workers: int = Field(default=1, ge=1)
    """Ray actors that make rows; the rows are the same whatever their number."""

    @model_validator(mode="after")
    def _distractors_are_a_range(self) -> Self:
        least, most = self.distractor_range
        if not 0 <= least <= most:
            raise ValueError(f"distractors: {self.distractors} is not a number or [least, most] from 0 up")
        return self

    @property
    def distractor_range(self) -> tuple[int, int]:
        """Least and most distractors of a row."""
        return (self.distractors, self.distractors) if isinstance(self.distractors, int) else self.distractors


class ModelConfig(Section):
    """The base model."""

    base: str = "embedded:SmolLM2-135M-Instruct"
    """`embedded:NAME` (a package's model), a local directory, an `s3://` path, or a hub id."""
    revision: str | None = None
    """Pinned revision of a hub model."""
    chat_template: str = ""
    """Chat template of a model that brings none: `plain`, or a Jinja file; empty takes the model's own."""
    accept_licence: str = ""
    """Name of the licence of an optional embedded model, where it asks to be accepted (rayft shows it)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights' precision in training and generation; `auto` is bfloat16 where the hardware computes it natively."""


class LoraSection(Section):
    """The adapter's shape."""

    rank: int = Field(default=16, ge=1)
    """LoRA rank r."""
    alpha: int = Field(default=32, ge=1)
    """LoRA scaling numerator: updates are scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: str = "all-linear"
    """Modules that get an adapter, as PEFT names them."""


class TrainConfig(Section):
    """The optimisation, shared by both adapters."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate after warm-up; decays linearly to 0."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of steps spent warming up."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the RAFT rows."""
    dsf_epochs: int = Field(default=3, ge=1)
    """Passes over the closed-book rows."""
    batch_rows: int = Field(default=4, ge=1)
    """Rows per optimiser step, over all workers."""
    dsf_batch_rows: int = Field(default=16, ge=1)
    """Closed-book rows per optimiser step, over all workers (they are short)."""
    mixture: dict[Literal["raft", "dsf"], float] = Field(default_factory=dict)
    """Shares of RAFT and closed-book rows that the `raft` adapter learns from, such as `{raft: 0.8, dsf: 0.2}`; empty
    takes RAFT rows alone. All RAFT rows are used; closed-book rows are drawn, or repeated, to meet the share."""
    micro_batch_tokens: int = Field(default=3072, ge=64)
    """Most tokens, padding included, that a worker computes at once: a step's rows are cut into as many micro-batches
    as that takes, and their gradients added up."""
    packing: Literal["none", "best_fit"] = "none"
    """`none`: rows of like length are padded to one width; `best_fit`: rows are laid end to end without attention
    across them, which pays off where attention kernels skip what is masked (GPUs)."""
    max_tokens: int = Field(default=1024, ge=64)
    """Rows with more tokens are left out (and counted)."""
    workers: int = Field(default=1, ge=1)
    """Ray Train workers."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs that each worker claims."""
    threads_per_worker: int = Field(default=2, ge=1)
    """Torch threads of each CPU worker."""
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    """GPUs per worker: 0 trains on CPU (gloo), 1 on GPU (NCCL)."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    zero3_persistence_threshold: int | None = Field(default=None, ge=0)
    """ZeRO-3 keeps parameters of fewer elements whole on every worker; none takes DeepSpeed's default."""
    offload: Literal["none", "cpu"] = "none"
    """Keep optimiser states (ZeRO 1 to 3) and parameters (ZeRO-3) in the host's memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    checkpoint_minutes: float = Field(default=2, ge=0)
    """Most minutes of work that a crash can cost; 0 writes a checkpoint after every step."""
    restarts: int = Field(default=3, ge=0)
    """How often lost workers are replaced before the run gives up; a resubmitted run goes on from its checkpoint."""
    validations_per_epoch: int = Field(default=2, ge=0)
    """Validations in each epoch; 0 measures once, at the end."""
    probe_rows: int = Field(default=8, ge=0)
    """Validation questions that are answered at each validation (EM and F1)."""
    patience: int = Field(default=3, ge=0)
    """RAFT: validations without a lower loss after which training stops, and the state with the lowest loss is kept;
    0 trains to the end and keeps the last."""
    dsf_patience: int = Field(default=0, ge=0)
    """The same for the closed-book adapter, whose validation questions ask for facts that it was never told."""
    tracker: Literal["tensorboard", "mlflow", "wandb", "none"] = "tensorboard"
    """Where the run's curves go beside `history.jsonl`; mlflow and wandb are set up by their own environment
    variables and need `pip install 'rayft[trackers]'`."""

    @model_validator(mode="after")
    def _offload_has_a_stage(self) -> Self:
        if self.offload == "cpu" and self.zero_stage == 0:
            raise ValueError("offload: cpu moves what ZeRO shards: set zero_stage to 1, 2 or 3")
        return self

    @model_validator(mode="after")
    def _mixture_has_weights(self) -> Self:
        if self.mixture and (min(self.mixture.values()) < 0 or not self.mixture.get("raft")):
            raise ValueError(f"mixture: {self.mixture} needs a weight above 0 for raft, and none below 0")
        return self


class RetrieverTraining(Section):
    """How `rayft train retriever` fine-tunes the encoder. Workers, threads and GPUs are those of `train`."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate after warm-up; decays linearly to 0."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of steps spent warming up."""
    epochs: int = Field(default=1, ge=1)
    """Most passes over the training questions. On the Factbook (1,188 questions) recall@1 on new documents went from
    0.868 to 0.967 in one pass; small sets of questions may want more."""
    batch_questions: int = Field(default=32, ge=2)
    """Questions per optimiser step, over all workers: each is told from the passages of all others."""
    cached_texts: int = Field(default=128, ge=1)
    """Texts whose activations one worker holds at once; gradients of larger batches are cached (GradCache)."""
    temperature: float = Field(default=0.05, gt=0)
    """Divides the cosine similarities in the loss."""
    max_questions: int = Field(default=20_000, ge=2)
    """Most training questions; kinds of question and documents are spread evenly."""
    hard_negatives: int = Field(default=1, ge=0)
    """Hard negatives per question, mined from the current index."""
    mining_depth: int = Field(default=50, ge=1)
    """Hits per question that hard negatives are chosen from."""
    relative_margin: float | None = Field(default=None, gt=0)
    """Leave out hits that score above this share of the golden passage's score (0.95 in NV-Retriever); none keeps
    them. For questions whose golden places are not complete."""
    near_duplicate: float = Field(default=0.9, gt=0, le=1)
    """Share of words in common with the golden passage from which a passage is no negative."""
    validation_fraction: float = Field(default=0.15, gt=0, lt=1)
    """Share of the training questions held back, by document, to choose the best state."""
    validations_per_epoch: int = Field(default=2, ge=1)
    """Validations (nDCG@10) in each epoch."""
    patience: int = Field(default=3, ge=1)
    """Validations without a gain after which training stops."""
    validation_passages: int = Field(default=2000, ge=0)
    """Most passages searched in a validation: golden ones, the index's hits, and others drawn at random; 0: all."""
    measured_passages: int = Field(default=100_000, ge=0)
    """Most passages searched when before and after are measured on held-out questions; 0: all."""


class TrainingRecipe(RetrievalRecipe):
    """The part of a recipe that the training room may read."""

    questions: QuestionsConfig = QuestionsConfig()
    teacher: TeacherConfig = TeacherConfig()
    prompt: PromptConfig = PromptConfig()
    samples: SamplesConfig = SamplesConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraSection = LoraSection()
    train: TrainConfig = TrainConfig()
    retriever: RetrieverTraining = RetrieverTraining()
    router: IntentTraining = IntentTraining()

    def training_values(self) -> dict[str, Any]:
        """The values that the training room knows, for workers: they need not know the class of the whole recipe, whose
        sections may hold more than this room's (serving's `router`)."""
        own = {name: field.annotation for name, field in TrainingRecipe.model_fields.items()}
        sections = {name: kind for name, kind in own.items() if isinstance(kind, type) and issubclass(kind, Section)}
        return self.model_dump(
            include={name: set(sections[name].model_fields) if name in sections else True for name in own}
        )
