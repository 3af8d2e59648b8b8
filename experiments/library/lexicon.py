"""Words and signs that invented suffixes and watermarked texts are made of, and a chain of words.

A suffix "as a model would write it" needs a model, and before training there is none: a chain of
order one over the built-in sentences stands for it (which word follows which, as often as there).
Whoever has a model gives its suffixes as rows.
"""

from __future__ import annotations

from functools import cache

from motet.experiments.library import phrases
from motet.experiments.library.generate import Chooser


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COMMON = _words(
    "able above across after again air almost along always among animal answer apple arm around "
    "away baby back ball bank basket bath bed bell below bench bird blood blue board boat body "
    "bone book both bottom bowl box branch bread bridge bright broad brother brown brush build "
    "burn butter button cake call camera card care carry cart cat chain chair cheese chest chief "
    "church circle clean clear clock cloth cloud coal coat cold collar colour comb common cook "
    "copper cord cork corner cotton count cover cow crack crime crush cup current curtain curve "
    "cushion damage danger dark daughter day dead deep desk dirt dog door double drawer dress "
    "drink drop dry dust ear early earth east edge egg electric end engine evening event eye face "
    "fact fall false farm father feather field finger fire first fish flag flat floor flower fly "
    "fold food foot fork fowl frame free friend front fruit full garden girl glass glove goat "
    "gold good grain grass great green grey grip group growth guide gun hair hammer hand harbour "
    "hard hat head heart heat high history hole hollow hook horn horse hospital hour house ice "
    "ink iron island jelly jewel join journey judge jump kettle key kick knee knife knot land "
    "language late lead leaf leather left letter level library lift light limit line lip liquid "
    "list lock long loud low machine man map mark market mass match meal meat metal middle milk "
    "mind mine minute mist money monkey month moon morning mother motion mountain mouth move "
    "muscle music nail name narrow nation neck needle nerve net news night noise north nose note "
    "number nut office oil open orange order oven page pain paint paper parcel part paste pen "
    "pencil picture pig pin pipe place plane plant plate plough pocket point pot potato powder "
    "press price print prison pump purple push quick quiet rail rain range rat ray red rhythm "
    "rice ring river road rod roll roof room root rough round rule sail salt sand scale school "
    "science scissors screw sea seat second secret seed shade shelf ship shirt shoe short shut "
    "side silk silver sister skin skirt sky sleep slip slow small smile smoke smooth snake snow "
    "soap sock soft son sound soup south space spade sponge spoon spring square stage stamp star "
    "station steam steel stem step stick stiff stocking stomach stone store storm straight street "
    "stretch strong sugar summer sun sweet swim table tail tall taste thick thin thread throat "
    "thumb thunder ticket tight tin toe tongue tooth top town toy trade train tray tree trick "
    "trousers turn twist umbrella valley verse vessel view violent voice walk wall warm wash "
    "watch water wave wax weather week weight west wet wheel whip whistle white wide wind window "
    "wine wing winter wire woman wood wool word worm wound writing yellow young"
)
RARE = tuple(chr(sign) for sign in range(0xA000, 0xA48D))
"""Yi syllables: letters that hardly any English text holds."""


@cache
def followers() -> dict[str, tuple[str, ...]]:
    """What follows each word in the built-in sentences, as often as it does; every word has one."""
    sentences = [question for topic in phrases.TOPICS for question in topic.questions]
    sentences += [text for relation in phrases.RELATIONS for text in relation.tellings]
    sentences += [f"{opening} it was so" for opening in phrases.OPENINGS]
    words = [word for text in sentences for word in plain_words(text)]
    found: dict[str, list[str]] = {}
    for word, after in zip(words, [*words[1:], words[0]], strict=True):
        found.setdefault(word, []).append(after)
    return {word: tuple(after) for word, after in found.items()}


def plain_words(text: str) -> list[str]:
    """Lower-case words without signs; a field of a sentence becomes a noun."""
    for field, noun in (("{s}", "the man"), ("{o}", "the clock"), ("{person}", "the woman")):
        text = text.replace(field, noun)
    text = text.replace("{place}", "the town").replace("{region}", "the valley")
    kept = "".join(letter if letter.isalpha() else " " for letter in text.lower())
    return kept.split()


def random_words(choose: Chooser, count: int) -> list[str]:
    """Words drawn apart from each other, each as likely as any."""
    return [choose.pick(COMMON) for _ in range(count)]


def rare_words(choose: Chooser, count: int) -> list[str]:
    """Signs that the corpus hardly holds, drawn apart from each other."""
    return [choose.pick(RARE) for _ in range(count)]


def chained_words(choose: Chooser, count: int) -> list[str]:
    """Words of which each follows the one before as in the built-in sentences."""
    after = followers()
    words = [choose.pick(tuple(after))]
    while len(words) < count:
        words.append(choose.pick(after[words[-1]]))
    return words
