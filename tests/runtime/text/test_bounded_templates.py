import threading

import jinja2
import pytest

from echoatt_runtime import ChatTemplateError
from echoatt_runtime.text.chat import render_chat

DOUBLED = "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = SUM %}{% endfor %}"
# What it says, and a template that would take minutes, gigabytes or Python's own stack
BAD = {
    "loops in loops": (
        "makes more than",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    ),
    "a condition that never holds": (
        "makes more than",
        "{% for a in range(99999) if a < 0 %}{% endfor %}" * 300,
    ),
    "recursive loops": (
        "makes more than",
        "{% for a in range(9999) recursive %}{% if loop.depth < 9 %}{{ loop(range(9999)) }}"
        "{% endif %}{% endfor %}",
    ),
    "two calls a call": (
        "makes more than",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
    ),
    "a macro without end": ("recursion", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    "deep operators": ("recursion", "{{ " + "not " * 50_000 + "1 }}"),
    "deep loops": ("nested", "{% for a in [1] %}" * 30 + "{% endfor %}" * 30),
    "its length": ("1,000,001 characters", "x" * 1_000_001),
    "a long text": ("may be", "{{ 'x' * 10 ** 10 }}"),
    "doubled text": ("makes more", DOUBLED.replace("[1]", "'a'").replace("SUM", "ns.s ~ ns.s")),
    "doubled lists": ("makes more", DOUBLED.replace("SUM", "ns.s + ns.s")),
    "lists in lists": ("may be", DOUBLED.replace("SUM", "[ns.s, ns.s]") + "{{ ns.s | string }}"),
    "squares": ("may be", DOUBLED.replace("[1]", "3").replace("SUM", "ns.s * ns.s")),
    "a power": ("may be", "{% set n = 9 ** 9 %}{{ n ** n }}"),
    "replaced text": ("may be", "{% set a = 'a' * 9999 %}{{ a.replace('a', a) }}"),
    "joined text": ("may be", "{% set a = 'a' * 9999 %}{{ a | join(a) }}"),
    "a width": ("may be", "{{ 'x'.ljust(10 ** 10) }}"),
    "a filter's width": ("may be", "{{ 'x' | center(10 ** 10) }}"),
    "a width in a format": ("asks for a width", "{{ '%10000000000d' % 7 }}"),
    "a width beside a format": ("asks for a width", "{{ '%*d' % (10 ** 10, 7) }}"),
    "a width in format": ("asks for a width", "{{ '{:10000000000}'.format(7) }}"),
    "a width in the filter": ("asks for a width", "{{ '%10000000000d' | format(7) }}"),
    "long output": (
        "makes more than",
        "{% for a in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    ),
    "a long block": (
        "makes more than",
        "{% set t %}{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endset %}",
    ),
}

CHAT_ML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}Be kind.\n{% endif %}"
    "{% set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|' ~ m.role ~ '|>' + content | trim }}{% if m.calls %}{% for c in m.calls %}"
    "{{ c | tojson }}{{ c.at | string }}{{ '%s: %d' % (c.name, c.at) }}{% endfor %}{% endif %}"
    "{% if loop.last %}{{ loop.length }} {{ messages | selectattr('role', 'equalto', 'user')"
    " | list | length }}{% endif %}\n{% endfor %}"
)


class Tokenizer:
    """As much of a tokenizer as a template sees."""

    special_tokens = {"bos_token": "<s>"}  # noqa: RUF012

    def __init__(self, chat_template):
        self.chat_template = chat_template


@pytest.mark.parametrize("name", BAD)
def test_what_would_not_end_or_fill_the_memory_is_refused(name):
    fault, template = BAD[name]
    with pytest.raises(ChatTemplateError, match=fault):
        render_chat(Tokenizer(template), [{"role": "user", "content": "hello"}])


def test_a_long_chat_is_no_bad_one():
    """A thousand messages, a long document, times and numbers: what jinja itself makes of it."""
    messages = [
        {"role": "user" if i % 2 else "assistant", "content": f"<think>{i}</think>\n {'ab ' * 300}"}
        for i in range(1000)
    ]
    messages[0]["content"] = "a long document " * 100_000
    messages[1]["calls"] = [{"name": "at", "at": 1_700_000_000_000, "of": list(range(1000))}]
    theirs = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # noqa: S701
    theirs.filters["tojson"] = lambda value: __import__("json").dumps(value)
    expected = theirs.from_string(CHAT_ML).render(messages=messages)
    assert render_chat(Tokenizer(CHAT_ML), messages) == expected


def test_each_rendering_has_a_budget_of_its_own():
    template = Tokenizer("{% for i in range(30000) %}{% endfor %}")
    chats = [[{"role": "user", "content": "hello"}]] * 8
    found = []
    threads = [
        threading.Thread(target=lambda chat=chat: found.append(render_chat(template, chat)))
        for chat in chats
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(chats)
