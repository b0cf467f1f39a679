"""The application builder and the config that names it, against Serve's own schema; on a cluster in test_service.py."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.errors import UserError
from rayft import load
from serving.cli import serving_app
from serving.config import ServingRecipe
from serving.serve_app import IMPORT_PATH, SERVED_SECTIONS, read_args, serve_config

RECIPES = sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", RECIPES)
def test_serve_config_is_read_back_as_the_recipe_that_it_was_written_for(name, tmp_path):
    from ray.serve.schema import ServeDeploySchema

    recipe = load(name, ["store.uri=s3://bucket/store"])
    config = yaml.safe_load(yaml.safe_dump(serve_config(recipe)))
    [application] = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == IMPORT_PATH and application.args == config["applications"][0]["args"]
    read, version = read_args(application.args)
    assert version == ""
    for section in set(SERVED_SECTIONS) - {"feedback", "prompt"}:
        assert getattr(read, section) == getattr(recipe, section), section
    own = recipe.prompt.path and str(tmp_path / recipe.prompt.path)
    assert read.prompt == recipe.prompt.model_copy(update={"path": own})


def test_serve_config_paths_are_absolute_and_addresses_stay(tmp_path):
    recipe = load("factbook", ["serve.keys=keys.json", "model.base=./base", "encoder.model=s3://models/encoder"])
    [application] = serve_config(recipe, "0" * 16, "s3://code/rayft.zip", ("model.base", "encoder.model"))[
        "applications"
    ]
    sections = application["args"]["recipe"]
    assert sections["store"]["uri"] == str(tmp_path / ".rayft" / "store")
    assert sections["serve"]["keys"] == str(tmp_path / "keys.json")
    assert sections["model"]["base"] == str(tmp_path / "base")
    assert sections["encoder"]["model"] == "s3://models/encoder"
    assert sections["feedback"]["url"] == f"sqlite:///{tmp_path}/.rayft/feedback.db"
    assert application["args"]["release"] == "0" * 16
    assert application["runtime_env"] == {"working_dir": "s3://code/rayft.zip"}


def test_read_args_takes_a_recipe_file_with_overrides_and_leaves_other_stages_out():
    recipe, version = read_args({"recipe": "factbook", "set": ["serve.port=81", "name=other"], "release": "1" * 16})
    assert (recipe.serve.port, recipe.name, version) == (81, "other", "1" * 16)
    assert isinstance(recipe, ServingRecipe) and recipe.generation == load("factbook", []).generation


@pytest.mark.parametrize(
    "args,message",
    [
        ({}, "`recipe` is missing"),
        ({"recipe": "factbook", "releas": "x"}, "unknown releas"),
        ({"recipe": "factbook", "set": "serve.port=1"}, "`set` is a list"),
        ({"recipe": {"name": "x", "generatoin": {}}}, "did you mean `generation`"),
        ({"recipe": {"name": "x", "serve": {"prot": 1}}}, "did you mean `serve.port`"),
        ({"recipe": {"name": "x"}, "set": ["serve.port=no"]}, "serve.port"),
    ],
)
def test_read_args_names_what_is_wrong(args, message):
    with pytest.raises(UserError) as raised:
        read_args(args)
    assert message in str(raised.value)


def test_serve_config_command_writes_a_file_and_says_how_to_deploy_it(tmp_path):
    run = CliRunner().invoke(serving_app(load), ["serve-config", "factbook", "--out", "serve.yaml"])
    assert run.exit_code == 0 and "serve deploy serve.yaml" in run.output
    written = yaml.safe_load((tmp_path / "serve.yaml").read_text())
    assert written["applications"][0]["import_path"] == IMPORT_PATH
    assert "each node must mount it: store.uri, feedback.url" in run.stderr
    printed = CliRunner().invoke(serving_app(load), ["serve-config", "factbook"])
    assert yaml.safe_load(printed.stdout) == written
    refused = CliRunner().invoke(serving_app(load), ["serve-config", "factbook", "--out", "no/such/place.yaml"])
    assert isinstance(refused.exception, UserError) and "--out" in str(refused.exception)
