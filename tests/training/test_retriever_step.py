import copy

import pytest
import torch
import torch.multiprocessing as multiprocessing
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

from training.retriever_step import contrastive_step, embed_all

TEMPERATURE = 0.05
ROWS = [
    ("area of Austria", ("Austria Area total 83 sq km", "Austria Climate cold winters")),
    ("goods of Chile", ("Chile Exports copper", "Denmark Exports cheese and some more words")),
    ("what does Ghana export", ("Ghana Exports cocoa in summer", "Hungary Exports paprika")),
    ("how cold is it in Finland", ("Finland Climate cold winters", "Finland Area 300 sq km")),
    ("Estonia", ("Estonia Exports software", "Bulgaria roses")),
]


@pytest.fixture(scope="module")
def model(encoder_path):
    return SentenceTransformer(str(encoder_path), device="cpu").eval()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def stepped(model, rank: int = 0, world_size: int = 1, cached_texts: int = 1000, rows=ROWS):
    model = copy.deepcopy(model)
    loss = contrastive_step(model, rows, rank, world_size, TEMPERATURE, cached_texts)
    return loss, gradients(model)


def assert_same_gradients(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_contrastive_step_is_what_sentence_transformers_loss_gives(model, cached):
    reference = copy.deepcopy(model)
    made = CachedMultipleNegativesRankingLoss if cached else MultipleNegativesRankingLoss
    loss = made(reference, scale=1 / TEMPERATURE)
    columns = zip(*((query, *passages) for query, passages in ROWS), strict=True)
    features = [reference.preprocess(list(column)) for column in columns]
    value = loss(features, torch.zeros(len(ROWS)))
    value.backward()
    found, found_gradients = stepped(model)
    assert found == pytest.approx(float(value.detach()), rel=1e-4)
    assert_same_gradients(found_gradients, gradients(reference))


@pytest.mark.parametrize("cached_texts", [1, 3, 7])
def test_contrastive_step_in_small_parts_is_no_different(model, cached_texts):
    whole, parts = stepped(model), stepped(model, cached_texts=cached_texts)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert_same_gradients(parts[1], whole[1])


def _worker(rank: int, port: int, encoder: str, steps, replies) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    loaded = SentenceTransformer(encoder, device="cpu").eval()
    for number, rows in enumerate(steps):
        loss, found = stepped(loaded, rank, 2, 3, rows)
        replies.put((number, loss, {name: value.numpy() for name, value in found.items()}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_contrastive_step_on_two_workers_is_that_of_one(model, encoder_path, free_port):
    steps = (ROWS, ROWS[:1])  # shares of three rows and two; then one worker has none
    context = multiprocessing.get_context("spawn")
    replies = context.Queue()
    workers = [
        context.Process(target=_worker, args=(rank, free_port, str(encoder_path), steps, replies)) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    answers = [replies.get(timeout=120) for _ in range(2 * len(steps))]
    for worker in workers:
        worker.join(timeout=60)
    assert sorted(number for number, _, _ in answers) == [0, 0, 1, 1]
    for number, loss, found in answers:
        expected, expected_gradients = stepped(model, rows=steps[number])
        assert loss == pytest.approx(expected, rel=1e-4, abs=1e-6)
        # A parameter that takes no part (the pooler) has no gradient on one worker, and one of zeros on two.
        used = {name: torch.tensor(value) for name, value in found.items() if name in expected_gradients or value.any()}
        assert_same_gradients(used, expected_gradients)


def test_embed_all_is_what_the_encoder_gives_with_its_prompts(model):
    prompted = copy.deepcopy(model)
    prompted.prompts = {"query": "question: ", "document": "passage: "}
    texts = ["Austria", "a much longer text about cold winters and summers in Chile", ""] * 15
    for task, encode in (("query", prompted.encode_query), ("document", prompted.encode_document)):
        expected = torch.nn.functional.normalize(encode(texts, convert_to_tensor=True), dim=-1)
        torch.testing.assert_close(embed_all(prompted, texts, task), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(embed_all(prompted, texts, "query"), embed_all(prompted, texts, "document"), atol=1e-3)
    assert embed_all(prompted, [], "query").shape == (0, 32)
