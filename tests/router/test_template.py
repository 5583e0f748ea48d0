"""Chat templates render as transformers renders them, and refuse in words a client can use."""

from __future__ import annotations

import json
from functools import partial

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from proto.errors import InvalidRequest
from router.template import ChatTemplate, ChatTemplates
from tests.support.http import byte_level_json

LLAMA3_LIKE = """
{%- set date = strftime_now("%Y") if false else "26 Jul 2024" -%}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] | trim %}{%- set rest = messages[1:] -%}
{%- else -%}
  {%- set system = "" %}{%- set rest = messages -%}
{%- endif %}
{{- "<|header|>system<|/header|>\\n\\nToday: " + date + "\\n" + system + "<|end|>" }}
{%- if tools %}
  {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- "\\n" }}{%- endfor %}
{%- endif %}
{%- for message in rest %}
  {%- if message.role == "skip" %}{%- continue %}{%- endif %}
  {{- "<|header|>" + message['role'] + "<|/header|>\\n\\n" + message['content'] | trim + "<|end|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|header|>assistant<|/header|>\\n\\n" }}{%- endif %}
"""
CHATML = """
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
<|im_start|>system
You help.<|im_end|>
    {% endif %}
<|im_start|>{{ message['role'] }}
{% generation %}{{ message['content'] }}{% endgeneration %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
MISTRAL_LIKE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate: user, assistant, user, ...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
NAMESPACED = (
    "{% set ns = namespace(count=0) %}{% for m in messages %}{% set ns.count = ns.count + 1 %}"
    "{{ ns.count }}:{{ m.content | upper }};{% if ns.count == 2 %}{% break %}{% endif %}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<no-think>{% endif %}{{ unk_token | default('-') }}"
)
TEMPLATES = {"llama3": LLAMA3_LIKE, "chatml": CHATML, "mistral": MISTRAL_LIKE, "namespace": NAMESPACED}

USER = {"role": "user", "content": "Hi <there> & “you” 你好"}
ASSISTANT = {"role": "assistant", "content": "  Hello! "}
CONVERSATIONS = {
    "one": [USER],
    "three": [USER, ASSISTANT, {"role": "user", "content": "And now?\n"}],
    "system": [{"role": "system", "content": " Be brief. "}, USER],
}
TOOL = {"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"b": 1, "a": [True, None]}}}
TOKENS = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(byte_level_json())
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **TOKENS)


def templates(source: str) -> ChatTemplates:
    return ChatTemplates({"default": source}, TOKENS)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no-tools", "tools"])
def test_same_text_as_transformers(
    reference: PreTrainedTokenizerFast, name: str, conversation: str, add_generation_prompt: bool, tools: list | None
) -> None:
    messages, source = CONVERSATIONS[conversation], TEMPLATES[name]
    arguments = {"tools": tools, "add_generation_prompt": add_generation_prompt}
    if name == "mistral" and conversation == "system":
        for render in (partial(reference.apply_chat_template, chat_template=source), templates(source).render):
            with pytest.raises((TemplateError, InvalidRequest), match="Roles must alternate"):
                render(messages, **arguments)
        return
    expected = reference.apply_chat_template(
        messages, chat_template=source, tokenize=False, enable_thinking=False, **arguments
    )
    assert templates(source).render(messages, variables={"enable_thinking": False}, **arguments) == expected


@pytest.mark.parametrize("name", ["llama3", "chatml", "mistral"])
@pytest.mark.parametrize("ending", ["The answer is", "The answer is \n"])
def test_continues_the_final_message_as_transformers_does(
    reference: PreTrainedTokenizerFast, name: str, ending: str
) -> None:
    messages = [USER, {"role": "assistant", "content": ending}]
    expected = reference.apply_chat_template(
        messages, chat_template=TEMPLATES[name], tokenize=False, continue_final_message=True
    )
    assert templates(TEMPLATES[name]).render(messages, continue_final_message=True) == expected


def test_continuing_needs_words_that_the_template_shows() -> None:
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        templates(CHATML).render([{"role": "assistant", "content": ""}], continue_final_message=True)
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        templates("{{ messages[0].role }}").render([USER, ASSISTANT], continue_final_message=True)


def test_a_model_without_template_says_what_to_do() -> None:
    empty = ChatTemplates({}, {})
    assert not empty
    with pytest.raises(InvalidRequest, match="--chat-template"):
        empty.render([USER])


def test_a_broken_template_is_named_with_its_line() -> None:
    with pytest.raises(InvalidRequest, match=r"broken \(line 2"):
        templates("fine\n{% if %}").render([USER])


def test_several_templates() -> None:
    both = ChatTemplates({"default": "D", "tool_use": "T"}, {})
    assert both.render([USER]) == "D"
    assert both.render([USER], tools=[TOOL]) == "T"
    assert ChatTemplates({"rag": "R"}, {}).render([USER]) == "R"
    with pytest.raises(InvalidRequest, match="rag, tool_use"):
        ChatTemplates({"rag": "R", "tool_use": "T"}, {}).render([USER])


def test_developer_becomes_system_unless_the_template_knows_it() -> None:
    message = [{"role": "developer", "content": "x"}]
    assert templates("{{ messages[0].role }}").render(message) == "system"
    assert templates("{# developer #}{{ messages[0].role }}").render(message) == "developer"


def test_templates_that_read_parts_get_parts() -> None:
    source = "{% for m in messages %}{% for part in m['content'] %}[{{ part.text }}]{% endfor %}{% endfor %}"
    assert templates(source).render([USER]) == f"[{USER['content']}]"
    assert templates(source).render([USER], continue_final_message=True) == f"[{USER['content']}"


DEEPSEEK_LIKE = (
    "{{ bos_token }}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{ '<User>' + message['content'] }}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is none %}"
    "{%- for tool in message['tool_calls'] %}"
    "{{ '<Call>' + tool['type'] + '<Sep>' + tool['function']['name'] + '\\n' + tool['function']['arguments'] + '\\n' }}"
    "{%- endfor %}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{{ '<Assistant>' + message['content'] + '<End>' }}{%- endif %}"
    "{%- if message['role'] == 'tool' %}{{ '<Output>' + message['content'] }}{%- endif %}"
    "{%- endfor %}"
)
QWEN_LIKE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }}"
    "{% if call.function.arguments is string %}{{ call.function.arguments }}"
    "{% else %}{{ call.function.arguments | tojson }}{% endif %}{% endfor %}{% endfor %}"
)
TOJSON = (
    "{% for message in messages %}{% if tools is none and message.tool_calls is defined %}"
    "{% for call in message.tool_calls %}{{ message.content + call.function.arguments | tojson }}{% endfor %}"
    "{% endif %}{% endfor %}"
)


def called(arguments: object = None, content: str | None = None) -> list:
    function = {"name": "f"} if arguments is None else {"name": "f", "arguments": arguments}
    return [USER, {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}]


def test_calls_without_words_are_seen_by_templates_that_ask_for_none() -> None:
    arguments = '{"city":  "Zürich"}'
    rendered = templates(DEEPSEEK_LIKE).render([*called(arguments), {"role": "tool", "content": "sunny"}])
    assert rendered == (f"<|begin|><User>{USER['content']}<Call>function<Sep>f\n{arguments}\n<Output>sunny")
    assert "<Assistant>words<End>" in templates(DEEPSEEK_LIKE).render(called(arguments, "words"))


def test_no_words_are_empty_ones_for_every_other_template() -> None:
    assert templates(QWEN_LIKE).render(called("{}")).endswith("<assistant><call>f{}")
    assert templates(TOJSON).render(called("{}")) == "{}"
    assert templates("[{{ messages[1].content }}]").render([USER, {"role": "assistant", "content": None}]) == "[]"
    assert "<Assistant><End>" in templates(DEEPSEEK_LIKE).render([{"role": "assistant", "content": None}])


@pytest.mark.parametrize("arguments", ['{"a":[1,  "ü"]}', {"a": [1, "ü"]}])
def test_arguments_are_values_unless_the_template_takes_them_for_text(arguments: object) -> None:
    assert templates(TOJSON).render(called(arguments)) == '{"a": [1, "ü"]}'
    assert templates(QWEN_LIKE).render(called(arguments)).endswith('f{"a": [1, "ü"]}')
    text = arguments if isinstance(arguments, str) else '{"a": [1, "ü"]}'
    assert f"f\n{text}\n" in templates(DEEPSEEK_LIKE).render(called(arguments))


@pytest.mark.parametrize(
    ("shows", "takes_text"),
    [
        ("{{ call.function.arguments }}", True),
        ("{{ 'x' ~ call['function']['arguments'] }}", True),
        ("{% if call.function.arguments is defined %}{{ '' + call.function.arguments }}{% endif %}", True),
        ("{{ call.function.arguments | tojson }}", False),
        ("{{ call.function.arguments.items() | list | length }}", False),
        ("{% for key in call.function.arguments %}{{ key }}{% endfor %}", False),
        ("{{ call.function.arguments if call.function.arguments is string else '-' }}", False),
        ("{% set arguments = call.function.arguments %}{{ arguments }}", False),
    ],
)
def test_a_template_takes_arguments_for_text_only_if_it_does_nothing_else_with_them(
    shows: str, takes_text: bool
) -> None:
    assert ChatTemplate(f"{{% for call in messages[0].tool_calls %}}{shows}{{% endfor %}}").takes_text == takes_text


@pytest.mark.parametrize("arguments", [None, ""])
def test_a_call_without_arguments_has_none_to_show(arguments: object) -> None:
    assert templates(TOJSON).render(called(arguments)) == "{}"
    assert "f\n{}\n" in templates(DEEPSEEK_LIKE).render(called(arguments))


def test_arguments_that_are_no_json_are_refused_with_what_to_send() -> None:
    for template in (TOJSON, DEEPSEEK_LIKE):
        for arguments in ("{", "[" * 100_000):
            with pytest.raises(InvalidRequest, match="JSON text of an object") as caught:
                templates(template).render(called(arguments))
            assert caught.value.param == "messages[1].tool_calls"


def test_reasoning_is_known_by_each_of_its_names() -> None:
    source = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    assert templates(source).render([{"role": "assistant", "content": "", "reasoning": "r"}]) == "rr"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].content + 1 }}",
        "{{ undefined_thing.attribute }}",
        "{{ 1 // 0 }}",
    ],
)
def test_whatever_goes_wrong_inside_is_a_bad_request(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template refused"):
        templates(source).render([USER])


def test_json_is_readable_and_unescaped() -> None:
    rendered = templates("{{ tools[0] | tojson }}").render([USER], tools=[TOOL])
    assert "<é>" in rendered
    assert json.loads(rendered) == TOOL
