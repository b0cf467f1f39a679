"""The `rayft` command: parse, load the recipe, call one stage. Also `python -m rayft`.

In: a recipe file and overrides. Out: what the stages print; exit status 0, 2 for input that a user can mend (one line
on standard error), 1 for a job that failed. The only module that imports all rooms: it composes the recipe and runs
the stages in order. Heavy imports stand inside the commands, so that `--help` and a bad recipe are answered at once.
Not covered: what a stage does (the rooms).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster.cli import cluster_app
from cluster.config import Section
from cluster.errors import NotBetterError, UserError
from cluster.progress import complain, describe_seconds, say
from cluster.recipe import load_recipe
from evaluation import cli as evaluation_cli
from evaluation.config import EvaluationRecipe
from evaluation.improve_cli import improve_command
from retrieval.cli import index_app
from serving.cli import serving_app
from serving.feedback_cli import feedback_app
from serving.keys_cli import keys_app
from training.cli import train_app
from training.questions_cli import questions_app
from training.samples_cli import samples_app

if TYPE_CHECKING:
    from cluster.store import Artifact, ArtifactRef, Store
    from retrieval.records import Hit, Question
    from serving.records import Answer
    from training.asking import LocalTeacher

SERVED_PATH_KEYS = ("model.base", "model.chat_template", "encoder.model")
"""Recipe keys that may hold a local path although their name does not say so, and that serving reads."""
PATH_KEYS = (*SERVED_PATH_KEYS, "teacher.model", "router.examples")
"""Those that any stage reads."""

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a packaged one.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key (repeatable).")
]


class SourceConfig(Section):
    """A generator of documents and questions that rayft brings along; recipes over files of your own have none."""

    name: Literal["factbook"]
    """The CIA World Factbook package."""
    region: str = "europe"
    """Region of the Factbook, or `all`."""
    directory: str = ".rayft/data"
    """Where its files are written; a relative path is taken from the working directory."""


class Recipe(EvaluationRecipe):
    """A complete pipeline: the sections of all rooms, and where documents and questions may be generated from."""

    source: SourceConfig | None = None


def load(path: str, overrides: list[str]) -> Recipe:
    """The recipe, with the files of its `source` (where it has one) written and named as corpus and questions."""
    return with_source(load_recipe(path, overrides, Recipe))


def with_source(recipe: Recipe) -> Recipe:
    """Writes the files of `recipe.source`. Without a source, or with corpus and questions named, nothing is written.

    Raises:
        UserError: Only one of corpus and questions is named, an unknown region, a folder that cannot be written.
    """
    source, named = recipe.source, (recipe.corpus.path, recipe.questions.path)
    if source is None or all(named):
        return recipe
    if any(named):
        missing = "questions.path" if recipe.corpus.path else "corpus.path"
        raise UserError(f"{missing} is empty: with files of your own, set both corpus.path and questions.path")
    from recipes.factbook import write_factbook

    directory = Path(source.directory) / source.name / f"{source.region}-{recipe.seed}"
    try:
        corpus, questions = write_factbook(directory, source.region, recipe.seed)
    except OSError as error:
        raise UserError(f"source.directory: cannot write {directory}: {error.strerror}") from error
    return recipe.model_copy(
        update={
            "corpus": recipe.corpus.model_copy(update={"path": str(corpus)}),
            "questions": recipe.questions.model_copy(update={"path": str(questions)}),
        }
    )


@contextlib.contextmanager
def local_teacher(recipe: Recipe) -> Iterator[LocalTeacher]:
    """The model of `teacher.engine: local`, in this process, as the teacher that writes questions."""
    from cluster.model_source import model_digest
    from serving.engine import GenerationRequest
    from serving.transformers_engine import TransformersEngine
    from training.asking import LocalTeacher
    from training.base_model import base_model_directory
    from training.chat_response import Reply
    from training.endpoint import RefusedError
    from training.teacher_prompt import TeacherRequest

    own = recipe.teacher.model
    try:
        base = base_model_directory(
            recipe.model.model_copy(update={"base": own, "revision": None, "chat_template": ""})
            if own
            else recipe.model
        )
    except UserError as error:
        raise UserError(str(error).replace("model.base", "teacher.model") if own else str(error)) from error
    generation = recipe.generation
    engine = TransformersEngine(base, {}, recipe.model.precision, generation.batch_rows, generation.threads)

    def ask(request: TeacherRequest) -> Reply:
        wanted = (request.max_tokens, request.temperature)
        asked = GenerationRequest(request.key, request.messages, None, *wanted, seed=request.seed)
        completion = engine.generate([asked])[0]
        if completion.error:
            raise RefusedError(completion.error)
        return Reply(completion.text, completion.finish_reason, completion.prompt_tokens, completion.completion_tokens)

    name = f"{Path(own or recipe.model.base.removeprefix('embedded:')).name}@{model_digest(base)[:12]}"
    try:
        yield LocalTeacher(name, ask, recipe.teacher.concurrency)
    finally:
        engine.close()


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="RAG, fine-tuning and RAFT on Ray: build, train, serve, measure and choose.",
)
app.add_typer(index_app(load), name="index")
app.add_typer(questions_app(load, local_teacher), name="questions")
app.add_typer(samples_app(load), name="samples")
app.add_typer(train_app(load), name="train")
evaluation_cli.register(app, load)
app.add_typer(serving_app(load, SERVED_PATH_KEYS))
feedback = feedback_app(load)
feedback.command("improve")(improve_command(load))
app.add_typer(feedback, name="feedback")
app.add_typer(keys_app(), name="keys")
app.add_typer(cluster_app(load, PATH_KEYS))


@app.command()
def demo(
    recipe: RecipeArgument = "factbook",
    region: Annotated[str, typer.Option(help="Region of the Factbook, or `all` (256 countries and territories).")] = "",
    keep: Annotated[bool, typer.Option("--keep", help="Leave the graph up at the end, until Ctrl-C.")] = False,
    overrides: SetOption = None,
) -> None:
    """Run every stage: index, a first answer, samples, two adapters, the router (where the recipe has labelled
    utterances), evaluation, the served graph."""
    from cluster.session import ray_session
    from cluster.store import Store
    from serving.service import check_port
    from training.router import train_router
    from training.samples import require_questions

    began = time.monotonic()
    loaded = load(recipe, [*(overrides or []), *([f"source.region={region}"] if region else [])])
    require_questions(loaded)
    check_port(loaded.serve)
    store = Store(loaded.store.uri)
    with ray_session(loaded.ray):
        index = build_index_and_answer(loaded, store)
        samples, adapters = train_both(loaded, store, index)
        if loaded.router.examples:
            train_router(loaded, store)
        compare_and_promote(loaded, store, index, samples, adapters)
        serve_and_ask(loaded, store, samples, keep=keep)
    say(f"demo: done in {describe_seconds(time.monotonic() - began)}; everything is in {store.uri}")


def build_index_and_answer(recipe: Recipe, store: Store) -> Artifact:
    """The index; when nothing was released on it yet, also a first answer from it, before the long part."""
    from cluster.releases import open_release
    from retrieval.index import build_index
    from retrieval.questions import read_questions
    from retrieval.retriever import require_chunks
    from training.splits import NEW_DOCUMENTS

    index = build_index(recipe, store)
    require_chunks(index, recipe.generation.passages, "generation.passages")
    if store.current("release", recipe.name) and open_release(store, recipe.name).index == index.ref:
        return index
    questions = read_questions(recipe.questions.path, "questions.path", recipe.questions.columns)
    answerable = [question for question in questions if not question.unanswerable] or questions
    asked = pick_questions([q for q in answerable if q.split == NEW_DOCUMENTS] or answerable, 1, recipe.seed)
    say("demo: a first answer, by retrieval alone (RAG), before any training:")
    answer, hits = answer_with_rag(recipe, index, asked[0].text)
    say(describe_answer(asked[0].text, answer, hits))
    return index


def pick_questions(questions: list[Question], count: int, seed: int) -> list[Question]:
    """A seeded choice over different kinds of question."""
    from evaluation.selection import select_questions

    return select_questions(questions, count, seed)


def describe_expected(question: Question) -> str:
    """The answer that the questions file gives."""
    if question.unanswerable:
        return "no answer in the documents"
    return question.answers[0] if question.answers else "the questions file gives no answer"


def answer_with_rag(recipe: Recipe, index: Artifact, question: str) -> tuple[Answer, list[Hit]]:
    """One answer by the base model over passages of the index, in this process."""
    from retrieval.retriever import Retriever
    from serving.answering import finish, prepare
    from serving.generator import open_engine
    from serving.strategies import STRATEGIES
    from training.base_model import base_model_directory
    from training.format import PromptFormat

    retriever = Retriever.open(index, recipe.encoder, recipe.search)
    hits = retriever.search([question], min(recipe.generation.passages, len(retriever)))[0]
    prompt_format, rag = PromptFormat.load(recipe.prompt, recipe.language), STRATEGIES["rag"]
    prepared = prepare(question, rag, hits, prompt_format, (), recipe.generation, seed=recipe.seed)
    base = base_model_directory(recipe.model)
    engine = open_engine(base, {}, recipe.generation, recipe.model)
    try:
        completion = engine.generate([prepared.request])[0]
    finally:
        engine.close()
    return finish(completion, rag, prepared.hits, prompt_format), hits


def describe_answer(question: str, answer: Answer, hits: list[Hit]) -> str:
    """Question, answer, and the passages that it was given, best first."""
    cut = " (cut short at generation.max_new_tokens)" if answer.finish_reason == "length" else ""
    lines = [f"Q: {question}", f"A: {without_repeats(answer.answer) or answer.error}{cut}", "Sources:"]
    for hit in hits:
        passage = hit.passage
        place = " | ".join(part for part in (passage.title, passage.heading) if part)
        text = " ".join(passage.text.split())
        lines.append(f"  [{hit.rank}] {place}: {text if len(text) <= 120 else text[:119] + '…'}")
        lines.append(f"      {passage.uri or passage.doc_id}, characters {passage.start} to {passage.end}")
    return "\n".join(lines)


def without_repeats(text: str) -> str:
    """Text without sentences said before: small models, decoded greedily, say theirs again and again."""
    sentences = re.split(r"(?<=[.!?])\s+|(?<=[。！？])", text)
    return " ".join(dict.fromkeys(sentence for sentence in sentences if sentence))


def train_both(recipe: Recipe, store: Store, index: Artifact) -> tuple[Artifact, dict[str, Artifact]]:
    """The samples, and the adapters by role.

    Raises:
        NotBetterError: An adapter is worse than the one that is served. The demo ends there: a report on the served
            adapter and the new samples would ask it questions that it may have been trained on.
    """
    from training.lora import ROLES, train_adapters
    from training.samples import build_samples

    samples = build_samples(recipe, store, index)
    return samples, train_adapters(recipe, store, samples, list(ROLES))


def compare_and_promote(
    recipe: Recipe, store: Store, index: Artifact, samples: Artifact, adapters: dict[str, Artifact]
) -> None:
    """The report, then a release of exactly what was evaluated, made the one that is served."""
    from cluster.releases import promote
    from evaluation.report import evaluate

    router = trained_router(recipe, store, index)
    evaluate(recipe, store, index, samples, adapters, router=store.open_ref(router) if router else None)
    ref = release_of(recipe, store, index, samples, adapters)
    if store.current("release", recipe.name) != ref.version:
        promote(store, recipe.name, ref.version)
        say(f"release: {ref} is promoted")
    else:
        say(f"release: {ref} is current")


def release_of(
    recipe: Recipe, store: Store, index: Artifact | None, samples: Artifact | None, adapters: dict[str, Artifact]
) -> ArtifactRef:
    """The release of these artifacts, the recipe's router and its base model, published but not promoted."""
    from cluster.model_source import model_digest
    from cluster.releases import publish_release
    from training.base_model import base_model_directory
    from training.format import FORMAT_VERSION

    return publish_release(
        store,
        recipe.name,
        index=index.ref if index else None,
        samples=samples.ref if samples else None,
        adapters={role: adapter.ref for role, adapter in adapters.items()},
        base_digest=model_digest(base_model_directory(recipe.model)),
        prompt_format=FORMAT_VERSION,
        router=trained_router(recipe, store, index),
    )


def trained_router(recipe: Recipe, store: Store, index: Artifact | None) -> ArtifactRef | None:
    """The intent classifier that was trained last, where the recipe has labelled utterances.

    Raises:
        ArtifactError: It reads embeddings that the index does not give.
    """
    from serving.intents import open_classifier

    if not recipe.router.examples or store.current("router", recipe.name) is None:
        return None
    router = store.open("router", recipe.name)
    open_classifier(router, index)
    return router.ref


def serve_and_ask(recipe: Recipe, store: Store, samples: Artifact, *, keep: bool) -> None:
    """The graph, three held-out questions over HTTP, and the line to try; with `keep` it stays up."""
    from cluster.releases import open_release
    from serving.cli import stay_up
    from serving.client import ask_over_http, curl_line, describe_reply
    from serving.keys import asks_for_keys
    from serving.service import running_service
    from training.samples import load_questions
    from training.splits import NEW_DOCUMENTS, NEW_QUESTIONS

    release = open_release(store, recipe.name)
    held_out = load_questions(samples, NEW_DOCUMENTS) or load_questions(samples, NEW_QUESTIONS)
    held_out = held_out or load_questions(samples)
    with_key = asks_for_keys(recipe.serve)
    with running_service(recipe, store, release) as base_url:
        for question in pick_questions(held_out, 3, recipe.seed):
            say(describe_reply(question.text, ask_over_http(base_url, question.text)))
            say(f"   expected: {describe_expected(question)}")
        if keep:
            stay_up(base_url, str(release.ref), with_key=with_key)
        else:
            line = curl_line(base_url, held_out[0].text, with_key=with_key)
            say(f"Try it yourself: `rayft serve` keeps it up; then\n{line}")


@app.command()
def release(
    recipe: RecipeArgument,
    no_promote: Annotated[bool, typer.Option("--no-promote", help="Only publish it.")] = False,
    without_index: Annotated[
        bool, typer.Option("--without-index", help="Closed-book: only what answers without documents.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Release what the recipe has built so far (index, adapters, router, as far as there are any) and promote it."""
    from cluster.releases import open_release, promote
    from cluster.store import Store

    loaded = load(recipe, overrides or [])
    store = Store(loaded.store.uri)
    if without_index:
        ref = release_of(loaded, store, None, None, closed_book_adapters(loaded, store))
    else:
        index = current_index(loaded, store)
        ref = release_of(loaded, store, index, *trained_on(loaded, store, index))
    parts = [role for role in open_release(store, loaded.name, ref.version).pins() if role != "samples"]
    if not no_promote:
        promote(store, loaded.name, ref.version)
    say(f"release: {ref} with {', '.join(parts)} is {'published' if no_promote else 'promoted'}")


def closed_book_adapters(recipe: Recipe, store: Store) -> dict[str, Artifact]:
    """The adapters that answer without documents: those of the recipe's index, or where the store holds none the
    adapters that were published last.

    Raises:
        UserError: There is none.
    """
    from serving.strategies import STRATEGIES

    roles = {one.adapter for one in STRATEGIES.values() if one.adapter and not one.retrieves}
    if store.current("index", recipe.name) is not None:
        _, trained = trained_on(recipe, store, current_index(recipe, store))
    else:
        published = {role: f"{recipe.name}-{role}" for role in roles}
        trained = {
            role: store.open("adapter", name) for role, name in published.items() if store.current("adapter", name)
        }
    adapters = {role: adapter for role, adapter in trained.items() if role in roles}
    if not adapters:
        raise UserError(
            f"--without-index: there is no {' or '.join(sorted(roles))} adapter of {recipe.name}; run `rayft train "
            "lora RECIPE --objective dsf` first"
        )
    return adapters


def current_index(recipe: Recipe, store: Store) -> Artifact:
    """The index that was built or updated last.

    Raises:
        UserError: It was built otherwise than the recipe says.
    """
    from cluster.manifest import plain
    from retrieval.index import index_config

    index = store.open("index", recipe.name)
    if not recipe.collections and index.manifest.config != plain(index_config(recipe)):
        raise UserError(f"{index.ref} was built with other settings than the recipe has: run `rayft index build` first")
    return index


def trained_on(recipe: Recipe, store: Store, index: Artifact) -> tuple[Artifact | None, dict[str, Artifact]]:
    """Samples and adapters of the index. Where none were made from this version of it, those of the promoted release:
    the index moves on without retraining."""
    from cluster.model_source import model_digest
    from cluster.releases import KIND, open_release
    from training.base_model import base_model_directory
    from training.format import FORMAT_VERSION
    from training.lora import ROLES, adapter_plan
    from training.samples import samples_plan

    samples, adapters = None, {}
    if recipe.questions.path and store.exists(plan := samples_plan(recipe, index).ref):
        samples = store.open_ref(plan)
        for objective, role in ROLES.items():
            if store.exists(trained := adapter_plan(recipe, samples, objective).ref):
                adapters[role] = store.open_ref(trained)
    if adapters or store.current(KIND, recipe.name) is None:
        return samples, adapters
    before = open_release(store, recipe.name)
    agreed = (before.base_digest, before.prompt_format)
    if not before.adapters or agreed != (model_digest(base_model_directory(recipe.model)), FORMAT_VERSION):
        return samples, adapters
    say(f"release: keeps the adapters of {before.ref}, which were trained on an earlier version of the index")
    kept = None if before.samples is None else store.open_ref(before.samples)
    return kept, {role: store.open_ref(ref) for role, ref in before.adapters.items()}


@app.command()
def ask(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder, or one file, of text or Markdown.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    overrides: SetOption = None,
) -> None:
    """Index a folder (once, while it stays the same) and answer a question from it, with sources."""
    from cluster.store import Store
    from retrieval.index import build_index

    if not question.strip():
        raise UserError("ask: the question is empty")
    quoted = json.dumps(path, ensure_ascii=False)  # a value is YAML: `notes #1` would lose its end
    language = "zh" if any("\u4e00" <= char <= "\u9fff" for char in question) else "en"
    settings = [f"name={name_of_folder(path)}", f"language={language}", *(overrides or []), f"corpus.path={quoted}"]
    loaded = load("own_documents", settings)
    index = build_index(loaded, Store(loaded.store.uri))
    if language == "zh" and loaded.model.base.startswith("embedded:"):
        say("ask: the embedded SmolLM2 hardly knows Chinese: rely on the sources, or name another --set model.base=…")
    answer, hits = answer_with_rag(loaded, index, question)
    say(describe_answer(question, answer, hits))


def name_of_folder(path: str) -> str:
    """The name under which `ask` keeps a folder's index: folders of one name in two places are kept apart."""
    place = path if "://" in path else str(Path(path).expanduser().absolute())
    words = re.sub(r"[^a-z0-9]+", "-", Path(place).stem.lower()).strip("-")[:32].strip("-") or "documents"
    return f"{words}-{hashlib.sha256(place.encode()).hexdigest()[:6]}"


def main() -> None:
    """Entry point: a `UserError` becomes one line and exit status 2; 1 where what was trained is not good enough."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except UserError as error:
        complain(f"rayft: {' '.join(str(error).split())}")
        sys.exit(1 if isinstance(error, NotBetterError) else 2)
    except KeyboardInterrupt:
        complain("rayft: interrupted; run the same command again to go on with the unfinished stage")
        sys.exit(130)


if __name__ == "__main__":
    main()
