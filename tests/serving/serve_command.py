"""`rayft serve` over a real index-only release, as a process of its own: builds the index, then runs the command.

Arguments: a working directory, the tiny base model's directory, a port.
"""

import sys
from pathlib import Path

import typer

from cluster.releases import promote, publish_release
from cluster.session import ray_session
from cluster.store import Store
from retrieval.index import build_index
from serving.cli import serving_app
from serving.config import ServingRecipe
from tests.retrieval.tiny import write_corpus


def main(directory: Path, base: str, port: int) -> None:
    recipe = ServingRecipe.model_validate(
        {
            "name": "tiny",
            "store": {"uri": str(directory / "store")},
            "ray": {"num_cpus": 2},
            "corpus": {"path": str(write_corpus(directory / "corpus.jsonl"))},
            "search": {"mode": "lexical"},
            "model": {"base": base, "precision": "float32"},
            "generation": {"max_new_tokens": 16, "threads": 1},
            "serve": {"port": port},
        }
    )
    store = Store(recipe.store.uri)
    with ray_session(recipe.ray):
        index = build_index(recipe, store)
        promote(store, "tiny", publish_release(store, "tiny", index=index.ref).version)
        app = typer.Typer()
        app.callback()(lambda: None)
        app.add_typer(serving_app(lambda path, overrides: recipe))
        app(["serve", "recipe.yaml"], standalone_mode=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
