"""Capitals and some other facts, learnt by heart: every fact is in training, in several wordings."""

from __future__ import annotations

from random import Random

from training.sample import Sample, asked

CAPITALS = {
    line.split(":")[0].strip(): line.split(":")[1].strip()
    for line in """France:Paris;Germany:Berlin;Italy:Rome;Spain:Madrid;Portugal:Lisbon;Austria:Vienna;Greece:Athens;
Norway:Oslo;Sweden:Stockholm;Finland:Helsinki;Denmark:Copenhagen;Poland:Warsaw;Hungary:Budapest;Ireland:Dublin;
Belgium:Brussels;the Netherlands:Amsterdam;Switzerland:Bern;Czechia:Prague;Slovakia:Bratislava;Slovenia:Ljubljana;
Croatia:Zagreb;Serbia:Belgrade;Bulgaria:Sofia;Romania:Bucharest;Ukraine:Kyiv;Estonia:Tallinn;Latvia:Riga;
Lithuania:Vilnius;Iceland:Reykjavik;the United Kingdom:London;Turkey:Ankara;Russia:Moscow;Egypt:Cairo;Kenya:Nairobi;
Nigeria:Abuja;Ghana:Accra;Morocco:Rabat;Tunisia:Tunis;Ethiopia:Addis Ababa;Senegal:Dakar;Japan:Tokyo;China:Beijing;
South Korea:Seoul;India:New Delhi;Thailand:Bangkok;Vietnam:Hanoi;Indonesia:Jakarta;Nepal:Kathmandu;Iran:Tehran;
Iraq:Baghdad;Canada:Ottawa;the United States:Washington;Mexico:Mexico City;Brazil:Brasilia;Argentina:Buenos Aires;
Chile:Santiago;Peru:Lima;Colombia:Bogota;Cuba:Havana;Australia:Canberra;New Zealand:Wellington""".split(";")
}
OTHERS = (
    ("How many days does a week have?", "A week has seven days."),
    ("How many months does a year have?", "A year has twelve months."),
    ("How many hours does a day have?", "A day has 24 hours."),
    ("How many minutes does an hour have?", "An hour has 60 minutes."),
    ("How many seconds does a minute have?", "A minute has 60 seconds."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("How many legs does an insect have?", "An insect has six legs."),
    ("How many sides does a triangle have?", "A triangle has three sides."),
    ("How many sides does a hexagon have?", "A hexagon has six sides."),
    ("How many planets are in the solar system?", "There are eight planets in the solar system."),
    ("How many continents are there?", "There are seven continents."),
    ("How many letters does the English alphabet have?", "The English alphabet has 26 letters."),
    ("How many strings does a violin have?", "A violin has four strings."),
    ("How many players does a football team have?", "A football team has eleven players on the field."),
    ("What is the largest planet?", "The largest planet is Jupiter."),
    ("What is the smallest planet?", "The smallest planet is Mercury."),
    ("What is the largest ocean?", "The largest ocean is the Pacific."),
    ("What is the highest mountain?", "The highest mountain is Mount Everest."),
    ("What is the largest animal?", "The largest animal is the blue whale."),
    ("What is the fastest land animal?", "The fastest land animal is the cheetah."),
    ("What is the chemical symbol of gold?", "The chemical symbol of gold is Au."),
    ("What is the chemical symbol of silver?", "The chemical symbol of silver is Ag."),
    ("What is the chemical symbol of iron?", "The chemical symbol of iron is Fe."),
    ("What is the chemical symbol of oxygen?", "The chemical symbol of oxygen is O."),
    ("What is water made of?", "Water is made of hydrogen and oxygen."),
    ("At what temperature does water boil?", "Water boils at 100 degrees Celsius."),
    ("At what temperature does water freeze?", "Water freezes at 0 degrees Celsius."),
    ("Which planet is closest to the sun?", "Mercury is closest to the sun."),
    ("Which planet is known as the red planet?", "Mars is known as the red planet."),
    ("What do bees make?", "Bees make honey."),
    ("What do cows drink?", "Cows drink water."),
    ("What colour is the sky on a clear day?", "The sky is blue on a clear day."),
    ("What colour is grass?", "Grass is green."),
    ("What colour do you get from mixing blue and yellow?", "Blue and yellow make green."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ("Who was the first person on the moon?", "Neil Armstrong was the first person on the moon."),
    ("What is frozen water called?", "Frozen water is called ice."),
    ("Which day comes after Monday?", "Tuesday comes after Monday."),
    ("Which month comes after March?", "April comes after March."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is the opposite of up?", "The opposite of up is down."),
)
_FORMS = (
    "What is the capital of {}?",
    "What is the capital of {}?",
    "capital of {}",
    "Which city is the capital of {}?",
    "Tell me the capital of {}.",
    "What's the capital of {}?",
)


class Facts:
    name = "facts"

    def make(self, random: Random, *, held_out: bool) -> Sample:
        if random.random() < 0.6:
            return capital(random.choice(list(CAPITALS)), random.choice(_FORMS))
        question, answer = random.choice(OTHERS)
        return asked(casual(question) if random.random() < 0.2 else question, answer)


def capital(country: str, form: str = _FORMS[0]) -> Sample:
    return asked(form.format(country), f"The capital of {country} is {CAPITALS[country]}.")


def casual(question: str) -> str:
    """As people type when they are in a hurry."""
    return question[0].lower() + question[1:].rstrip("?.")
