"""Recipe sections of the serving room: generation, deployments, feedback, telemetry (the router's is in
serving/router_config.py). Imports no torch, ray or faiss."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cluster.config import Section
from retrieval.filters import parse_filter
from serving.router_config import RoutedStrategy, RouterConfig
from training.config import TrainingRecipe


class VllmConfig(Section):
    """Settings of `generation.engine: vllm`, under vLLM's own names."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that share one model."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that the engine takes."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest prompt and completion together; none takes the model's own."""
    quantization: str = ""
    """Weight quantisation (`fp8`, `awq`, …); empty: as the weights are."""
    max_loras: int = Field(default=4, ge=1)
    """Adapters that one batch may mix."""
    max_lora_rank: int = Field(default=64, ge=1)
    """Largest rank of an adapter."""
    enforce_eager: bool = False
    """Without compiled graphs: starts at once, generates more slowly."""


class GenerationConfig(Section):
    """How answers are generated, online and offline alike."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """Inference engine."""
    vllm: VllmConfig = VllmConfig()
    passages: int = Field(default=3, ge=1)
    """k: passages shown to strategies that retrieve."""
    examples: int = Field(default=2, ge=0)
    """Worked examples in the prompt of `rag_fewshot`."""
    max_new_tokens: int = Field(default=96, ge=1)
    """Most tokens of a completion."""
    context_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a prompt; none takes the model's window without `max_new_tokens`. The lowest-ranked passages that
    do not fit are left out whole, and the answer says how many."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    batch_rows: int = Field(default=16, ge=1)
    """Most requests generated together."""
    threads: int = Field(default=2, ge=1)
    """Torch threads of an engine on CPU."""


class DeploymentConfig(Section):
    """Replicas of one deployment and what each claims of Ray."""

    min_replicas: int = Field(default=1, ge=1)
    """Fewest replicas."""
    max_replicas: int = Field(default=1, ge=1)
    """Most replicas; more than `min_replicas` scales with the load."""
    target_ongoing_requests: float = Field(default=16, gt=0)
    """Requests under way per replica that scaling aims at."""
    upscale_delay_s: float = Field(default=10, ge=0)
    """Seconds that the load must last before replicas are added."""
    downscale_delay_s: float = Field(default=300, ge=0)
    """Seconds without that load before replicas are removed."""
    cpus: float = Field(default=0.1, gt=0)
    """CPUs that each replica claims; how many an engine computes on is `generation.threads`."""
    gpus: float = Field(default=0, ge=0)
    """GPUs that each replica claims."""
    accelerator: str = ""
    """Ray's accelerator type (`H100`), where the cluster has several."""

    @model_validator(mode="after")
    def _most_is_not_fewer(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, fewer than min_replicas ({self.min_replicas})")
        return self


class TenantConfig(Section):
    """What the holders of a tenant's keys may see and use."""

    groups: tuple[str, ...] = ()
    """Groups that open collections with `access` to them."""
    filter: dict[str, Any] = Field(default_factory=dict)
    """Only documents that match are searched, whatever a request asks for (the syntax of `index search --filter`)."""
    strategies: tuple[RoutedStrategy, ...] = ()
    """Strategies that they may use; none allows all."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Quota of each key; beyond it 429 with Retry-After."""
    tokens_per_day: int | None = Field(default=None, ge=1)
    """Prompt and completion tokens of each key per day (UTC)."""

    @field_validator("filter")
    @classmethod
    def _filter_can_be_read(cls, filter: dict[str, Any]) -> dict[str, Any]:
        parse_filter(filter)
        return filter


class ServeConfig(Section):
    """The graph: its address, its deployments, who may ask."""

    host: str = "127.0.0.1"
    """Address to bind; anything but loopback is announced."""
    port: int = Field(default=8000, ge=1, le=65535)
    """HTTP port."""
    ingress: DeploymentConfig = DeploymentConfig()
    """API and router."""
    retriever: DeploymentConfig = DeploymentConfig(cpus=0.25)
    """Each replica holds the whole index."""
    generator: DeploymentConfig = DeploymentConfig(cpus=0.5)
    """Each replica holds the model with all adapters."""
    max_queued_requests: int | None = Field(default=None, ge=1)
    """Requests under way at once in an ingress replica; one more is answered 429 with Retry-After. None takes twice
    what all generators batch together (2 × `generation.batch_rows` × `generator.max_replicas`), at least 8: one batch
    that is generated and one that waits. `hybrid` counts as one and generates two."""
    request_timeout_s: float = Field(default=120, gt=0)
    """Deadline of one request, in seconds; then 504."""
    max_body_bytes: int = Field(default=1_000_000, ge=1000)
    """Longest request body; a longer one is answered 413."""
    drain_s: float = Field(default=30, ge=0)
    """Seconds that requests under way are given to end when the graph is taken down."""
    follow_releases_s: float = Field(default=5, ge=0)
    """Seconds between looks at which release is promoted, to take it up; 0 stays with the one that it started with."""
    follow_up: Literal["rules", "model", "off"] = "rules"
    """How the standalone question of a later turn is made from the history: by rules, by the base model (a third hop to
    the first token; the rules stand in for a reply that is no question), or not."""
    follow_up_prompt: str = ""
    """A prompt file of your own for `model` (see serving/prompts/follow_up_en.yaml); empty takes the language's."""
    citation_shapes: tuple[Literal["azure", "perplexity"], ...] = ()
    """Shapes in which citations are given beside OpenAI's and our own."""
    keys: str = ""
    """File of hashed API keys (`rayft keys new`); the environment variable RAYFT_API_KEYS adds more. Without either
    everybody who reaches the port may ask."""
    tenants: dict[str, TenantConfig] = Field(default_factory=dict)
    """Tenants by name; a key of a tenant that is not named here is refused."""
    log_content: bool = False
    """Write questions and answers into the log, for debugging."""


class FeedbackConfig(Section):
    """Ratings and corrections."""

    url: str = "sqlite:///.rayft/feedback.db"
    """SQLAlchemy URL of the database (`postgresql+psycopg://…`); a password comes from the environment variable
    RAYFT_FEEDBACK_PASSWORD. Empty: no feedback is taken."""
    rating_window_s: float = Field(default=3600, gt=0)
    """Seconds that an answer waits in memory for its rating; unrated, it is then forgotten."""
    keep_unrated: bool = False
    """Store answers that nobody rated, too."""
    retention_days: int | None = Field(default=None, ge=1)
    """Days after which stored feedback is deleted; none keeps it."""


class TelemetryConfig(Section):
    """What operators see."""

    metrics: bool = True
    """Prometheus metrics on Ray Serve's own metrics endpoint."""
    traces: str = ""
    """OTLP endpoint (`http://collector:4318`) for OpenTelemetry spans; empty: none. Needs the extra `traces`."""
    trace_content: bool = False
    """Questions and answers as attributes of spans."""


class ServingRecipe(TrainingRecipe):
    """The part of a recipe that the serving room may read."""

    generation: GenerationConfig = GenerationConfig()
    router: RouterConfig = RouterConfig()
    serve: ServeConfig = ServeConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @property
    def max_in_flight(self) -> int:
        """Requests that an ingress replica takes on at once: `serve.max_queued_requests`, or what follows from the
        engines."""
        if self.serve.max_queued_requests is not None:
            return self.serve.max_queued_requests
        return max(8, 2 * self.generation.batch_rows * self.serve.generator.max_replicas)

    @model_validator(mode="after")
    def _required_quotes_are_written(self) -> Self:
        if not self.prompt.quotes and any(rule.require_quote for rule in self.router.rules):
            raise ValueError(
                "router.rules require a quote (`require_quote`), but prompt.quotes is false: none is written"
            )
        return self
