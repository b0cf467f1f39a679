"""Citations in the shapes that clients know: OpenAI's, ours, and (by `serve.citation_shapes`) Azure's and Perplexity's.

In: an answer. Out: JSON-ready parts of a response. Only verified quotes become sources; a quote that was not found in
the passages appears in our own list alone, marked `verified: false`. Markers are `[1]`, `[2]`, … in every shape (Azure
writes `[doc1]`); a source without an address is named by its document id.

- OpenAI: `message.annotations[].url_citation` {url, title, start_index, end_index}, the indexes those of the marker in
  the message (https://platform.openai.com/docs/api-reference/chat/object).
- Azure OpenAI On Your Data: `message.context` {citations [{content, title, url, filepath, chunk_id}], intent}
  (https://learn.microsoft.com/azure/ai-services/openai/references/on-your-data). `intent` is the question that was
  searched, `filepath` the document id, `content` the passage that was quoted.
- Perplexity: top-level `citations` (addresses) and `search_results` [{title, url, date, last_updated, snippet}], entry
  n of each being source n + 1 (https://docs.perplexity.ai/api-reference/chat-completions-post). Dates come from the
  document's metadata, where it has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from retrieval.records import Passage
from serving.answering import notes, verified
from serving.records import Answer
from training.format import Citation, Labels

AZURE = "azure"
PERPLEXITY = "perplexity"


def sources(answer: Answer) -> list[Citation]:
    """The answer's sources; source n has the marker [n + 1]. An abstention has none."""
    return [] if answer.abstained else list(dict.fromkeys(verified(answer)))


def numbered(answer: Answer) -> list[dict[str, Any]]:
    """Our own list: every quote, with where it stands and the number of its marker; none where it has none."""
    number = {citation: place for place, citation in enumerate(sources(answer), start=1)}
    return [{"number": number.get(citation), **citation.to_row()} for citation in answer.citations]


def url_citations(answer: Answer, content: str, labels: Labels) -> list[dict[str, Any]]:
    """OpenAI's annotations of the markers in `content`, the answer's readable text or what a stream sent, which ends
    in the same notes."""
    found = []
    at = len(content) - len(notes(answer, labels))
    for number, citation in enumerate(sources(answer), start=1):
        mark = f"[{number}]"
        start = content.find(mark, at)
        assert start >= 0, "every source has its marker"
        at = start + len(mark)
        source = {"url": _address(citation), "title": citation.title}
        found.append({"type": "url_citation", "url_citation": {**source, "start_index": start, "end_index": at}})
    return found


def message_fields(answer: Answer, question: str, shapes: Sequence[str]) -> dict[str, Any]:
    """Further fields of the message."""
    if AZURE not in shapes:
        return {}
    citations = []
    for citation in sources(answer):
        passage = _passage(answer, citation)
        citations.append(
            {
                "content": passage.text if passage else citation.quote,
                "title": citation.title,
                "url": citation.uri or None,
                "filepath": citation.doc_id,
                "chunk_id": passage.chunk_id if passage else None,
            }
        )
    return {"context": {"citations": citations, "intent": answer.standalone or question}}


def answer_fields(answer: Answer, shapes: Sequence[str]) -> dict[str, Any]:
    """Further fields of the response."""
    if PERPLEXITY not in shapes:
        return {}
    results = []
    for citation in sources(answer):
        passage = _passage(answer, citation)
        metadata = passage.metadata if passage else {}
        results.append(
            {
                "title": citation.title,
                "url": _address(citation),
                "date": _text(metadata.get("date")),
                "last_updated": _text(metadata.get("last_updated")),
                "snippet": citation.quote,
            }
        )
    return {"citations": [result["url"] for result in results], "search_results": results}


def _address(citation: Citation) -> str:
    return citation.uri or citation.doc_id


def _passage(answer: Answer, citation: Citation) -> Passage | None:
    """The passage that was quoted; `passage` counts from 1 among those shown."""
    place = citation.passage - 1
    return answer.hits[place].passage if 0 <= place < len(answer.hits) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
