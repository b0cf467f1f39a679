"""`rayft feedback review|accept|correct|reject|export|delete|stats`.

In: a loader of recipes. Out: a Typer sub-app. Heavy imports stand inside the commands, so that `--help` answers at
once. Not covered: training on what was exported (`rayft feedback improve`, evaluation/improvement.py).
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli import RecipeArgument, SetOption
from cluster.errors import UserError
from serving.config import ServingRecipe

if TYPE_CHECKING:
    from serving.feedback_questions import Exported
    from serving.feedback_store import Entry, FeedbackStore, Review

Load = Callable[[str, list[str]], ServingRecipe]

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Request id of the answer, as `review` shows it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]
TenantOption = Annotated[str | None, typer.Option("--tenant", help="Only of this tenant.")]
DocumentOption = Annotated[
    list[str] | None, typer.Option("--doc", metavar="DOC_ID", help="Document that holds the answer; repeatable.")
]


def feedback_app(load: Load) -> typer.Typer:
    """The `feedback` sub-app."""
    app = typer.Typer(no_args_is_help=True, help="Review what users said of answers, and learn from it.")
    _add_review(app, load)
    _add_decisions(app, load)
    _add_export(app, load)
    _add_upkeep(app, load)
    return app


@contextlib.contextmanager
def opened(recipe: ServingRecipe) -> Iterator[FeedbackStore]:
    """The recipe's feedback.

    Raises:
        UserError: None is kept, or the database cannot be reached.
    """
    from serving.feedback_store import FeedbackStore
    from serving.interfaces import FeedbackUnavailableError

    if not recipe.feedback.url:
        raise UserError("feedback.url is empty: no feedback is taken; set it to a database's URL")
    try:
        store = FeedbackStore.open(recipe.feedback.url, recipe.name)
        try:
            yield store
        finally:
            store.close()
    except FeedbackUnavailableError as error:
        raise UserError(f"feedback.url: {error}") from None


def _add_review(app: typer.Typer, load: Load) -> None:
    @app.command()
    def review(
        recipe: RecipeArgument,
        as_json: JsonOption = False,
        every: Annotated[bool, typer.Option("--all", help="Also what was reviewed, and what nobody rated.")] = False,
        just_list: Annotated[bool, typer.Option("--list", help="Ask nothing, even on a terminal.")] = False,
        overrides: SetOption = None,
    ) -> None:
        """Show rated answers that nobody has reviewed yet; on a terminal, decide about each."""
        from serving.feedback_store import Review
        from serving.feedback_view import describe_entry, entry_json

        config = load(recipe, overrides or [])
        asks = sys.stdin.isatty() and sys.stdout.isatty() and not (as_json or just_list or every)
        with opened(config) as store:
            count = 0
            for entry in store.entries(() if every else [Review.NEW], rated=not every):
                count += 1
                if as_json:
                    typer.echo(json.dumps(entry_json(entry), ensure_ascii=False))
                    continue
                typer.echo(describe_entry(entry))
                if asks and not _ask(store, entry):
                    break
            if not as_json:
                none = "no answers" if every else "nothing new to review"
                typer.echo(f"feedback: {f'{count} shown' if count else none} ({store.shown})")


def _ask(store: FeedbackStore, entry: Entry) -> bool:
    """Asks for a decision about an entry and records it; returns whether to go on."""
    from serving.feedback_store import Review
    from serving.feedback_view import printable

    request_id = entry.interaction.request_id
    typer.echo(f"  right answer as known: {printable(entry.answer)}")
    while True:
        chosen = typer.prompt("  [a]ccept, [c]orrect, [r]eject, [s]kip, [q]uit", default="s").strip().lower()[:1]
        if chosen == "q":
            return False
        if chosen == "s":
            return True
        if chosen == "r":
            return _decided(store.review(request_id, Review.REJECTED), request_id)
        if chosen == "a":
            return _decided(store.review(request_id, Review.ACCEPTED, doc_ids=_ask_documents(entry)), request_id)
        if chosen == "c" and (answer := typer.prompt("  right answer").strip()):
            documents = _ask_documents(entry)
            return _decided(store.review(request_id, Review.CORRECTED, answer=answer, doc_ids=documents), request_id)


def _ask_documents(entry: Entry) -> list[str]:
    known = ", ".join(entry.interaction.doc_ids) or "none is known"
    given = typer.prompt(
        f"  documents that hold it, separated by commas (Enter: {known})", default="", show_default=False
    )
    return [name.strip() for name in given.split(",") if name.strip()]


def _decided(found: bool, request_id: str) -> bool:
    if not found:
        typer.echo(f"  {request_id} was deleted meanwhile")
    return True


def _add_decisions(app: typer.Typer, load: Load) -> None:
    @app.command()
    def accept(
        recipe: RecipeArgument, request_id: IdArgument, doc: DocumentOption = None, overrides: SetOption = None
    ) -> None:
        """Take an answer, or the user's correction of it, as right: it will train."""
        from serving.feedback_store import Review

        _decide(load(recipe, overrides or []), request_id, Review.ACCEPTED, documents=doc or ())

    @app.command()
    def correct(
        recipe: RecipeArgument,
        request_id: IdArgument,
        text: Annotated[str, typer.Argument(metavar="TEXT", help="The right answer.")],
        doc: DocumentOption = None,
        overrides: SetOption = None,
    ) -> None:
        """Give the right answer to a question: it will train."""
        from serving.feedback_store import MAX_CORRECTION_CHARS, Review

        if not text.strip():
            raise UserError("correct: the right answer is empty")
        if len(text) > MAX_CORRECTION_CHARS:
            raise UserError(f"correct: {len(text)} characters; the most is {MAX_CORRECTION_CHARS}")
        _decide(load(recipe, overrides or []), request_id, Review.CORRECTED, text.strip(), doc or ())

    @app.command()
    def reject(recipe: RecipeArgument, request_id: IdArgument, overrides: SetOption = None) -> None:
        """Never train on an answer; its rating still counts."""
        from serving.feedback_store import Review

        _decide(load(recipe, overrides or []), request_id, Review.REJECTED)


def _decide(
    recipe: ServingRecipe, request_id: str, review: Review, answer: str = "", documents: Sequence[str] = ()
) -> None:
    with opened(recipe) as store:
        if not store.review(request_id, review, answer=answer, doc_ids=documents):
            raise UserError(f"feedback: there is no answer {request_id} of `{recipe.name}` in {store.shown}")
        typer.echo(f"feedback: {request_id} is {review}")


def _add_export(app: typer.Typer, load: Load) -> None:
    @app.command()
    def export(
        recipe: RecipeArgument,
        out: Annotated[Path, typer.Option(help="The questions file to write (.jsonl), for questions.train_path.")],
        tenant: TenantOption = None,
        overrides: SetOption = None,
    ) -> None:
        """Write accepted and corrected answers as questions to train on; nothing that tests is among them."""
        config = load(recipe, overrides or [])
        export_feedback(config, out, tenant)
        typer.echo(
            f"feedback: train on them with --set questions.train_path={out}, or `rayft feedback improve {recipe}`"
        )


def export_feedback(recipe: ServingRecipe, out: Path, tenant: str | None = None) -> Exported:
    """Writes the questions that reviewed feedback gives, and says what was left out.

    Args:
        recipe: With the feedback's database and the questions.
        out: The file, in place of an earlier export.
        tenant: Only of this tenant.

    Raises:
        UserError: There is none, or the file cannot be written.
    """
    from cluster.progress import complain, say
    from cluster.store import Store
    from serving.feedback_questions import TRAINS, export_questions, known_questions, write_export

    if out.suffix != ".jsonl":
        raise UserError(f"--out: {out} must end in .jsonl")
    with opened(recipe) as store:
        entries = [e for e in store.entries(TRAINS) if tenant in (None, e.interaction.tenant)]
        if not entries:
            raise UserError(f"feedback: nothing of `{recipe.name}` is accepted yet: run `rayft feedback review` first")
    known = known_questions(recipe, Store(recipe.store.uri))
    exported = export_questions(entries, known, recipe.questions.near_duplicate)
    for reason, count in sorted(exported.reasons().items()):
        say(f"feedback: left out {count} of {len(entries)}: {reason}")
    if not exported.questions:
        raise UserError("feedback: no question is left to train on; nothing was written")
    if not known:
        complain(
            "feedback: the recipe has no questions and no release: nothing could be checked against test questions"
        )
    if (tenants := len({entry.interaction.tenant for entry in entries})) > 1:
        complain(f"feedback: what users of {tenants} tenants asked goes into one model; --tenant keeps to one")
    write_export(out, exported.questions)
    say(f"feedback: wrote {len(exported.questions)} questions to {out}")
    if exported.repeats:
        say(f"feedback: {exported.repeats} nearly repeat a question of the recipe, and will not be trained twice")
    if exported.without_golden:
        say(
            f"feedback: {exported.without_golden} name no document that holds the answer, and train no RAFT row: name "
            "it with `rayft feedback accept … --doc DOC_ID`"
        )
    return exported


def _add_upkeep(app: typer.Typer, load: Load) -> None:
    @app.command()
    def delete(
        recipe: RecipeArgument,
        user: Annotated[str | None, typer.Option("--user", help="Everything of this user.")] = None,
        request: Annotated[str | None, typer.Option("--request", metavar="ID", help="This answer.")] = None,
        older_than: Annotated[
            float | None, typer.Option("--older-than", metavar="DAYS", min=0, help="What was asked longer ago.")
        ] = None,
        tenant: TenantOption = None,
        overrides: SetOption = None,
    ) -> None:
        """Delete feedback for good, from the store and from the memory of servers that run."""
        from serving.feedback_store import DAY_S, Selection

        if user is None and request is None and older_than is None:
            raise UserError("delete: say what: --user, --request or --older-than")
        if "" in (user, request):  # a script's variable that is not set would delete what names no user
            raise UserError("delete: an empty --user or --request names nothing; nothing was deleted")
        before = None if older_than is None else time.time() - older_than * DAY_S
        with opened(load(recipe, overrides or [])) as store:
            deleted = store.delete(Selection(user, tenant, request, before))
            typer.echo(f"feedback: deleted {deleted} stored answers ({store.shown})")
            if user is not None or request is not None:
                typer.echo(
                    "feedback: servers forget within seconds what waits for its rating; files that were exported "
                    "before, and adapters trained on them, still hold it: export and train again"
                )

    @app.command()
    def stats(recipe: RecipeArgument, as_json: JsonOption = False, overrides: SetOption = None) -> None:
        """Show per strategy how many rated it, and the share that was satisfied."""
        from serving.feedback_view import stats_json, stats_table

        config = load(recipe, overrides or [])
        with opened(config) as store:
            rows = store.satisfaction()
            title = f"Feedback on {config.name} ({store.shown})"
        typer.echo(json.dumps(stats_json(rows), ensure_ascii=False) if as_json else stats_table(rows, title))
