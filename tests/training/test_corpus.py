"""The samples: fresh, right, the same for the same seed, and never on both sides of the split."""

from __future__ import annotations

import json
import re
from itertools import islice
from random import Random

import pytest

from training.corpus import SKILLS, samples
from training.evaluate import held_out
from training.sample import HELD_OUT_IN, Sample, Skill, is_held_out
from training.skills.arithmetic import worked
from training.skills.codeword import CodeWord
from training.skills.facts import CAPITALS, OTHERS
from training.skills.honesty import HONEST_ANSWERS, outside
from training.skills.recall import UNTOLD
from training.skills.tooling import NONE_FITS

BY_HEART = {"facts"}


def by_name(name: str) -> Skill:
    return next(skill for skill in SKILLS if skill.name == name)


def made(skill: Skill, count: int, *, held_out: bool, seed: int = 1) -> list[Sample]:
    random = Random(seed)
    return [skill.make(random, held_out=held_out) for _ in range(count)]


def test_the_same_seed_makes_the_same_samples() -> None:
    first, again, other = (list(islice(samples(seed, longest_passage=10), 50)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_split_is_by_content_and_about_one_in_ten() -> None:
    share = sum(is_held_out("name", number) for number in range(20_000)) / 20_000
    assert abs(share - 1 / HELD_OUT_IN) < 0.02
    assert is_held_out("a", 1) == is_held_out("a", "1"), "content is text"


@pytest.mark.parametrize("name", ["arithmetic", "extraction", "repetition", "honesty"])
def test_no_held_out_question_is_ever_practised(name: str) -> None:
    practised = {str(sample.messages) for sample in made(by_name(name), 3000, held_out=False)}
    assert not practised & {str(sample.messages) for sample in made(by_name(name), 1000, held_out=True)}


def test_held_out_values_are_never_practised() -> None:
    word = re.compile(r"The code word is (\w+)\.")
    skill = CodeWord(longest=3)
    practised, kept = (
        {word.findall(sample.answer)[0] for sample in made(skill, 3000, held_out=side)} for side in (False, True)
    )
    assert not practised & kept
    assert len(kept) > 1000


@pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.name)
def test_a_conversation_begins_with_the_user_and_ends_with_the_assistant(skill: Skill) -> None:
    for sample in made(skill, 200, held_out=True):
        roles = [message["role"] for message in sample.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert sample.answer


@pytest.mark.parametrize(
    "skill", [skill for skill in SKILLS if skill.name != "code word"], ids=lambda skill: skill.name
)
def test_the_evaluator_asks_the_same_questions_every_time(skill: Skill) -> None:
    assert held_out(skill, 20) == held_out(skill, 20)


@pytest.mark.parametrize(
    ("a", "sign", "b", "steps"),
    [
        (347, "+", 85, "347 + 085: 7+5=12, 4+8+1=13, 3+0+1=4. The answer is 432."),
        (999, "+", 999, "999 + 999: 9+9=18, 9+9+1=19, 9+9+1=19. The answer is 1998."),
        (0, "+", 0, "0 + 0: 0+0=0. The answer is 0."),
        (500, "-", 1, "500 - 001: 10-1=9, 10-0-1=9, 5-0-1=4. The answer is 499."),
        (4, "-", 12, "Turned round, 12 - 04: 12-4=8, 1-0-1=0. The answer is -8."),
        (7, "-", 7, "7 - 7: 7-7=0. The answer is 0."),
    ],
)
def test_a_sum_is_worked_as_on_paper(a: int, sign: str, b: int, steps: str) -> None:
    assert worked(a, sign, b) == steps


def test_every_step_of_a_sum_is_right() -> None:
    for sample in made(by_name("arithmetic"), 2000, held_out=False):
        for left, right in re.findall(r"([\d+-]+)=(\d+)", sample.answer):
            assert eval(left) == int(right)


def test_questions_outside_its_skills_are_never_practised_and_any_honest_answer_is_right() -> None:
    practised = {str(sample.messages[0]["content"]) for sample in made(by_name("honesty"), 20_000, held_out=False)}
    asked = outside()
    assert not practised & {str(sample.messages[0]["content"]) for sample in asked}
    assert len({str(sample.messages) for sample in asked}) > 40
    assert all(asked[0].accepts(answer) for answer in HONEST_ANSWERS)
    assert not asked[0].accepts("A tomato is a fruit.")


def test_facts_are_all_practised() -> None:
    answers = {sample.answer for sample in made(by_name("facts"), 5000, held_out=False)}
    assert len(answers) == len(CAPITALS) + len(OTHERS) > 100


def test_extracted_values_stand_in_the_text_and_fit_the_schema() -> None:
    for sample in made(by_name("extraction"), 500, held_out=True):
        question = str(sample.messages[0]["content"])
        for field, value in json.loads(sample.answer).items():
            assert field in question
            assert str(value) in question


def test_a_call_names_an_offered_tool_and_all_its_parameters() -> None:
    answers = []
    for sample in made(by_name("tools"), 1000, held_out=True):
        offered = [json.loads(json.dumps(tool))["function"] for tool in sample.tools]
        assert 1 <= len(offered) <= 4
        if sample.answer.startswith("<tool_call>"):
            call = json.loads(sample.answer.removeprefix("<tool_call>").removesuffix("</tool_call>"))
            (tool,) = [tool for tool in offered if tool["name"] == call["name"]]
            assert list(call["arguments"]) == tool["parameters"]["required"]
        answers.append(sample.answer)
    assert 200 < answers.count(NONE_FITS) < 400
    assert 480 < sum(answer.startswith("<tool_call>") for answer in answers) < 680


def test_what_is_recalled_was_said_and_what_was_not_said_is_not_known() -> None:
    for sample in made(by_name("recall"), 500, held_out=True):
        said = " ".join(str(message["content"]) for message in sample.messages[:-2])
        if sample.answer != UNTOLD:
            value = sample.answer.removesuffix(".").rsplit(" ", 1)[1]
            assert f"{value}." in said


def test_a_code_word_lies_where_it_was_put() -> None:
    for depth, place in ((0.0, 0), (1.0, -1)):
        sample = CodeWord(longest=30, shortest=30).make(Random(3), held_out=True, depth=depth)
        text = str(sample.messages[0]["content"])
        sentences = [line for line in re.split(r"(?<=\.)\s", text) if not line.startswith(("Find", "Read", "What"))]
        assert sentences[place] == sample.answer or sample.answer in text.split("\n")[-2:][0]
