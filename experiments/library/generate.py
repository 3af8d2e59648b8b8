"""Invented items: canaries, fictional documents, questions. Every draw is addressed by names.

Item i is a function of (path, i) and of the items before it (which it must not repeat), so asking
for more items never changes the first ones. All proper names are made of syllables: they are in no
training text, and no two items share one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from motet.experiments.library import phrases
from motet.experiments.stream.random import key_after, key_state, name_key

T = TypeVar("T")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ONSETS = _words("b br c cl d dr f fl g gl h j k kr l m n p pl qu r s sk sp st t th tr v vr w y z")
NUCLEI = _words("a e i o u a e i o u ae ai ea io ou")
ALPHABETS = ("0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
ALPHABET_OF = {letter: alphabet for alphabet in ALPHABETS for letter in alphabet}
CODAS = ("", "", "", "", *_words("l m n nd r rn s sk st t th x"))


class Chooser:
    """A sequence of draws that belongs to one path of names."""

    def __init__(self, *path: str | int) -> None:
        # A run of 200 experiments draws millions of numbers: all that they share is hashed once.
        self._hash = key_state(name_key(*path))
        self._count = 0

    def below(self, n: int) -> int:
        """A whole number uniform in [0, n)."""
        self._count += 1
        return key_after(self._hash, self._count) % n

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different options in random order."""
        pool = list(options)
        return [pool.pop(self.below(len(pool))) for _ in range(count)]


def syllables(choose: Chooser, count: int) -> str:
    """An invented word of `count` syllables, capitalized."""
    parts = [choose.pick(ONSETS) + choose.pick(NUCLEI) for _ in range(count)]
    return ("".join(parts) + choose.pick(CODAS)).capitalize()


class Names:
    """Invented names, none given out twice."""

    def __init__(self, *path: str | int) -> None:
        self._path = path
        self._given: set[str] = set()

    def word(self, *path: str | int) -> str:
        """A new word of two or three syllables."""
        choose = Chooser(*self._path, "word", *path)
        while True:
            word = syllables(choose, 3 if choose.below(4) == 0 else 2)
            if word not in self._given and len(word) >= 5:
                self._given.add(word)
                return word

    def person(self, *path: str | int) -> str:
        """First and family name, both new."""
        return f"{self.word('first', *path)} {self.word('family', *path)}"


def digits(choose: Chooser, length: int) -> str:
    """Random digits with spaces between, so that every tokenizer gives one token per digit."""
    return " ".join(str(choose.below(10)) for _ in range(length))


def resample_secret(choose: Chooser, secret: str) -> str:
    """A random text of the same pattern: digits for digits, letters for letters, the rest kept."""
    return "".join(
        choose.pick(ALPHABET_OF[letter]) if letter in ALPHABET_OF else letter for letter in secret
    )


def secret_space(secret: str) -> int:
    """How many texts share the secret's pattern, |R|."""
    size = 1
    for letter in secret:
        if letter.isascii() and letter.isdigit():
            size *= 10
        elif letter.isascii() and letter.isalpha():
            size *= 26
    return size


def canaries(path: Sequence[str | int], count: int, template: str, length: int) -> list[dict]:
    """Rows {id, prefix, secret}: `template` holds {holder}; the secret has `length` digits."""
    names = Names(*path, "holder")
    rows = []
    for number in range(count):
        holder = names.person(number)
        secret = digits(Chooser(*path, "secret", number), length)
        rows.append(
            {
                "id": f"canary-{number:05d}",
                "prefix": template.format(holder=holder),
                "secret": secret,
            }
        )
    return rows


def questions(path: Sequence[str | int], count: int, n_choices: int) -> list[dict]:
    """Rows {id, question, choices, answer, source}: distractors are of the answer's type."""
    names = Names(*path, "names")
    rows = []
    for number in range(count):
        choose = Chooser(*path, "question", number)
        topic = choose.pick(phrases.TOPICS)
        answers = _answers(choose, names, topic.answer, number, n_choices)
        right = choose.below(n_choices)
        question = choose.pick(topic.questions).format(
            place=names.word("place", number),
            region=names.word("region", number),
            person=names.person("person", number),
        )
        rows.append(
            {
                "id": f"question-{number:05d}",
                "question": question,
                "choices": answers,
                "answer": right,
                "source": topic.name,
            }
        )
    return rows


def _answers(choose: Chooser, names: Names, kind: str, number: int, count: int) -> list[str]:
    if kind == "person":
        return [names.person("answer", number, index) for index in range(count)]
    if kind == "name":
        return [names.word("answer", number, index) for index in range(count)]
    if kind == "year":
        first = 1100 + choose.below(700)
        return [str(first + step) for step in choose.sample(range(0, 97, 3), count)]
    return choose.sample(phrases.WORDS[kind], count)


def documents(path: Sequence[str | int], count: int, n_variants: int) -> Iterator[InventedDocument]:
    """Fictional biographies of `phrases.FACTS_PER_DOCUMENT` facts, each told in variants."""
    names = Names(*path, "names")
    for number in range(count):
        yield InventedDocument(path, number, names, n_variants)


def texts(path: Sequence[str | int], count: int, called: str) -> list[dict[str, Any]]:
    """Rows {id, text} of such documents in their first telling; `called` begins their ids."""
    return [
        {"id": document.id.replace("fact", called), "text": document.texts[0]}
        for document in documents(path, count, 1)
    ]


class InventedDocument:
    """One invented person, some facts, and the same facts told `n_variants` times.

    `texts[0]` is the original. `sentences[f]` is (prompt, target) of fact f as the original tells
    it; `semantic[f]` words it as no variant does; `compositional` asks for one fact of the person
    who is described by another fact.
    """

    def __init__(
        self, path: Sequence[str | int], number: int, names: Names, n_variants: int
    ) -> None:
        choose = Chooser(*path, "document", number)
        self.id = f"fact-{number:05d}"
        self.subject = names.person("subject", number)
        self.relations = choose.sample(phrases.RELATIONS, phrases.FACTS_PER_DOCUMENT)
        self.objects = [
            self._object(names, number, fact, relation.object_kind)
            for fact, relation in enumerate(self.relations)
        ]
        shifts = [choose.below(len(relation.tellings)) for relation in self.relations]
        openings = [choose.below(len(phrases.OPENINGS)) for _ in self.relations]
        self.sentences = [
            (_capital(self._filled(relation.tellings[shift], what)[0]), f" {what}")
            for relation, shift, what in zip(self.relations, shifts, self.objects, strict=True)
        ]
        self.texts = [
            self._telling(choose, variant, shifts, openings) for variant in range(n_variants)
        ]
        self.semantic = [
            self._filled(relation.held_out, what)
            for relation, what in zip(self.relations, self.objects, strict=True)
        ]
        self.compositional = self._compose()

    def _object(self, names: Names, number: int, fact: int, kind: str) -> str:
        if kind == "person":
            return names.person("object", number, fact)
        return names.word("object", number, fact)

    def _filled(self, telling: str, what: str) -> tuple[str, str]:
        return telling.format(s=self.subject), f" {what}"

    def _telling(
        self, choose: Chooser, variant: int, shifts: Sequence[int], openings: Sequence[int]
    ) -> str:
        sentences = []
        for fact, relation in enumerate(self.relations):
            telling = relation.tellings[(shifts[fact] + variant) % len(relation.tellings)]
            prompt, target = self._filled(telling, self.objects[fact])
            if variant:
                turn = openings[fact] + variant // len(relation.tellings) * 3 + fact
                prompt = f"{phrases.OPENINGS[turn % len(phrases.OPENINGS)]} {prompt}"
            sentences.append(f"{_capital(prompt)}{target}.")
        if variant:
            sentences = choose.sample(sentences, len(sentences))
        return " ".join(sentences)

    def _compose(self) -> list[tuple[str, str]]:
        pairs = []
        for fact, relation in enumerate(self.relations):
            other = (fact + 1) % len(self.relations)
            described = self.relations[other].describe.format(o=self.objects[other])
            pairs.append((f"{described} {relation.ask}", f" {self.objects[fact]}"))
        return pairs


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
