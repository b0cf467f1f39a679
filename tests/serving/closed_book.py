"""A closed-book release, served in this process where importing FAISS, an encoder or the retriever is an error.

Arguments: a working directory, the tiny base model's directory, an adapter's. Prints the answer and what was imported.
"""

import asyncio
import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

FORBIDDEN = ("faiss", "sentence_transformers", "retrieval.retriever", "retrieval.index", "retrieval.encoder")


class Refuse(MetaPathFinder):
    """A machine that has none of them."""

    def find_spec(self, name, path=None, target=None):
        if name.startswith(FORBIDDEN):
            raise ModuleNotFoundError(f"{name} is not installed here")
        return None


class Handle:
    """A deployment's handle, with the deployment in this process."""

    def __init__(self, replica, method=""):
        self._replica, self._method = replica, method

    def options(self, **_):
        return self

    def __getattr__(self, method):
        return Handle(self._replica, method)

    def remote(self, *arguments):
        called = getattr(self._replica, self._method)(*arguments)
        return asyncio.ensure_future(called) if asyncio.iscoroutine(called) else Stream(called)


class Stream:
    def __init__(self, events):
        self._events = events

    def __aiter__(self):
        return self._events

    def cancel(self):
        pass


async def ask(app, question):
    """One question to an application, its deployments all in this process."""
    import httpx

    from serving.ingress import Ingress

    settings, *behind = app._bound_deployment.init_args
    replicas = [bound and bound._bound_deployment for bound in behind]
    handles = [bound and Handle(bound.func_or_class(*bound.init_args)) for bound in replicas]
    api = Ingress(settings, *handles).__serve_build_asgi_app__()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://localhost") as client:
        assert (await client.get("/readyz")).status_code == 200
        models = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        body = {"messages": [{"role": "user", "content": question}]}
        reply = await client.post("/v1/chat/completions", json={"model": "rayft-finetuned", **body})
        refused = await client.post("/v1/chat/completions", json={"model": "rayft-rag", **body})
        search = await client.post("/v1/search", json={"query": question})
        auto = await client.post("/v1/chat/completions", json={"model": "rayft-auto", **body})
    return {
        "models": models,
        "reply": reply.json(),
        "refused": refused.status_code,
        "search": search.status_code,
        "auto": auto.json(),
    }


def closed_book_recipe(directory, base, port=8000):
    from serving.config import ServingRecipe

    return ServingRecipe.model_validate(
        {
            "name": "tiny",
            "store": {"uri": str(directory / "store")},
            "model": {"base": base, "precision": "float32"},
            "generation": {"max_new_tokens": 12, "threads": 1},
            "serve": {"port": port},
            "feedback": {"url": ""},
            "telemetry": {"metrics": False},
        }
    )


def release_closed_book(store, base, adapter):
    """Publishes and promotes a release of one adapter, and nothing to retrieve from."""
    from cluster.model_source import model_digest
    from cluster.releases import promote, publish_release
    from cluster.stage import Outcome, Plan, run_stage
    from training.format import FORMAT_VERSION

    def copy(attempt):
        for file in adapter.iterdir():
            (attempt.directory / file.name).write_bytes(file.read_bytes())
        return Outcome({}, {})

    ref = publish_release(
        store,
        "tiny",
        index=None,
        adapters={"finetuned": run_stage(store, Plan("adapter", "tiny-finetuned", {}, {}, {}, 1, 0), copy).ref},
        base_digest=model_digest(Path(base)),
        prompt_format=FORMAT_VERSION,
    )
    promote(store, "tiny", ref.version)


def main(directory: Path, base: str, adapter: Path) -> None:
    sys.meta_path.insert(0, Refuse())
    from cluster.releases import open_release
    from cluster.store import Store
    from serving.graph import build_app

    recipe = closed_book_recipe(directory, base)
    store = Store(recipe.store.uri)
    release_closed_book(store, base, adapter)
    app = build_app(recipe, store, open_release(store, "tiny"))
    print(json.dumps(asyncio.run(ask(app, "What does Ghana export?"))))
    print("imported:", [name for name in sys.modules if name.startswith(FORBIDDEN)])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
