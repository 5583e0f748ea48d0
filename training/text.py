"""Words to write samples with: made-up names, everyday words, sentences that say nothing. Knows no skill."""

from __future__ import annotations

from random import Random

ONSETS = "b br c d dr f fl g gr h j k kr l m n p pl r s sh st t tr v w z".split()
VOWELS = "a e i o u ai ea ia".split()
CODAS = ["", "", "", "l", "n", "r", "s", "t", "x", "nd", "ck", "m"]

FIRST_NAMES = """Anna Ben Carla David Elena Felix Grace Hugo Irene Jonas Karin Leon Maria Nils Olga Paul Rosa Simon Tara
Viktor Wanda Yusuf Zoe Amir Bella Clara Dario Emma Farid Greta Hanna Ivan Julia Kofi Lena Marco Nina Oscar""".split()
CITIES = """Berlin Lyon Oslo Porto Turin Krakow Graz Bergen Ghent Malaga Bristol Boston Denver Quito Lagos Osaka Hanoi
Delhi Perth Cairo Basel Leeds Utrecht Seville Naples Dublin Austin Nairobi Kyoto Lima""".split()
JOBS = "baker teacher nurse pilot farmer doctor painter driver lawyer cook singer writer plumber tailor miner".split()
COLOURS = "red blue green yellow purple orange brown black white grey pink golden silver".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ITEMS = "lamps chairs books apples pencils candles tables bottles shirts plates boxes carpets mugs bicycles".split()

_PEOPLE = """baker sailor teacher child doctor farmer gardener painter soldier merchant traveller shepherd widow clerk
miller""".split()
_ADJECTIVES = """bold young quiet tired happy tall strange heavy small wooden broken bright cold warm simple dusty
narrow gentle""".split()
_THINGS = """basket letter lantern bridge window garden table blanket ladder candle mirror bottle wagon clock map coat
barrel rope bell""".split()
_VERBS = """carried found watched repaired painted forgot opened cleaned followed sold bought moved lifted covered
closed""".split()
_PLACES = """harbour market forest river village castle station meadow island valley mountain library kitchen church
field""".split()
_TIMES = """in the morning|after lunch|before sunset|at night|last winter|every summer|on a rainy day|without a word|
long ago|for the first time""".replace("\n", "").split("|")


def made_up_name(random: Random, most: int = 3) -> str:
    """A pronounceable word that begins with a capital; two to ``most`` syllables."""
    count = random.randint(2, most)
    syllables = [random.choice(ONSETS) + random.choice(VOWELS) for _ in range(count)]
    return ("".join(syllables) + random.choice(CODAS)).capitalize()


def name(random: Random) -> str:
    """A usual first name, or one nobody has."""
    return random.choice(FIRST_NAMES) if random.random() < 0.3 else made_up_name(random)


def place_name(random: Random) -> str:
    """A real city, or a made-up one."""
    return random.choice(CITIES) if random.random() < 0.3 else made_up_name(random)


def clock_time(random: Random) -> str:
    return f"{random.randint(0, 23):02}:{random.choice((0, 10, 15, 20, 30, 40, 45, 50)):02}"


def adjective(random: Random) -> str:
    return random.choice(_ADJECTIVES)


def thing(random: Random) -> str:
    return random.choice(_THINGS)


def person(random: Random) -> str:
    """What somebody is, without an article."""
    return random.choice(_PEOPLE)


def filler_sentence(random: Random) -> str:
    """A sentence nobody will be asked about."""
    pick = random.choice
    shape = random.randrange(5)
    if shape == 0:
        text = f"the {pick(_ADJECTIVES)} {pick(_PEOPLE)} {pick(_VERBS)} the {pick(_THINGS)} near the {pick(_PLACES)}"
    elif shape == 1:
        text = f"{pick(_TIMES)} the {pick(_PEOPLE)} {pick(_VERBS)} a {pick(_ADJECTIVES)} {pick(_THINGS)}"
    elif shape == 2:
        text = (
            f"a {pick(_THINGS)} stood in the {pick(_PLACES)} and the {pick(_PEOPLE)} {pick(_VERBS)} it {pick(_TIMES)}"
        )
    elif shape == 3:
        text = f"in the {pick(_PLACES)} there was a {pick(_ADJECTIVES)} {pick(_THINGS)}"
    else:
        text = f"{pick(FIRST_NAMES)} {pick(_VERBS)} the {pick(_ADJECTIVES)} {pick(_THINGS)} {pick(_TIMES)}"
    return text[0].upper() + text[1:] + "."


def filler(random: Random, sentences: int) -> list[str]:
    return [filler_sentence(random) for _ in range(sentences)]
