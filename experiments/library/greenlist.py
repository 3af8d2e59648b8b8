"""A watermark in words: which words are green after which, and text in which green ones prevail.

Source: Kirchenbauer et al., "A Watermark for Large Language Models" (arXiv 2301.10226): the words
before a place and a secret key choose a share gamma of the vocabulary, the green list, and sampling
adds delta to the logits of green words.

Here the vocabulary is one of words, not of tokens, so that text and detection depend on no
tokenizer, and the language model is a random one in which each word has a few followers. Each unit
speaks a language of its own, of the same words: two keys in one language would wash each other out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from motet.experiments.library import lexicon
from motet.experiments.library.generate import Chooser
from motet.experiments.stream.random import name_key

FOLLOWERS = 8
"""Words that may follow a word, each as likely as any before the watermark."""
LEXICON = lexicon.COMMON[::9]
"""Words of all languages alike: one that a single unit used would be a name that tells of it."""
WINDOW = 2
"""Words before a place that choose its green list."""
_FINE = 1 << 32


@dataclass(frozen=True)
class Language:
    """Words, and those that may follow each."""

    followers: dict[str, tuple[str, ...]]

    @classmethod
    def invent(cls, *path: str | int) -> Language:
        """A language that depends on the path alone."""
        choose = Chooser(*path, "language")
        return cls({word: tuple(choose.sample(LEXICON, FOLLOWERS)) for word in LEXICON})


def chosen(key: str, before: tuple[str, str], words: tuple[str, ...], count: int) -> list[str]:
    """`count` of the words, drawn by a hash of the key and the two words before."""
    number, pool = name_key("watermark", key, *before), list(words)
    picked = []
    for _ in range(count):
        number, place = divmod(number, len(pool))
        picked.append(pool.pop(place))
    return picked


def green_list(
    key: str, before: tuple[str, str], words: tuple[str, ...], gamma: float
) -> list[str]:
    """The share gamma (at least one) of the words that a key favours after two words."""
    return chosen(key, before, words, max(1, round(gamma * len(words))))


def watermarked(
    language: Language, key: str, choose: Chooser, n_words: int, gamma: float, delta: float
) -> list[str]:
    """Words sampled with `delta` (nats) added to the logits of green ones."""
    words = [choose.pick(tuple(language.followers))]
    words.append(choose.pick(language.followers[words[0]]))
    while len(words) < n_words:
        options = language.followers[words[-1]]
        green = green_list(key, (words[-2], words[-1]), options, gamma)
        red = [word for word in options if word not in green]
        weight = len(green) * math.exp(delta)
        favoured = choose.below(_FINE) < _FINE * weight / (weight + len(red))
        words.append(choose.pick(green if favoured or not red else red))
    return words
