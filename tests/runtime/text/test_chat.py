import dataclasses
import json

import pytest

from echoatt_runtime import ChatTemplateError, OptionError, PromptError
from echoatt_runtime.text.chat import render_chat
from echoatt_runtime.text.tokenizer import TextTokenizer

CHAT = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Hëllo\n there", "extra": {"a": [1, None, True]}},
]

CHATML = """{% for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
    {{ '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

TEMPLATES = {
    "chatml": CHATML,
    "tokens": "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
    "json": "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}",
    "loop": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}x{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n"
    "{% endfor %}",
    "none": "{{ tools is none }}{{ documents is none }}{{ undefined_name }}",
    "indented": "{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n"
    "{% endfor %}",
    "date": "{{ strftime_now('%Y') | length }}",
}


@pytest.fixture
def tokenizer_with(byte_tokenizer):
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return lambda template: TextTokenizer(byte_tokenizer, special_tokens, template)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_rendering_agrees_with_transformers(byte_tokenizer, tokenizer_with, template):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
    )
    expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert render_chat(tokenizer_with(template), CHAT) == expected


def test_a_template_may_refuse(tokenizer_with):
    template = "{{ raise_exception('roles must\\nalternate') }}"
    with pytest.raises(ChatTemplateError, match=r"refuses the messages \(roles must alternate\)"):
        render_chat(tokenizer_with(template), CHAT)


@pytest.mark.parametrize("template", ["{% if %}", "{{ 1 / 0 }}", "{{ messages + 1 }}"])
def test_a_broken_template_is_a_typed_error(tokenizer_with, template):
    with pytest.raises(ChatTemplateError, match="refuses"):
        render_chat(tokenizer_with(template), CHAT)


def test_templates_run_in_a_sandbox(tokenizer_with):
    for template in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"):
        with pytest.raises(ChatTemplateError, match="unsafe"):
            render_chat(tokenizer_with(template), CHAT)


def test_templates_see_plain_data_only(tokenizer_with):
    class Loaded:
        def __str__(self):
            raise AssertionError("the template reached the object")

    chat = [{"role": "user", "content": [{"type": "image", "image": Loaded()}]}]
    rendered = render_chat(tokenizer_with("{{ messages | tojson }}"), chat)
    assert json.loads(rendered)[0]["content"][0]["image"] == "<Loaded>"


@pytest.mark.parametrize(
    ("chat", "fault"),
    [
        ([], "the chat has no messages"),
        ([CHAT[0], {"role": "user"}], "message 1 of the chat lacks a role or content"),
        ([{"role": "user", "name": "Ann"}], "message 0 of the chat lacks"),
        ([{"content": "x"}], "message 0 of the chat lacks"),
        ([{"role": None, "content": "x"}], "message 0 of the chat lacks"),
        ([{"role": 5, "content": "x"}], "message 0 of the chat lacks"),
        ([CHAT[0], "x"], "message 1 of the chat is str; give a mapping"),
        ("x", "a chat is a list of messages and not str"),
        (None, "a chat is a list of messages and not None"),
    ],
)
def test_messages_that_cannot_be_rendered(tokenizer_with, chat, fault):
    with pytest.raises(PromptError, match=fault):
        render_chat(tokenizer_with("x"), chat)


def test_a_chat_that_holds_itself(tokenizer_with):
    message = {"role": "user", "content": []}
    message["content"].append(message)
    with pytest.raises(PromptError, match="holds itself"):
        render_chat(tokenizer_with("x"), [message])


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"tools": {"name": "a"}}, "tools are no list of JSON schemas"),
        ({"tools": [print]}, "tools are no list of JSON schemas"),
        ({"template_kwargs": ["enable_thinking"]}, "chat_template_kwargs are list"),
        ({"template_kwargs": {1: 2}}, "chat_template_kwargs are dict; give a mapping, its keys"),
        ({"template_kwargs": {"tools": [], "messages": []}}, "name messages and tools"),
    ],
)
def test_template_arguments_of_another_kind(tokenizer_with, options, fault):
    with pytest.raises(OptionError, match=fault):
        render_chat(tokenizer_with("x"), CHAT, **options)


def test_objects_of_clients_are_messages(tokenizer_with):
    @dataclasses.dataclass
    class Call:
        name: str

    class Answer:
        def model_dump(self):
            return {"role": "assistant", "content": None, "tool_calls": [Call("f")]}

    rendered = render_chat(tokenizer_with("{{ messages | tojson }}"), [CHAT[0], Answer()])
    assert json.loads(rendered)[1] == {"role": "assistant", "tool_calls": [{"name": "f"}]}


def test_without_a_template(tokenizer_with):
    with pytest.raises(ChatTemplateError, match=r"no chat template; .*checkpoint that has one"):
        render_chat(tokenizer_with(None), CHAT)
