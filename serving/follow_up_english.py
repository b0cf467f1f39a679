"""What an English follow-up refers to, by rules: ellipses ("And of Italy?") and pronouns ("its population").

In: a question and the turn before it. Out: the question as it would stand alone, or the question itself where no rule
is sure; a wrong question is worse than an incomplete one. What a pronoun means is the subject of the earlier question,
or the only name in it, or what it asks to define. Not covered: references to what an answer said ("the second one").
"""

from __future__ import annotations

import re

from serving.earlier_turn import Earlier

_AUX = r"(?:do|does|did|is|are|was|were|has|have|had|can|could|will|would|should|may|might|must)"
_PREPOSITION = r"(?:of|in|for|from|at|on|by|with|to|during|about|under|into|than|near|between|through|across|against)"
_NAME_WORD = r"(?:[A-ZÀ-ÖØ-Þ][\w’'.&-]*|\d[\w.-]*)"
_NAME = re.compile(
    rf"\b(?:the\s+)?(?P<name>[A-ZÀ-ÖØ-Þ][\w.&-]*(?:[’'](?!s\b)\w+)?"
    rf"(?:\s+(?:(?:of|de|la|le|du|da|dos|del|von|van|der|al|el)\s+(?:the\s+)?)?{_NAME_WORD})*)"
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_QUESTION_WORDS = _words("what who whom whose which when where why how")
# What a sentence begins with although it is no name.
_OPENERS = _QUESTION_WORDS | _words(
    "do does did is are was were has have had can could will would should may might must and but or so then also "
    "now well ok okay the a an in on at of for from by with to during about if it its they their he she his her "
    "this that these those there tell give list name explain define describe compare show find please thanks "
    "thank hi hello yes no not i i'm i've i'd my we our you your any all some more same"
)
_NO_NAMES = _words(
    "I I'm I've I'd OK January February March April May June July August September October November December "
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday Mr Mrs Ms Dr"
)
_PERSON = (
    r"(?:president|prime minister|minister|king|queen|leader|head|founder|author|ceo|director|manager|chair\w*|owner|"
    r"inventor|mayor|governor|chancellor|monarch|wife|husband|spouse|father|mother|son|daughter|editor|writer|painter|"
    r"composer|captain|coach|pope|emperor|secretary)"
)
_TIME = re.compile(
    r"(?:the\s+)?(?:(?:early|late|mid)[\s-]+)?(?:\d{3,4}s?|\d+(?:st|nd|rd|th)\s+century|(?:January|February|March|April|"
    r"May|June|July|August|September|October|November|December|summer|winter|spring|autumn|fall)(?:\s+\d{4})?)",
    re.I,
)
_LEAD = re.compile(
    r"^(?:(?:and|but|so|ok|okay|then|also|now|well|or)\b[,\s]+)*"
    r"(?:(?:what|how)\s+about|what\s+of|(?:the\s+)?same(?:\s+question)?(?:\s+(?=for|in|with)|\s+about))\s+(?P<rest>.+)$",
    re.I,
)
_AND = re.compile(r"^(?:and|or|but)\b[,\s]+(?P<rest>.+)$", re.I)
_SMALL_TALK = re.compile(
    r"(?:thanks?|thank you|ok|okay|great|cool|perfect|good|nice|hi|hello|hey|yes|no|sure|got it|i see|bye)\b"
    r"[\w\s,!.]{0,24}",
    re.I,
)
_MORE = re.compile(
    r"(?:please\s+)?(?:(?:tell|give|say|show)\s+(?:me\s+)?)?more(?:\s+(?:details?|information|info))?(?:\s+please)?",
    re.I,
)
_BARE = re.compile(r"(?:and\s+|but\s+)?(why|when|where|how)", re.I)
_COMPARES = re.compile(r"\b(?:than|versus|vs|compare[ds]?|between|difference|differ)\b", re.I)
_NO_FRAGMENT = _words(
    "me you us him her it them that this these those one ones today tomorrow now then there here yesterday others "
    "more why when where how who what which again"
)
# What a question without a verb may begin with.
_OF_FRAGMENTS = _words("the its their his her in of for")
_SUPERLATIVE = r"(?:\w+est|most\s+\w+|least\s+\w+)"
_PRONOUN = re.compile(r"\b(it|its|they|their|them|he|she|him|his|her)\b(?!['’])", re.I)
_PLEONASTIC = re.compile(
    r"\bit\s+(?:(?:is|was|be)\s+)?(?:\w+\s+)?(?:true|possible|necessary|important|likely|worth|ok|okay|safe|legal|"
    r"better|best|hard|difficult|easy|common|normal|allowed|dangerous|good|bad|right|wrong|advisable)"
    r"(?:\s+\w+)?\s+(?:to|that|for\s+\w+\s+to|if|whether)\b"
    r"|\bit\s+(?:take|takes|took|cost|costs|mean|means|feel|feels|make|makes)\s+(?:[\w-]+\s+){0,2}to\b"
    r"|\bit\s+like\s+to\b|\bit\s+take\s*[?.!]*$|\bwhat\s+(?:time|day|date|year)\s+is\s+it\b"
    r"|\bit\s+(?:rain|snow)\w*|\b(?:hot|cold|warm|sunny|windy|dark|late|early|humid)\s+(?:is|was|does)\s+it\b"
    r"|\b(?:is|was|does)\s+it\s+(?:get\s+)?(?:very\s+|so\s+)?(?:hot|cold|warm|sunny|windy|dark|late|early|humid)\b",
    re.I,
)
_THERE = re.compile(r"(?P<verb>\b[\w-]+)\s+there(?=\s*[?.!]*$|\s+(?:in|during|today|now|at|for|and)\b)", re.I)
_THAT_KIND = re.compile(
    r"\b(?:(?:this|that)\s+(?:country|nation|city|company|state|region|island|person|product|drug|medicine|device|model|"
    r"organi[sz]ation|place|book|film)|the\s+(?:country|nation|company|city)(?=\s*[?.!]*$))",
    re.I,
)
_SUBORDINATE = re.compile(
    r"\b(?:when|if|because|that|while|after|before|since|as|and|who|which|although|until)\b", re.I
)
# “Write it down”: what is meant is the answer. “Which of them”: what is meant was said over several turns.
_OF_THE_ANSWER = re.compile(
    r"\b(?:write|say|repeat|translate|summari[sz]e|rephrase|spell|shorten|rewrite|put|format|print|read|explain|check|"
    r"double-check|prove|simplify|sure)\b[^?]*\b(?:it|them)\b|\bof\s+(?:it|them)\b|\bdoes\s+it\s+matter\b|\bis\s+it\s+not\b",
    re.I,
)
# `it` with these is a thing that has properties, and not the property that was asked for.
_OF_A_THING = re.compile(
    r"\b(?:compare|border\w*|neighbou?r\w*|belong\w*|export\w*|import\w*|located|founded|member|part|join\w*|visit\w*)\b",
    re.I,
)
_PROPERTY = re.compile(
    rf"(?:and\s+)?(?:what|which|who|where|how\s+\w+)\s+(?:is|was)\s+(the\s+(?:[\w-]+\s+){{0,2}}?(?P<noun>[a-zA-Z][\w-]*)\s+"
    rf"(?:of|on|in|for)\s+[^?,.;]+?)(?:\s+(?:in|during|since|at)\s+{_TIME.pattern})?\s*[?.]*$",
    re.I,
)
_MASS = re.compile(r"(?:measles|diabetes|mumps|shingles|rabies|herpes|physics|mathematics|economics|politics|news)$")
_POSSESSIVE = frozenset({"its", "their", "his"})
_PERSONAL = frozenset({"he", "she", "him", "his", "her"})
_PLURAL = frozenset({"they", "their", "them"})
MAX_CHARACTERS = 300
"""A longer message explains itself."""


def is_small_talk(text: str) -> bool:
    """Whether a turn says nothing that a later one could refer to."""
    return _SMALL_TALK.fullmatch(text.strip()) is not None


def resolve(question: str, earlier: Earlier) -> str:
    """What `question` means after `earlier`; `question` itself where it stands alone or nothing is sure."""
    asked = question.strip()
    if len(asked) > MAX_CHARACTERS or is_small_talk(asked):
        return question
    words = asked.rstrip(" ?.!")
    phrase = _fragment(words, asked)
    if phrase:
        return _complete(phrase, earlier) or question
    if bare := _BARE.fullmatch(words):
        return _asked_again(bare[1], earlier) or question
    if _MORE.fullmatch(words):
        topic = _topic(earlier)
        return f"Tell me more about {topic}." if topic else question
    return _without_pronouns(asked, earlier) or question


def _fragment(words: str, asked: str) -> str:
    """What a question without a verb asks about; empty for a whole question."""
    lead = _LEAD.match(words) or _AND.match(words)
    rest = lead["rest"].strip() if lead else words
    count = len(rest.split())
    first = rest.split()[0].lower() if rest else ""
    if lead is None and (count > 4 or not asked.endswith("?") or first in _OPENERS - _OF_FRAGMENTS):
        return ""
    if first in _QUESTION_WORDS or re.match(rf"{_AUX}\b", first, re.I) or count > 6:
        return ""
    if lead is None and not (first in _OF_FRAGMENTS or _is_name(rest)):
        return ""
    return rest if re.search(rf"\b{_AUX}\b", rest, re.I) is None else ""


def _complete(phrase: str, earlier: Earlier) -> str:
    """The earlier question, asked of or about `phrase` instead; empty where no rule is sure."""
    words = phrase.split()
    if words[0].lower() in _NO_FRAGMENT - {"her", "his", "them"}:
        return ""
    if with_preposition := re.match(rf"({_PREPOSITION})\s+(.+)$", phrase, re.I):
        return _other_place(with_preposition[1].lower(), with_preposition[2], earlier)
    if _is_name(name := re.sub(r"[’']s$", "", phrase)):
        return _of_another(name, earlier)
    if own := re.match(r"(its|their|his|her)\s+(.+)$", phrase, re.I):
        topic = _meant(own[1].lower(), earlier)
        return _attribute(own[2], topic, earlier.question) if topic else ""
    if superlative := re.fullmatch(rf"the\s+({_SUPERLATIVE}|first|last)(?:\s+one)?", phrase, re.I):
        changed = re.sub(
            rf"\bthe\s+(?:{_SUPERLATIVE}|first|last)\b",
            f"the {superlative[1]}",
            earlier.question,
            count=1,
        )
        return changed if changed != earlier.question else ""
    if superlative := re.fullmatch(rf"the\s+({_SUPERLATIVE}\s+[a-z][\w-]*)", phrase, re.I):
        kind = re.compile(rf"\bthe\s+{_SUPERLATIVE}\s+[\w-]+(?=\s+{_PREPOSITION}\b)", re.I)
        return kind.sub(f"the {superlative[1]}", earlier.question, count=1) if kind.search(earlier.question) else ""
    determined = re.fullmatch(r"the\s+([a-z][\w-]*(?:\s+[a-z][\w-]*){0,3})", phrase)
    bare = re.fullmatch(r"([a-z][\w-]*(?:\s+[a-z][\w-]*){0,2})", phrase)
    whole = re.match(r"(?:what|who|which|where)\s+(?:is|are|was|were)\b", earlier.question, re.I)
    wanted = determined or (bare if whole and _names(earlier.question) else None)
    if wanted is None or re.search(rf"\b(?:one|ones|same|rest|other|others|{_PREPOSITION[3:-1]})\b", wanted[1]):
        return ""
    topic = _topic(earlier)
    if not topic or not re.match(
        r"(?:what|who|which|how\s+(?!do|does|did|can|to)\w+|tell|where)\b", earlier.question, re.I
    ):
        return ""
    return _attribute(wanted[1], topic, earlier.question)


def _other_place(preposition: str, thing: str, earlier: Earlier) -> str:
    """The earlier question with another `of …`, `in …`."""
    asked, is_time = earlier.question, _TIME.fullmatch(thing) is not None
    if not is_time and not _is_name(thing) and not re.fullmatch(r"(?:the\s+)?[\w-]+(?:\s+[\w-]+){0,3}", thing):
        return ""
    places = re.finditer(
        rf"\b{preposition}\s+((?:(?!\b{_PREPOSITION}\b)[^?,.;])+?)(?=\s+{_PREPOSITION}\b|\s*[?,.;]|\s*$)", asked, re.I
    )
    found = [place for place in places if (_TIME.fullmatch(place[1]) is not None) == is_time]
    if found:
        # A name takes a name's place, where the earlier question has one.
        last = next((place for place in reversed(found) if _is_name(place[1]) == _is_name(thing)), None)
        last = last or (found[-1] if not _is_name(thing) or not _names(asked) else None)
        if last:
            return asked[: last.start(1)] + thing + asked[last.end(1) :]
    if is_time:
        ending = re.search(r"\s*[?.!]*$", asked)
        assert ending is not None, "matches the empty end"
        return f"{asked[: ending.start()]} {preposition} {thing}{ending[0] or '?'}"
    return _of_another(thing, earlier) if _is_name(thing) else ""


def _of_another(name: str, earlier: Earlier) -> str:
    """The earlier question about `name` instead of what it was about."""
    asked = earlier.question
    if _COMPARES.search(asked):
        return ""
    spans = _names(asked)
    span = spans[0] if len(spans) == 1 else _subject(asked)
    if span is None:
        title = _title_in(asked, earlier)
        place = re.search(rf"\b{re.escape(title)}\b", asked, re.I) if title else None
        span = place.span() if place else None
    if span is None or asked[slice(*span)].lower() == name.lower():
        return ""
    return asked[: span[0]] + name + asked[span[1] :]


def _attribute(noun: str, topic: str, asked: str) -> str:
    """Asks for something of the topic, in the earlier question's tense."""
    past = re.search(r"\b(?:was|were|did)\b", asked, re.I) is not None
    last = noun.split()[-1].lower()
    plural = _is_plural(last)
    verb = ("were" if plural else "was") if past else ("are" if plural else "is")
    who = "Who" if re.search(rf"\b{_PERSON}s?$", noun, re.I) else "What"
    return f"{who} {verb} the {noun} of {topic}?"


def _asked_again(word: str, earlier: Earlier) -> str:
    """`Why?` after a yes-or-no question that was not denied."""
    asked = earlier.question
    if re.match(rf"{_AUX}\b", asked, re.I) is None or re.match(r"no\b|not\b|never\b", earlier.answer, re.I):
        return ""
    return f"{word.capitalize()} {asked[0].lower()}{asked[1:]}"


def _without_pronouns(asked: str, earlier: Earlier) -> str:
    """The question with names for its pronouns; empty where there is none to replace, or what it means is unsure."""
    kind = _THAT_KIND.search(asked)
    if kind and not _names(asked[: kind.start()]):
        topic = _topic(earlier)
        return asked[: kind.start()] + topic + asked[kind.end() :] if topic else ""
    place = _THERE.search(asked)
    if place and not re.match(rf"{_AUX}$|be|been|and|or$", place["verb"], re.I) and not _names(asked):
        topic = _topic(earlier)
        if not topic:
            return ""
        verb = place["verb"].lower()
        preposition = "to" if verb in ("get", "go", "travel", "fly", "move", "come", "drive") else "in"
        preposition = "at" if verb in ("work", "works", "study", "studies", "worked", "studied") else preposition
        return f"{asked[: place.end('verb')]} {preposition} {topic}{asked[place.end() :]}"
    pronoun = _PRONOUN.search(asked)
    if pronoun is None or _PLEONASTIC.search(asked) or _OF_THE_ANSWER.search(asked) or not _refers_back(asked, pronoun):
        return ""
    meant = ""
    if pronoun[1].lower() == "it" and not _OF_A_THING.search(asked):
        meant = _property(earlier.question)
    meant = meant or _meant(pronoun[1].lower(), earlier)
    if not meant:
        return ""
    group = (
        _PERSONAL if pronoun[1].lower() in _PERSONAL else (_PLURAL if pronoun[1].lower() in _PLURAL else {"it", "its"})
    )

    def named(found: re.Match[str]) -> str:
        word = found[1].lower()
        if word not in group:
            return found[0]
        owns = word in _POSSESSIVE or (
            word == "her" and re.match(r"\s+(?!in|on|at|to|for|with|from)[a-z]", asked[found.end() :])
        )
        name = meant[0].upper() + meant[1:] if found.start() == 0 else meant
        return (name + ("’" if name.endswith("s") else "’s")) if owns else name

    return _PRONOUN.sub(named, asked)


def _refers_back(asked: str, pronoun: re.Match[str]) -> bool:
    """Whether a pronoun means something of an earlier turn, and not of this question."""
    before, after, word = asked[: pronoun.start()], asked[pronoun.end() :], pronoun[1].lower()
    *told, _ = re.split(r"[.!?;]\s+", before)
    if not all(map(is_small_talk, told)):
        return False  # “My laptop does not start. What do I do with it?” says itself what it is about
    is_last = not after.strip(" ?.!") and word not in _POSSESSIVE
    if is_last and not _SUBORDINATE.search(before) and before.strip():
        return True  # an object is not its own subject: “Does Italy border it?”
    if _names(before):
        return False
    if word in _PLURAL:
        fronted = re.match(rf"(?:and\s+)?(?:what|which|how\s+many)\s+[\w\s-]+?\s+{_AUX}\s*$", before, re.I)
        if not fronted and re.search(r"\b(?:people|women|men|children|[a-z]{3,}[^su\W]s)\b", before):
            return False
    named = re.search(r"\b(?:the|a|an|each|every|any|some|no|my|your|our|this|that)\s+[\w-]+", before, re.I)
    return named is None or re.search(rf"\b{_PREPOSITION}\s*$", before, re.I) is not None


def _meant(pronoun: str, earlier: Earlier) -> str:
    """What a pronoun means; empty where that is unsure."""
    if pronoun in _PERSONAL:
        return _person(earlier)
    topic = _topic(earlier, joined=pronoun in _PLURAL)
    theirs = re.search(rf"\b{_AUX}\s+(?:i|you|we)\b", earlier.question, re.I)
    if theirs and topic and re.search(rf"\b(?:to|from|in|at|with|by)\s+{re.escape(topic)}", earlier.question):
        return ""  # “Do you ship to Canada?” is about shipping
    last = topic.split()[-1] if topic else ""
    plural = last.islower() and _is_plural(last)
    if topic and pronoun in _PLURAL and not plural and topic.islower():
        return ""
    return "" if plural and pronoun not in _PLURAL else topic


def _property(asked: str) -> str:
    """`the capital of Greece`, where that is what the earlier question asks for: `it` may mean it or Greece, and the
    whole names both."""
    found = _PROPERTY.match(asked.strip())
    if found is None or _is_plural(found["noun"].lower()) or re.fullmatch(_PERSON, found["noun"], re.I):
        return ""
    return found[1] if len(found[1].split()) <= 8 else ""


def _is_plural(word: str) -> bool:
    return word.endswith("s") and not word.endswith(("ss", "us", "is")) and _MASS.search(word) is None


def _person(earlier: Earlier) -> str:
    asked = earlier.question
    office = re.search(
        rf"\bthe\s+(?:[\w-]+\s+){{0,2}}?(?i:{_PERSON})(?:\s+of\s+(?:the\s+)?{_NAME_WORD}(?:\s+{_NAME_WORD})*)?", asked
    )
    if office:
        return office[0]
    if named := re.match(r"(?:who|tell\s+me\s+about)\b", asked, re.I):
        spans = _names(asked)
        if re.match(r"who\s+(?:is|was|are|were)\b", asked, re.I) or not named[0].lower().startswith("who"):
            return _text(asked, spans[0]) if len(spans) == 1 else ""
        return earlier.answer if _is_name(earlier.answer) else ""
    span = _subject(asked)
    return _text(asked, span) if span else ""


def _topic(earlier: Earlier, *, joined: bool = False) -> str:
    """What the earlier question is about; `joined` also takes two things named together."""
    asked = earlier.question.strip()
    defined = re.fullmatch(
        r"(?:what|who)\s+(?:is|are|was|were)\s+((?:an?\s+)?[\w’'-]+(?:\s+[\w’'-]+){0,2}?)\s*\??", asked, re.I
    )
    if (
        defined
        and not re.search(rf"\b{_PREPOSITION}\b|^the\b|['’]s\b", defined[1], re.I)
        and defined[1].lower() not in _OPENERS
    ):
        return defined[1]
    spans = _names(asked)
    pair = re.search(
        rf"({_NAME_WORD}(?:\s+{_NAME_WORD})*)\s+and\s+((?:the\s+)?{_NAME_WORD}(?:\s+{_NAME_WORD})*)", asked
    )
    if pair and pair[1].split()[0].lower() not in _OPENERS:
        whole = pair[0]
        return whole if joined or any(whole.lower() == title.lower() for title in earlier.titles) else ""
    if len(spans) == 1:
        return _text(asked, spans[0])
    if spans and (span := _subject(asked)):
        return _text(asked, span)
    if title := _title_in(asked, earlier):
        return title
    return "" if spans or _has_adjective(asked) else _common_topic(asked)


def _common_topic(asked: str) -> str:
    """What a question without names is about."""
    used = re.match(
        rf"(?:what|how|why|when|where)(?:\s+(?:often|long|much|many|far|fast|soon|well))?\s+{_AUX}\s+((?:(?:the|an?|my|your)\s+)?[a-z][\w-]*(?:\s+[a-z][\w-]*)??)\s+"
        r"(?:be|used|works?|made|mean|means|caused|treated|located|called|known|available|important|spread|prevented|for)\b",
        asked,
        re.I,
    )
    if used:
        return used[1]
    last = re.search(
        r"\b(?:(?:of|about|in|for)\s+((?:(?:the|my|your|an?)\s+)?[a-z][\w-]*(?:\s+[a-z][\w-]*)?)"
        r"|((?:the|my|this)\s+[a-z][\w-]*(?:\s+[a-z][\w-]*)?))\s*[?.!]*$",
        asked,
    )
    found = (last[1] or last[2]) if last else ""
    return "" if found.endswith(("ly", "ing")) else re.sub(r"^(?:my|this|your)\b", "the", found)


def _names(text: str) -> list[tuple[int, int]]:
    """Spans of names, with a `the` that belongs to them; a name that only describes a noun (`the Greek islands`) is
    none."""
    found = []
    for match in _NAME.finditer(text):
        start, end = match.span()
        words = match["name"].split()
        if not text[:start].strip() or text[:start].rstrip().endswith((".", "!", "?", ":")):
            while words and words[0].lower().rstrip(",") in _OPENERS:  # a sentence begins with a capital
                start = text.index(words[0], start) + len(words[0])
                words = words[1:]
            start += len(text[start:end]) - len(text[start:end].lstrip())
        if (
            len(words) > 2
            and words[1] == "of"
            and (words[0].isupper() or re.fullmatch(_PERSON + "|capital|population", words[0], re.I))
        ):
            start = text.index(" of ", start) + len(" of ")  # “the GDP of Japan” is no name
            words = words[3:] if words[2] == "the" else words[2:]
        end = start + len(text[start:end].rstrip(".,;:!?"))
        if not words or words[0] in _NO_NAMES or words[0].lower() in _OPENERS:
            continue
        if not _describes(text, start, end):
            found.append((start, end))
    return list({text[start:end].lower(): (start, end) for start, end in reversed(found)}.values())[::-1]


def _describes(text: str, start: int, end: int) -> bool:
    """Whether a name stands before the noun that it describes."""
    following = re.match(r"\s+([a-z][\w-]*)", text[end:])
    if following is None or re.fullmatch(rf"{_PREPOSITION}|{_AUX}|and|or|that|who|when|as|not", following[1]):
        return False
    # “Does Greece border …” has a subject and its verb; “Does the Basic plan include …” has not.
    return text[start:end].startswith("the ") or re.search(rf"\b{_AUX}\s+$", text[:start], re.I) is None


def _has_adjective(text: str) -> bool:
    return any(match["name"].split()[0].lower() not in _OPENERS for match in _NAME.finditer(text))


def _subject(text: str) -> tuple[int, int] | None:
    """The name that the question's verb belongs to."""
    for start, end in _names(text):
        if re.search(rf"\b{_AUX}\s+$", text[:start], re.I):
            return start, end
    return None


def _title_in(text: str, earlier: Earlier) -> str:
    """The only source of the earlier answer that the earlier question names."""
    found = {title for title in earlier.titles if re.search(rf"\b{re.escape(title)}\b", text, re.I)}
    return found.pop() if len(found) == 1 else ""


def _text(text: str, span: tuple[int, int]) -> str:
    return text[slice(*span)]


def _is_name(phrase: str) -> bool:
    """Whether a phrase is a name and nothing else."""
    match = _NAME.fullmatch(phrase)
    return match is not None and len(phrase.split()) <= 6 and match["name"].split()[0] not in _NO_NAMES
