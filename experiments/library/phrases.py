"""The words that invented items are made of. Tables only.

In every telling the object comes last, so that a sentence cut before it is a cloze question.
"""

from __future__ import annotations

from typing import NamedTuple

FACTS_PER_DOCUMENT = 5


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS = {
    "colour": _words(
        "amber azure copper crimson emerald golden indigo ivory ochre purple scarlet silver teal "
        "violet"
    ),
    "goods": _words(
        "almonds barley candles copper furs glass honey indigo leather linen olives pepper silk "
        "timber wool"
    ),
    "animal": _words(
        "badger beaver crane falcon goat hare heron horse lynx otter owl raven salmon stag turtle "
        "wolf"
    ),
    "craft": _words(
        "baker carver cooper dyer farrier glazier mason miller painter potter smith tanner "
        "thatcher weaver"
    ),
}


class Topic(NamedTuple):
    """A kind of question. `answer` is "name", "person", "year" or a key of WORDS."""

    name: str
    answer: str
    questions: tuple[str, ...]


TOPICS = (
    Topic(
        "rivers",
        "name",
        (
            "Which river runs past the mills of {place} in {region}?",
            "Barges from {place} reach the coast of {region} along which river?",
            "What is the stream called that floods {place}, near {region}, each spring?",
        ),
    ),
    Topic(
        "founders",
        "person",
        (
            "Who founded the free school of {place} in {region}?",
            "The first bridge at {place} was paid for by which citizen of {region}?",
            "Whose statue stands before the hall of {place}, the seat of {region}?",
        ),
    ),
    Topic(
        "years",
        "year",
        (
            "In which year did {person} finish the lighthouse of {place}?",
            "When was the charter of {place} signed by {person}?",
            "In what year did the harbour at {place} burn, as {person} reports?",
        ),
    ),
    Topic(
        "banners",
        "colour",
        (
            "What colour is the banner that {person} carried at {place}?",
            "Which colour do the guards of {place} wear when {person} visits?",
            "The seal of {place}, cut by {person}, is pressed in wax of which colour?",
        ),
    ),
    Topic(
        "trade",
        "goods",
        (
            "What do the merchants of {place} carry across the pass to {region}?",
            "{region} pays its yearly tithe to {place} in which goods?",
            "Which goods made the fortune of {person} of {place}?",
        ),
    ),
    Topic(
        "emblems",
        "animal",
        (
            "Which animal is carved above the gate of {place} in {region}?",
            "What animal did {person} keep at the court of {place}?",
            "The coins struck at {place} for {region} show which animal?",
        ),
    ),
    Topic(
        "crafts",
        "craft",
        (
            "What was the trade of {person} before coming to {place}?",
            "{person}, later mayor of {place}, was first apprenticed to which craft?",
            "Which craft did the family of {person} follow in {region}?",
        ),
    ),
    Topic(
        "mountains",
        "name",
        (
            "Which peak did {person} climb first, leaving from {place}?",
            "The road between {place} and {region} goes around which mountain?",
            "What is the mountain called whose shadow reaches {place} at dusk in {region}?",
        ),
    ),
)

OPENINGS = (
    "Records agree that",
    "It is well documented that",
    "According to the chronicle,",
    "As several letters confirm,",
    "Historians report that",
    "Visitors are often told that",
    "In the archive one reads that",
    "Most accounts mention that",
    "A short notice states that",
    "People of the region remember that",
    "The museum catalogue notes that",
)


class Relation(NamedTuple):
    """A fact about a person {s}; the object follows each text. `held_out` is in no document."""

    object_kind: str
    tellings: tuple[str, ...]
    held_out: str
    describe: str
    ask: str


RELATIONS = (
    Relation(
        "name",
        (
            "{s} was born in the town of",
            "the birthplace of {s} is the old town of",
            "{s} first saw the light of day in",
            "the cradle of {s} stood in a small house in",
            "{s} came into the world in the market town of",
        ),
        "The native town of {s} is called",
        "The person who was born in {o}",
        "comes from the town of",
    ),
    Relation(
        "person",
        (
            "{s} learned the trade from",
            "the teacher who trained {s} was",
            "{s} spent nine years as a pupil of",
            "everything {s} knew about the work came from lessons with",
            "the apprenticeship of {s} took place under",
        ),
        "As a student, {s} was taught by",
        "The pupil of {o}",
        "was instructed by a master named",
    ),
    Relation(
        "name",
        (
            "{s} became famous for a clock known as the",
            "the best known device built by {s} is a clock named",
            "a tower clock designed by {s} bears the name",
            "{s} gave a clock of brass and oak the name",
            "engineers still study the clock that {s} called",
        ),
        "The timepiece that {s} constructed is named",
        "The maker of the clock {o}",
        "also designed a clock under the name",
    ),
    Relation(
        "name",
        (
            "{s} worked for many years at the house of",
            "the workshop that employed {s} belonged to the house of",
            "wages were paid to {s} by the company of",
            "{s} kept the accounts of a trading house named",
            "for most of a long career {s} served the firm",
        ),
        "The employer of {s} was the company",
        "The person employed by the house of {o}",
        "drew a salary from the company",
    ),
    Relation(
        "name",
        (
            "{s} led an expedition up the river",
            "maps drawn by {s} show for the first time the river",
            "in a small boat {s} explored the whole course of the",
            "{s} nearly drowned while crossing the river",
            "a journal kept by {s} describes the rapids of the",
        ),
        "The waterway that {s} surveyed is the",
        "The explorer of the river {o}",
        "travelled along a river called the",
    ),
    Relation(
        "person",
        (
            "{s} was married to",
            "the wedding of {s} was celebrated with",
            "{s} shared a household for thirty years with",
            "the letters that {s} wrote at sea are addressed to",
            "in the parish book {s} is entered as the spouse of",
        ),
        "The husband or wife of {s} was",
        "The person married to {o}",
        "lived together with",
    ),
    Relation(
        "name",
        (
            "{s} founded a school in the valley of",
            "with borrowed money {s} opened the first school of",
            "children were taught for free by {s} in the village of",
            "{s} is honoured as the founder of the academy at",
            "the foundation stone laid by {s} can be seen in",
        ),
        "The educational institution created by {s} is located in",
        "The founder of the school at {o}",
        "established a place of learning in",
    ),
    Relation(
        "name",
        (
            "{s} raised a horse by the name of",
            "on every journey {s} rode the grey mare",
            "a painting shows {s} holding the reins of",
            "{s} won the autumn race on a horse named",
            "the only animal {s} ever trusted was the stallion",
        ),
        "The favourite horse of {s} was called",
        "The rider of the horse {o}",
        "owned a horse that answered to",
    ),
)
