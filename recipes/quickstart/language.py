"""A small piece of English: who does what to whom, in four tenses and two voices.

A `Sentence` holds what happens apart from how it is told:

    >>> cat, mouse = Noun("cat", "cats"), Noun("mouse", "mice")
    >>> chase = Verb("chase", "chased", "chased")
    >>> scene = Sentence(Phrase("the", "old", cat), chase, Phrase("two", "", mouse, plural=True))
    >>> say(scene)
    'The old cat chases two mice.'

A task changes one thing about it and tells it again:

    >>> say(replace(scene, form="question"))
    'Does the old cat chase two mice?'
    >>> say(replace(scene, tense="past", voice="passive"))
    'Two mice were chased by the old cat.'

The base model learns the tasks in `BASE_TASKS`. It reads passive sentences, moves them to other
tenses and turns them into active ones, but nobody ever asks it to make one out of an active
sentence. That is `NEW_TASK`, and LoRA teaches it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

Row = dict[str, list[dict[str, str]]]

TENSES = ("present", "past", "future", "perfect")
VOICES = ("active", "passive")
FORMS = ("statement", "negative", "question")


# The parts of a sentence


@dataclass(frozen=True)
class Noun:
    """Somebody or something, one and many: `Noun("mouse", "mice")`."""

    one: str
    many: str


@dataclass(frozen=True)
class Verb:
    """Something one can do, as in *see, saw, seen*: `Verb("see", "saw", "seen")`."""

    base: str
    past: str
    participle: str


@dataclass(frozen=True)
class Phrase:
    """A noun with its company: `Phrase("the", "old", mouse, plural=True)` is *the old mice*."""

    determiner: str
    adjective: str
    noun: Noun
    plural: bool = False


@dataclass(frozen=True)
class Sentence:
    """What happens (doer, verb, receiver, place) and how it is told (tense, voice, form)."""

    doer: Phrase
    verb: Verb
    receiver: Phrase
    place: str = ""
    tense: str = "present"
    voice: str = "active"
    form: str = "statement"


@dataclass(frozen=True)
class Scenery:
    """Words that make sense together: who can do these things, and to whom or what."""

    doers: tuple[Noun, ...]
    verbs: tuple[Verb, ...]
    receivers: tuple[Noun, ...]
    adjectives: tuple[str, ...]


# The words


def nouns(words: str) -> tuple[Noun, ...]:
    """`"dog mouse/mice"` becomes `Noun("dog", "dogs"), Noun("mouse", "mice")`."""
    pairs = (word.partition("/") for word in words.split())
    return tuple(Noun(one, many or one + "s") for one, _, many in pairs)


def verbs(words: str) -> tuple[Verb, ...]:
    """`"help feed/fed see/saw/seen"` becomes three verbs; where a form is missing, it is regular."""
    return tuple(conjugated(*word.split("/")) for word in words.split())


def conjugated(base: str, past: str = "", participle: str = "") -> Verb:
    """`conjugated("bake")` is *bake, baked, baked*; `conjugated("feed", "fed")` *feed, fed, fed*."""
    past = past or base + ("d" if base.endswith("e") else "ed")
    return Verb(base, past, participle or past)


PEOPLE = nouns(
    "farmer baker teacher doctor singer painter gardener sailor king queen boy girl pilot dancer"
    " child/children man/men woman/women"
)
ANIMALS = nouns("dog cat horse goat duck owl rabbit pony/ponies fox/foxes mouse/mice goose/geese")
THINGS = nouns(
    "lamp chair boat drum basket kite clock hat coat bell wheel ladder cart mirror bowl"
    " box/boxes brush/brushes shelf/shelves toy"
)
FOOD = nouns(
    "apple cake pie pear plum carrot cookie bean egg onion pancake"
    " berry/berries cherry/cherries potato/potatoes tomato/tomatoes peach/peaches loaf/loaves"
)
MEETING = verbs(
    "help visit greet thank call find/found meet/met hear/heard teach/taught see/saw/seen"
    " draw/drew/drawn choose/chose/chosen forget/forgot/forgotten forgive/forgave/forgiven"
    " wake/woke/woken"
)
HERDING = verbs("follow watch chase love carry/carried feed/fed lead/led hold/held catch/caught")
MAKING = verbs(
    "paint clean move fix use wash drop/dropped make/made buy/bought sell/sold"
    " bring/brought lose/lost keep/kept send/sent break/broke/broken hide/hid/hidden"
    " throw/threw/thrown take/took/taken shake/shook/shaken"
)
COOKING = verbs("bake cook taste share serve count order smell fry/fried eat/ate/eaten")
CHARACTER = ("old", "young", "kind", "tall", "happy", "quiet", "clever", "brave", "gentle", "busy", "hungry")
LOOKS = ("old", "new", "red", "blue", "green", "small", "big", "round", "heavy", "pretty")
TASTE = ("sweet", "fresh", "small", "big", "round", "warm", "soft", "tasty", "cold")

LIVING = PEOPLE + ANIMALS
SCENERIES = (
    Scenery(LIVING, MEETING, LIVING, CHARACTER),
    Scenery(LIVING, HERDING, ANIMALS, CHARACTER),
    Scenery(PEOPLE, MAKING, THINGS, LOOKS),
    Scenery(PEOPLE, COOKING, FOOD, TASTE),
)
FOR_ONE = ("the", "a", "this", "that")
FOR_MANY = ("the", "two", "three", "these")
PLACES = tuple(
    f"{where} the {spot}"
    for where, spots in {
        "in": "garden kitchen village forest yard",
        "near": "river bridge castle lake tower",
        "at": "market station school",
        "on": "hill beach island",
    }.items()
    for spot in spots.split()
)


# From a sentence to its words

HELPERS = {
    ("active", "present"): ("does", "do"),
    ("active", "past"): ("did", "did"),
    ("passive", "present"): ("is", "are"),
    ("passive", "past"): ("was", "were"),
}


def say(sentence: Sentence) -> str:
    """The sentence in plain English: `'Have the pies been eaten by a child in the garden?'`"""
    subject, rest = sentence.doer, words_of(sentence.receiver)
    if sentence.voice == "passive":
        subject, rest = sentence.receiver, f"by {words_of(sentence.doer)}"
    helper, action = helper_and_action(sentence, subject.plural)
    if sentence.form == "question":
        return written(helper, words_of(subject), action, rest, sentence.place, end="?")
    if sentence.form == "negative":
        return written(words_of(subject), helper, "not", action, rest, sentence.place)
    told = told_in_one(sentence, subject.plural) or f"{helper} {action}"
    return written(words_of(subject), told, rest, sentence.place)


def written(*parts: str, end: str = ".") -> str:
    """`written("two mice", "", "slept")` is *Two mice slept.*"""
    text = " ".join(part for part in parts if part)
    return text[0].upper() + text[1:] + end


def words_of(phrase: Phrase) -> str:
    """`'an old mouse'`, `'two mice'`."""
    noun = phrase.noun.many if phrase.plural else phrase.noun.one
    rest = f"{phrase.adjective} {noun}".strip()
    article = "an" if phrase.determiner == "a" and rest[0] in "aeiou" else phrase.determiner
    return f"{article} {rest}"


def helper_and_action(sentence: Sentence, plural: bool) -> tuple[str, str]:
    """What is done, in two halves: `("did", "eat")`, `("has", "eaten")`, `("were", "eaten")`."""
    passive, verb = sentence.voice == "passive", sentence.verb
    if sentence.tense == "future":
        return "will", f"be {verb.participle}" if passive else verb.base
    if sentence.tense == "perfect":
        return "have" if plural else "has", f"been {verb.participle}" if passive else verb.participle
    one, many = HELPERS[sentence.voice, sentence.tense]
    return many if plural else one, verb.participle if passive else verb.base


def told_in_one(sentence: Sentence, plural: bool) -> str:
    """*chases*, *chased*: English says these without a helper. Empty where it needs one."""
    if sentence.voice == "passive" or sentence.tense not in ("present", "past"):
        return ""
    if sentence.tense == "past":
        return sentence.verb.past
    return sentence.verb.base if plural else third_person(sentence.verb.base)


def third_person(base: str) -> str:
    """`"carry"` becomes *carries*, `"watch"` *watches*, `"feed"` *feeds*."""
    if base.endswith("ry"):
        return base[:-1] + "ies"
    return base + ("es" if base.endswith(("ch", "sh", "x", "ss")) else "s")


# The tasks


@dataclass(frozen=True)
class Task:
    """An instruction, the right answer to it, and the sentences it makes sense for."""

    instruction: str
    answer: Callable[[Sentence], str]
    fits: Callable[[Sentence], bool]


def retell(instruction: str, **change: Any) -> Task:
    """A task that changes one thing: `retell("Make it past", tense="past")`."""

    def answer(sentence: Sentence) -> str:
        return say(replace(sentence, **change))

    def fits(sentence: Sentence) -> bool:
        return replace(sentence, **change) != sentence

    return Task(instruction, answer, fits)


def swapped(sentence: Sentence) -> str:
    """*The cat sees a dog.* becomes *A dog sees the cat.*"""
    return say(replace(sentence, doer=sentence.receiver, receiver=sentence.doer))


def three_forms(sentence: Sentence) -> str:
    """`'Eat, ate, eaten.'`"""
    verb = sentence.verb
    return written(f"{verb.base}, {verb.past}, {verb.participle}")


def always(_: Sentence) -> bool:
    """For tasks that make sense for every sentence."""
    return True


BASE_TASKS = (
    Task("Say it again", say, always),
    *(retell(f"Make it {tense}", tense=tense) for tense in TENSES),
    retell("Make it a statement", form="statement"),
    retell("Make it negative", form="negative"),
    retell("Make it a question", form="question"),
    retell("Make it active", voice="active"),
    Task("Swap the two", swapped, lambda sentence: sentence.verb in MEETING),
    Task("Name the verb", three_forms, always),
    Task("Who does it", lambda sentence: written(words_of(sentence.doer)), always),
    Task("To whom or what", lambda sentence: written(words_of(sentence.receiver)), always),
    Task("Where is it", lambda sentence: written(sentence.place), lambda sentence: bool(sentence.place)),
)
NEW_TASK = retell("Make it passive", voice="passive")


# Drawing sentences and rows by chance


def draw_phrase(chance: Random, choices: tuple[Noun, ...], adjectives: tuple[str, ...]) -> Phrase:
    """`'this brave goose'`: any company for any of the nouns, half the time with an adjective."""
    plural = chance.random() < 0.5
    determiner = chance.choice(FOR_MANY if plural else FOR_ONE)
    adjective = chance.choice(adjectives) if chance.random() < 0.5 else ""
    return Phrase(determiner, adjective, chance.choice(choices), plural)


def draw_sentence(chance: Random) -> Sentence:
    """A sentence about two different nouns, in any tense, voice and form."""
    scenery = chance.choice(SCENERIES)
    doer = draw_phrase(chance, scenery.doers, CHARACTER)
    others = tuple(noun for noun in scenery.receivers if noun != doer.noun)
    return Sentence(
        doer,
        chance.choice(scenery.verbs),
        draw_phrase(chance, others, scenery.adjectives),
        chance.choice(PLACES) if chance.random() < 0.4 else "",
        chance.choice(TENSES),
        chance.choice(VOICES),
        chance.choice(FORMS),
    )


def draw_row(chance: Random, tasks: tuple[Task, ...]) -> Row:
    """One of the tasks, asked about a sentence it makes sense for, with its answer."""
    task = chance.choice(tasks)
    sentence = draw_sentence(chance)
    while not task.fits(sentence):
        sentence = draw_sentence(chance)
    return {
        "messages": [
            {"role": "user", "content": f"{task.instruction}: {say(sentence)}"},
            {"role": "assistant", "content": task.answer(sentence)},
        ]
    }
