"""Chat templates: a conversation to a prompt's text, as Hugging Face's tokenizers render it. Knows no tokens, no HTTP.

Templates are the operator's (model files or --chat-template); messages are the client's. Both run in Jinja's immutable
sandbox, and the messages are plain JSON values.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from proto.errors import InvalidRequest
from router.values import Json, JsonObject

logger = logging.getLogger(__name__)

_END_MARK = "\ue000tandem-end-of-message\ue000"
"""Marks, while rendering, where the last message ends, so that the template's closing tokens can be cut off."""

_PROBE = "\u2003"
"""A rare space behind the mark: gone after rendering means that the template strips its messages."""

_REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training; for serving it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as an instance attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Json,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a prompt must not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControls])
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    return env


class ChatTemplate:
    """One compiled template. Raises TemplateSyntaxError.

    ``wants_parts``: it reads a message's content as a list of parts only. ``knows_developer``: it has a use for the
    role ``developer``. ``knows_null``: it asks whether a message's content is none. ``takes_text``: it wants the
    arguments of a tool call as JSON text, not as values.
    """

    def __init__(self, source: str) -> None:
        env = _environment()
        self._template: Template = env.from_string(source)
        self.knows_developer = "developer" in source
        tree = env.parse(source)
        self.wants_parts = _loops_over_content(tree) and "is string" not in source
        self.knows_null = _asks_for_null_content(tree)
        self.takes_text = _only_shows_arguments(tree)

    def render(self, variables: Mapping[str, Json]) -> str:
        """Raises InvalidRequest with the template's own words."""
        try:
            return self._template.render(variables)
        except RecursionError:
            raise InvalidRequest(
                "The messages are nested too deeply for the chat template.", param="messages"
            ) from None
        except Exception as error:
            # Whatever a template raises, TypeError included, comes from messages it was not written for.
            raise InvalidRequest(f"The chat template refused the messages: {error}", param="messages") from error


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether the template has a ``for`` over ``message.content`` or ``message['content']``."""
    return any(_is_field(loop.iter, "content") for loop in tree.find_all(nodes.For))


def _asks_for_null_content(tree: nodes.Template) -> bool:
    """Whether the template has ``message.content is none``, or ``is not none``, also of a variable ``content``."""
    for test in tree.find_all(nodes.Test):
        asked = test.node
        is_variable = isinstance(asked, nodes.Name) and asked.name == "content"
        if test.name == "none" and (is_variable or _is_field(asked, "content")):
            return True
    return False


def _only_shows_arguments(tree: nodes.Template) -> bool:
    """Whether the template puts ``function.arguments`` into its text as they are, and does nothing else with them: no
    filter, no loop, no question of their type. Whether they are there at all, it may ask."""
    shows = False
    for node in tree.find_all(nodes.Node):
        if not any(_is_field(child, "arguments") for child in node.iter_child_nodes()):
            continue
        if isinstance(node, (nodes.Add, nodes.Concat, nodes.Output)):
            shows = True
        elif isinstance(node, nodes.Test):
            if node.name not in ("defined", "none"):
                return False
        elif not isinstance(node, (nodes.If, nodes.Not, nodes.And, nodes.Or)):
            return False
    return shows


def _is_field(node: nodes.Node, name: str) -> bool:
    """Whether ``node`` is ``something.name`` or ``something['name']``."""
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == name
    return isinstance(node, nodes.Getattr) and node.attr == name


class ChatTemplates:
    """A model's templates by name ("default", perhaps "tool_use"), and the variables they all see."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, Json]) -> None:
        self._special_tokens = dict(special_tokens)
        self._templates: dict[str, ChatTemplate] = {}
        self._fault = "This model has no chat template. Use /v1/completions, or start the server with --chat-template."
        for name, source in sources.items():
            try:
                self._templates[name] = ChatTemplate(source)
            except TemplateSyntaxError as error:
                self._fault = f"The model's chat template is broken (line {error.lineno}: {error.message})."
                logger.warning("chat template %r is broken at line %s: %s", name, error.lineno, error.message)

    def __bool__(self) -> bool:
        return bool(self._templates)

    def replaced(self, source: str) -> ChatTemplates:
        """These variables with ``source`` as the only template."""
        return ChatTemplates({"default": source}, self._special_tokens)

    def choose(self, *, with_tools: bool) -> ChatTemplate:
        """Raises InvalidRequest when the model has none that fits."""
        if with_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        if len(self._templates) == 1:
            return next(iter(self._templates.values()))
        if self._templates:
            self._fault = f"The model has several chat templates ({', '.join(sorted(self._templates))}) and no default."
        raise InvalidRequest(self._fault, param="messages")

    def render(
        self,
        messages: Sequence[JsonObject],
        *,
        tools: list[Json] | None = None,
        documents: list[Json] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Json] | None = None,
    ) -> str:
        """The prompt's text for ``messages`` (content: text or null). ``variables`` win over the special tokens.

        Raises InvalidRequest when there is no template, or when it refuses the messages.
        """
        template = self.choose(with_tools=bool(tools))
        shaped = [_shape(message, template, f"messages[{i}]") for i, message in enumerate(messages)]
        if continue_final_message:
            add_generation_prompt = False
            _mark_end(shaped[-1])
        rendered = template.render(
            {
                **self._special_tokens,
                **(variables or {}),
                "messages": list[Json](shaped),
                "tools": tools,
                "documents": documents,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return _cut_at_mark(rendered, messages[-1]) if continue_final_message else rendered


def _shape(message: JsonObject, template: ChatTemplate, where: str) -> JsonObject:
    """The message as this template wants it. Raises InvalidRequest for arguments of a tool call that are no JSON."""
    shaped = dict(message)
    calls = shaped.get("tool_calls")
    if isinstance(calls, list):
        shaped["tool_calls"] = [_shape_call(call, template, f"{where}.tool_calls") for call in calls]
    if shaped.get("content") is None and not (calls and template.knows_null):
        shaped["content"] = ""
    if shaped["role"] == "developer" and not template.knows_developer:
        shaped["role"] = "system"
    reasoning = next((shaped[name] for name in _REASONING_NAMES if shaped.get(name) is not None), None)
    if reasoning is not None:
        shaped = {"thinking": reasoning, **shaped, "reasoning_content": reasoning}
    content = shaped.get("content")
    if template.wants_parts and isinstance(content, str):
        shaped["content"] = [{"type": "text", "text": content}]
    return shaped


def _shape_call(call: Json, template: ChatTemplate, where: str) -> Json:
    """Its arguments as values, or as JSON text: the client's own where it sent text, since that is what the model said.
    Without any, it has empty ones."""
    if not isinstance(call, dict) or not isinstance(function := call.get("function"), dict):
        return call
    sent = function.get("arguments")
    sent = "{}" if sent is None or sent == "" else sent
    try:
        arguments = json.loads(sent) if isinstance(sent, str) else sent
        if template.takes_text:
            arguments = sent if isinstance(sent, str) else _to_json(sent)
    except (ValueError, RecursionError):
        raise InvalidRequest(
            f"{where}: a function's arguments are not valid JSON. Send the JSON text of an object, '{{}}' if there are "
            "none.",
            param=where,
        ) from None
    return {**call, "function": {**function, "arguments": arguments}}


def _mark_end(message: JsonObject) -> None:
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _END_MARK + _PROBE
    elif isinstance(content, list) and isinstance(part := content[-1], dict):
        message["content"] = [*content[:-1], {**part, "text": f"{part['text']}{_END_MARK}{_PROBE}"}]


def _cut_at_mark(rendered: str, last: JsonObject) -> str:
    """``rendered`` up to where the last message's words end; a template that strips them has the space cut too."""
    words = str(last.get("content") or "")
    start = rendered.rfind(_END_MARK)
    if start < 0 or not words.strip():
        raise InvalidRequest(
            "continue_final_message needs a last message with text that the chat template shows.", param="messages"
        )
    kept = rendered.startswith(_PROBE, start + len(_END_MARK))
    return rendered[:start] if kept else rendered[:start].rstrip()
