"""Fields of a sentence as JSON, for the schema that the question gives. Held out by what the sentence is about."""

from __future__ import annotations

import json
from random import Random

from router.values import Json
from training import text
from training.sample import Sample, asked, draw

_KINDS: dict[str, str] = {"age": "integer", "quantity": "integer", "price": "integer", "year": "integer"}
_PERSON = (
    "{name} is {age} years old, works as a {job} and lives in {city}.",
    "{name} from {city} is a {job} and {age} years old.",
    "At {age}, {name} moved to {city} to become a {job}.",
    "The {job} {name}, {age}, lives in {city}.",
)
_ORDER = (
    "{name} ordered {quantity} {item} for {price} euros, to be sent to {city}.",
    "We sold {quantity} {item} to {name} in {city} for {price} euros.",
    "For {price} euros, {name} of {city} bought {quantity} {item}.",
    "Please send {quantity} {item} to {name} in {city}; the price is {price} euros.",
)
_MEETING = (
    "{name} meets the {job} in {city} on {day} at {time}.",
    "On {day} at {time} there is a meeting in {city} with {name}, the {job}.",
    "The {job} {name} comes to {city} on {day}; we start at {time}.",
    "At {time} on {day}, {name} will see a {job} in {city}.",
)


class Extraction:
    name = "extraction"

    def make(self, random: Random, *, held_out: bool) -> Sample:
        name = draw(lambda: text.name(random) if not held_out else text.made_up_name(random), held_out=held_out)
        values: dict[str, Json] = {"name": name, "city": text.place_name(random)}
        kind = random.randrange(3)
        if kind == 0:
            form = random.choice(_PERSON)
            values |= {"age": random.randint(18, 90), "job": random.choice(text.JOBS)}
        elif kind == 1:
            form = random.choice(_ORDER)
            values |= {"quantity": random.randint(2, 60), "price": random.randint(5, 900)}
            values |= {"item": random.choice(text.ITEMS)}
        else:
            form = random.choice(_MEETING)
            values |= {"day": random.choice(text.DAYS), "time": text.clock_time(random)}
            values |= {"job": random.choice(text.JOBS)}
        wanted = random.sample(sorted(values), random.randint(2, len(values)))
        question = _question(random, wanted, form.format(**values))
        return asked(question, json.dumps({field: values[field] for field in wanted}), stretches=True)


def _question(random: Random, wanted: list[str], sentence: str) -> str:
    kinds = {field: _KINDS.get(field, "string") for field in wanted}
    shape = random.randrange(4)
    if shape == 0:
        return f"Extract as JSON with this schema: {_json_schema(kinds)}\nText: {sentence}"
    if shape == 1:
        return f"{sentence}\nGive me JSON for this schema: {json.dumps(kinds)}"
    if shape == 2:
        return f"Extract {', '.join(wanted)} as JSON from this text: {sentence}"
    return f"Fill the schema {json.dumps(kinds)} from the text.\n{sentence}"


def _json_schema(kinds: dict[str, str]) -> str:
    properties: Json = {field: {"type": kind} for field, kind in kinds.items()}
    return json.dumps({"type": "object", "properties": properties})
