"""A process that rates answers in a store: `python -m tests.serving.feedback_writer URL PREFIX COUNT`.

Each rating is acknowledged with a line on standard output once the store has returned; after the last one the process
waits to be killed.
"""

import sys
import time

from serving.feedback_store import FeedbackStore
from tests.serving.feedback_data import interaction, rating

if __name__ == "__main__":
    url, prefix, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    store = FeedbackStore.open(url, "test")
    for number in range(count):
        name = f"{prefix}-{number}"
        assert store.rate(interaction(name), rating(name))
        print(name, flush=True)
    time.sleep(60)
