"""Calls as models and cards write them, read by hand."""

import pytest

from evaluation.api_calls import ApiCall, ApiCatalogue, find_call
from retrieval.records import Document

ALEXNET = ApiCall("pytorch/vision", "alexnet")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("torch.hub.load(repo_or_dir='pytorch/vision', model='alexnet', pretrained=True)", ALEXNET),
        ('torch.hub.load("pytorch/vision", "alexnet", pretrained=True)', ALEXNET),
        ("torch.hub.load(model = 'alexnet' , repo_or_dir = 'pytorch/vision')", ALEXNET),
        ("torch.hub.load('pytorch/vision', model='alexnet')", ALEXNET),
        ("torch.hub.load(github='pytorch/vision', model='alexnet')", ALEXNET),
        ("hub.load('pytorch/vision',\n  'alexnet',)", ALEXNET),
        ("Use `torch.hub.load('pytorch/vision', 'alexnet')`, it classifies images (well).", ALEXNET),
        ("model = torch.hub.load('pytorch/vision', 'alexnet').eval(); model(x)", ALEXNET),
        ("torch.hub.load() fails; torch.hub.load('pytorch/vision', 'alexnet')", ALEXNET),
        ("torch.hub.load('pytorch/vision:v0.10.0', 'alexnet')", ApiCall("pytorch/vision:v0.10.0", "alexnet")),
        ("torch.hub.load(repo_or_dir='pytorch/fairseq')", ApiCall("pytorch/fairseq", "")),
        (
            "torch.hub.load(repo_or_dir='n/t', model='ntsnet', pretrained=True, **{'topN': 6, 'device':'cpu'})",
            ApiCall("n/t", "ntsnet"),
        ),
        ("torch.hub.load(repo_or_dir='a/b', 'meal', model='resnet', useGPU=use_gpu)", ApiCall("a/b", "resnet")),
        ("torch.hub.load('a/b', 'say \\'hi\\', (twice)')", ApiCall("a/b", "say 'hi', (twice)")),
        ("torch.hub.load('a/b', model=name)", ApiCall("a/b", "name")),
        ("torch.hub.load('a/b', ]broken[, model='m')", None),  # the bracket closes before the call does
        ("torch.hub.load('a/b', not python, model='m')", ApiCall("a/b", "m")),
        ("torch.hub.load(repo_or_dir='pytorch/vision', model='alexnet'", None),  # cut short
        ("torch.hub.list('pytorch/vision')", None),
        (f"torch.hub.load('a/b', {'-' * 20_000}1, model='m')", ApiCall("a/b", "m")),
        ("alexnet", None),
        ("", None),
    ],
)
def test_a_call_is_read_as_python_reads_it(text, expected):
    assert find_call(text) == expected


def test_a_catalogue_knows_each_cards_call_and_domain():
    card = '{"domain": "Depth", "api_name": "MiDaS", "api_call": "torch.hub.load(\'intel-isl/MiDaS\', model=\'DPT\')"}'
    documents = [
        Document("json", "MiDaS", card, "", {}),
        Document("plain", "AlexNet", "Load it: torch.hub.load('pytorch/vision', 'alexnet')", "", {"domain": "Images"}),
        Document("twin", "AlexNet", "torch.hub.load('pytorch/vision', model='alexnet')", "", {"domain": "Vision"}),
        Document("other", "README", "no call here", "", {"domain": "Images"}),
        Document("list", "Numbers", "[1, 2]", "", {"domain": "Images"}),
    ]
    catalogue = ApiCatalogue.of(documents)
    midas = ApiCall("intel-isl/MiDaS", "DPT")
    assert catalogue.cards == {"json": ("Depth", midas), "plain": ("Images", ALEXNET), "twin": ("Vision", ALEXNET)}
    assert catalogue.domains == {midas: frozenset({"Depth"}), ALEXNET: frozenset({"Images", "Vision"})}
