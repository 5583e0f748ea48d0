"""Choosing a tool and its arguments, or answering in words when none fits. Held out by the arguments.

A tool has several names and its parameters too, drawn afresh for every sample: they must be read from the offer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from router.values import Json, JsonObject
from training import text
from training.sample import Sample, Skill, assistant, is_held_out, user

NONE_FITS = "None of my tools can do that."


@dataclass(frozen=True, slots=True)
class _Tool:
    """``parameters``: for each, its possible names, and what draws a value."""

    names: tuple[str, ...]
    about: str
    parameters: tuple[tuple[tuple[str, ...], Callable[[Random], Json]], ...]
    requests: tuple[str, ...]


def _amount(random: Random) -> Json:
    return random.randint(2, 900)


def _people(random: Random) -> Json:
    return random.randint(2, 12)


_ROOMS = """kitchen bedroom bathroom garage study cellar hall attic library nursery workshop pantry studio corridor
lobby cloakroom""".split()


def _room(random: Random) -> Json:
    shape = random.random()
    if shape < 0.4:
        return random.choice(_ROOMS)
    if shape < 0.7:
        return f"{text.adjective(random)} {random.choice(_ROOMS)}"
    return f"room {random.randint(1, 999)}" if shape < 0.85 else text.made_up_name(random)


def _language(random: Random) -> Json:
    return random.choice(("French", "German", "Spanish", "Italian", "Polish", "Turkish"))


_CITY, _PERSON = ("city", "place", "location"), ("name", "person", "to")
_TOOLS = (
    _Tool(
        ("get_weather", "weather", "forecast"),
        "Weather of a city",
        ((_CITY, text.place_name),),
        ("What is the weather in {0}?", "How is the weather in {0}?", "Will it rain in {0}?"),
    ),
    _Tool(
        ("set_alarm", "alarm", "wake_up"),
        "Set an alarm",
        ((("time", "at", "when"), text.clock_time),),
        ("Wake me up at {0}.", "Set an alarm for {0}.", "I need an alarm at {0}."),
    ),
    _Tool(
        ("find_flights", "flights", "search_flights"),
        "Flights between two cities",
        ((("from", "origin", "start"), text.place_name), (("to", "destination", "end"), text.place_name)),
        ("Find flights from {0} to {1}.", "I want to fly from {0} to {1}.", "Is there a flight from {0} to {1}?"),
    ),
    _Tool(
        ("call_person", "phone", "make_call"),
        "Call a person",
        ((_PERSON, text.name),),
        ("Call {0}.", "Please phone {0}.", "I want to talk to {0} on the phone."),
    ),
    _Tool(
        ("send_money", "transfer", "pay"),
        "Send money to a person",
        ((_PERSON, text.name), (("amount", "euros", "sum"), _amount)),
        ("Send {1} euros to {0}.", "Pay {0} {1} euros.", "Transfer {1} euros to {0}."),
    ),
    _Tool(
        ("book_table", "reserve_table", "restaurant"),
        "Book a table in a restaurant",
        ((("restaurant", "name", "where"), text.made_up_name), (("people", "guests", "seats"), _people)),
        ("Book a table for {1} at {0}.", "Reserve a table at {0} for {1} people."),
    ),
    _Tool(
        ("play_music", "music", "play_artist"),
        "Play music of an artist",
        ((("artist", "band", "musician"), text.made_up_name),),
        ("Play something by {0}.", "I want to hear {0}.", "Play music by {0}."),
    ),
    _Tool(
        ("light_on", "lamp", "turn_on_light"),
        "Turn on the light in a room",
        ((("room", "where", "place"), _room),),
        ("Turn on the light in the {0}.", "It is dark in the {0}.", "Light in the {0}, please."),
    ),
    _Tool(
        ("translate", "translation", "translate_word"),
        "Translate a word",
        ((("word", "text", "term"), text.made_up_name), (("language", "into", "target"), _language)),
        ("Translate {0} into {1}.", "What is {0} in {1}?", "How do you say {0} in {1}?"),
    ),
    _Tool(
        ("add_contact", "new_contact", "save_number"),
        "Save a telephone number",
        ((_PERSON, text.name), (("number", "phone", "digits"), lambda r: r.randint(1000, 99999))),
        ("The number of {0} is {1}, save it.", "Save {1} as the number of {0}."),
    ),
)


class Tooling:
    """``others`` make the questions that need no tool although some are offered."""

    name = "tools"

    def __init__(self, others: tuple[Skill, ...]) -> None:
        self._others = others

    def make(self, random: Random, *, held_out: bool) -> Sample:
        tools = random.sample(_TOOLS, random.choice((1, 2, 2, 3, 4)))
        offered = [_offer(random, tool) for tool in tools]
        shape = random.random()
        if shape < 0.12:
            other = random.choice(self._others).make(random, held_out=held_out)
            return Sample(other.messages, tuple(schema for schema, _, _ in offered))
        wanted = random.randrange(len(tools))
        tool = tools[wanted]
        if shape < 0.42:
            tool = random.choice([tool for tool in _TOOLS if tool not in tools])
        while True:
            values = [make(random) for _, make in tool.parameters]
            if is_held_out(*values) == held_out:
                break
        question = random.choice(tool.requests).format(*values)
        answer = NONE_FITS
        if tool in tools:
            _, name, fields = offered[wanted]
            answer = call(name, dict(zip(fields, values, strict=True)))
        return Sample((user(question), assistant(answer)), tuple(schema for schema, _, _ in offered), stretches=True)


def call(name: str, arguments: dict[str, Json]) -> str:
    """A tool call as the model writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def _offer(random: Random, tool: _Tool) -> tuple[JsonObject, str, list[str]]:
    """A tool in OpenAI's format under one of its names; that name; the names of its parameters."""
    name = random.choice(tool.names)
    fields: list[str] = []
    properties: dict[str, Json] = {}
    random_probe = Random(0)
    for names, make in tool.parameters:
        field = random.choice([each for each in names if each not in fields])
        fields.append(field)
        properties[field] = {"type": "integer" if isinstance(make(random_probe), int) else "string"}
    function: JsonObject = {
        "name": name,
        "description": tool.about,
        "parameters": {"type": "object", "properties": properties, "required": list[Json](fields)},
    }
    return {"type": "function", "function": function}, name, fields
