"""Recipe sections of the training room: questions, prompt, samples, model, LoRA, retriever.

Imports no torch, ray or faiss.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config import Section
from retrieval.config import RetrievalRecipe
from training.teacher_config import TeacherConfig


class QuestionsConfig(Section):
    """Questions with answers, and how they are split."""

    path: str = ""
    """BEIR-like `questions.jsonl`: `_id`, `text`, `answers`, `golden` and, optionally, `split`, `metadata`."""
    test_path: str = ""
    """A second file of test questions; without it, questions that carry no `split` are split by document."""
    test_documents_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of documents held out whole when rayft splits (test_new_documents)."""
    test_questions_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the other documents' questions held out (test_new_questions)."""


class PromptConfig(Section):
    """What the model is shown and taught to write."""

    path: str = ""
    """A prompt file of your own (see training/prompts/en.yaml); empty takes the language's."""
    quotes: bool = True
    """Targets carry a verbatim quote before the answer."""
    reasoning: bool = False
    """Targets carry the question's `metadata.reasoning` before the quote, where there is one."""


class SamplesConfig(Section):
    """How RAFT samples are made from questions and the index."""

    raft_rows: int = Field(default=160, ge=1)
    """Most RAFT rows; kinds of question and documents are spread evenly."""
    dsf_rows: int = Field(default=300, ge=1)
    """Most closed-book rows."""
    golden_fraction: float = Field(default=0.9, ge=0, le=1)
    """P: share of rows that keep the golden passage."""
    distractors: int = Field(default=2, ge=0)
    """Distractor passages per row beside the golden one."""
    distractor_source: Literal["mined", "random", "mixed"] = "mined"
    """`mined`: what the index finds for the question; `random`: any chunk; `mixed`: half and half."""
    without_golden: Literal["memorise", "abstain", "drop"] = "memorise"
    """Target of a row without its golden passage: the answer without a quote, an abstention, or no row at all."""
    max_answer_chars: int = Field(default=120, ge=1)
    """Questions with a longer first answer are left out (and counted)."""


class ModelConfig(Section):
    """The base model."""

    base: str = "embedded:SmolLM2-135M-Instruct"
    """`embedded:NAME` (a package's model), a local directory, an `s3://` path, or a hub id."""
    revision: str | None = None
    """Pinned revision of a hub model."""
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
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""


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
