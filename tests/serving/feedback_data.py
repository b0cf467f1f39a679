"""Answers and ratings for the tests of feedback."""

import dataclasses
import time

from serving.interfaces import Caller
from serving.records import Interaction, Rating

ALICE = Caller(tenant="acme", key_id="k1")


def interaction(request_id="r1", **fields):
    given = Interaction(
        request_id=request_id,
        at=time.time(),
        question="What is the capital of Greece?",
        answer="Athens",
        strategy="raft",
        intent="fact_lookup",
        confidence=0.9,
        propensity=0.5,
        experiment="ab",
        release="release/test/0123456789abcdef",
        tenant="acme",
        key_id="k1",
        user="alice",
        quotes=("Athens is the capital.",),
        doc_ids=("greece",),
        total_ms=12.5,
    )
    return dataclasses.replace(given, **fields)


def rating(request_id="r1", satisfied=1.0, **fields):
    return Rating(request_id, satisfied, **fields)
