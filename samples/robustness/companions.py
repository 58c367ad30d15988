"""Spoils the files beside a model: tokenizer, its configuration, chat template."""

from __future__ import annotations

import json
from random import Random
from typing import Any, Final

from samples.robustness.json_values import spoil, to_text
from samples.robustness.target import (
    MODEL,
    SECRET,
    Target,
    make_fit,
    read_manifest_text,
    write_manifest_text,
)

_TOKENIZER, _CONFIG, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
TEMPLATES: Final[dict[str, str]] = {
    "cut": "{% for message in messages %}{{ message",
    "no end": "{% if messages %}",
    "unknown tag": "{% frobnicate %}",
    "unknown filter": "{{ messages | frobnicate }}",
    "refuses": "{{ raise_exception('only\nsystem \x1b[31m messages') }}",
    "refuses at length": "{{ raise_exception('no ' * 1000000) }}",
    "divides": "{{ 1 / 0 }}",
    "no item": "{{ messages[99].content.foo.bar }}",
    "no call": "{{ messages() }}",
    "wrong type": "{{ 1 + 'a' }}",
    "reaches for attributes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "reaches for globals": "{{ raise_exception.__globals__['__builtins__'].open('/etc/passwd') }}",
    "reaches for code": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "includes": "{% include '/etc/passwd' %}",
    "imports": "{% import 'os' as os %}{{ os }}",
    "extends": "{% extends '../outside/secret' %}",
    "changes the messages": "{{ messages.append(1) }}",
    "a long range": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "a loop that is never empty": "{% for a in range(99999) if a < 0 %}{% endfor %}" * 300,
    "many loops deep": "{% for a in [1] %}" * 30 + "x" + "{% endfor %}" * 30,
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "two calls a call": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "recursive loops": "{% for a in range(9999) recursive %}{% if loop.depth < 9 %}"
    "{{ loop(range(9999)) }}{% endif %}{% endfor %}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a power of a variable": "{% set n = messages | length + 8 %}{{ n ** n ** n ** n }}",
    "a long text": "{{ 'x' * 10 ** 10 }}",
    "a long text of a variable": "{% set n = messages | length %}{{ 'x' * (n * 10 ** 10) }}",
    "a long list": "{{ ([1] * 10 ** 9) | length }}",
    "doubled text": "{% set ns = namespace(s='ab') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "added text": "{% set ns = namespace(s='ab') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "doubled lists": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "doubled numbers": "{% set ns = namespace(n=3) %}{% for i in range(60) %}"
    "{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "replaced text": "{% set ns = namespace(s='aa') %}{% for i in range(9) %}"
    "{% set ns.s = ns.s | replace('a', ns.s) %}{% endfor %}{{ ns.s }}",
    "joined text": "{% set ns = namespace(s='ab') %}{% for i in range(9) %}"
    "{% set ns.s = ns.s | join(ns.s) %}{% endfor %}{{ ns.s }}",
    "replaced by a method": "{% set ns = namespace(s='aa') %}{% for i in range(9) %}"
    "{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}{{ ns.s }}",
    "wide text": "{{ 'x'.ljust(10 ** 10) }}",
    "wide numbers": "{{ '%10000000000d' % 7 }}",
    "wide numbers by argument": "{{ '%*d' % (10 ** 10, 7) }}",
    "wide formats": "{{ '{:10000000000}'.format(7) }}",
    "wide filter": "{{ 'x' | center(10 ** 10) }}",
    "wide indent": "{{ messages | tojson(indent=10 ** 9) }}",
    "much lorem ipsum": "{{ lipsum(n=10 ** 7) }}",
    "long output": "{% for a in range(99999) %}{% for b in range(99) %}{{ 'x' * 9999 }}"
    "{% endfor %}{% endfor %}",
    "a long block": "{% set t %}{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}"
    "{% endset %}{{ t }}",
    "deep expression": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep operators": "{{ " + "not " * 50_000 + "1 }}",
    "long expression": "{{ 1" + " + 1" * 50_000 + " }}",
    "many tags": "{% if a %}" * 500 + "{% endif %}" * 500,
    "half a character": "\udc80",
    "a surrogate": "{{ '\\ud800' }}",
    "nothing": "",
    "a null": "\0",
    "an undefined name": "{{ nothing }}",
    "the whole namespace": "{{ self }}{{ namespace }}{{ messages }}",
    "a date": "{{ strftime_now('%Y' * 100000) }}",
    "a bad date": "{{ strftime_now('\\0%') }}",
    "a number for a date": "{{ strftime_now(7) }}",
    "plain": "{% for m in messages %}{{ m.content }}{% endfor %}",
}


def template(random: Random, target: Target) -> str:
    """Put a program that fails, never ends or takes all memory in the template's place."""
    (target.outside / "secret").write_text(SECRET)
    name = random.choice(sorted(TEMPLATES))
    data = TEMPLATES[name].encode("utf-8", "surrogateescape")
    if random.random() < 0.25:
        path = target.folder / _CONFIG
        config = json.loads(path.read_text(encoding="utf-8"))
        config["chat_template"] = data.decode("utf-8", "replace")
        if random.random() < 0.5:
            config["chat_template"] = [{"name": "default", "template": config["chat_template"]}]
        path.write_text(to_text(config), encoding="utf-8")
        (target.folder / _TEMPLATE).unlink()
        _forget(target, _TEMPLATE)
    else:
        (target.folder / _TEMPLATE).write_bytes(data)
    make_fit(target.folder)
    return name


def _forget(target: Target, name: str) -> None:
    if (target.folder / MODEL).exists():
        manifest = json.loads(read_manifest_text(target.folder))
        manifest["files"] = [file for file in manifest["files"] if file["name"] != name]
        write_manifest_text(target.folder, json.dumps(manifest))


def tokenizer_config(random: Random, target: Target) -> str:
    """Change values of the tokenizer's configuration."""
    return _spoil_file(random, target, _CONFIG)


def tokenizer_values(random: Random, target: Target) -> str:
    """Change values of the tokenizer."""
    return _spoil_file(random, target, _TOKENIZER)


def tokenizer_parts(random: Random, target: Target) -> str:
    """Put parts into the tokenizer that are hard to bear."""
    path = target.folder / _TOKENIZER
    tokenizer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}
    slow = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
    split = {"type": "Split", "pattern": {"Regex": "(?:(a|aa)+)+b"}, "behavior": "Isolated"}
    changes: dict[str, dict[str, Any]] = {
        "text that grows": {"normalizer": {"type": "Sequence", "normalizers": [grow] * 5}},
        "text that grows without end": {
            "normalizer": {"type": "Sequence", "normalizers": [grow] * 12}
        },
        "a slow pattern": {"normalizer": slow},
        "a slow split": {"pre_tokenizer": dict(split, invert=False)},
        "a bad pattern": {"normalizer": dict(slow, pattern={"Regex": "(((("})},
        "no vocabulary": {"model": dict(tokenizer["model"], vocab={}, merges=[])},
        "ids out of range": {
            "model": dict(tokenizer["model"], vocab={k: v + 10**6 for k, v in vocabulary.items()})
        },
        "one id for all": {"model": dict(tokenizer["model"], vocab=dict.fromkeys(vocabulary, 7))},
        "the largest id": {
            "model": dict(
                tokenizer["model"], vocab={k: 2**32 - 1 - v for k, v in vocabulary.items()}
            )
        },
        "truncation": {
            "truncation": {
                "direction": "Right",
                "max_length": 0,
                "strategy": "LongestFirst",
                "stride": 2**63,
            }
        },
        "padding": {
            "padding": {
                "strategy": {"Fixed": 2**40},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "x",
            }
        },
        "a byte of no byte": {"decoder": {"type": "ByteFallback"}},
        "a decoder that fails": {
            "decoder": {"type": "Strip", "content": "a", "start": 9, "stop": 9}
        },
        "word pieces": {
            "model": {
                "type": "WordPiece",
                "unk_token": "[GONE]",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 1,
                "vocab": {"a": 0},
            }
        },
        "unigram": {"model": {"type": "Unigram", "unk_id": 99, "vocab": [["a", 0.0]]}},
        "word level": {"model": {"type": "WordLevel", "unk_token": "[GONE]", "vocab": {"a": 0}}},
        "no unknown": {
            "model": tokenizer["model"] | {"unk_token": "[GONE]", "vocab": {"a": 0}, "merges": []}
        },
        "post-processor": {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "GONE", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
        "added tokens": {
            "added_tokens": [
                {
                    "id": number * 10**6,
                    "content": "ab"[number % 2],
                    "single_word": False,
                    "lstrip": True,
                    "rstrip": True,
                    "normalized": False,
                    "special": bool(number % 3),
                }
                for number in range(50)
            ]
        },
    }
    name = random.choice(sorted(changes))
    path.write_text(json.dumps(tokenizer | changes[name]), encoding="utf-8")
    make_fit(target.folder)
    return name


def _spoil_file(random: Random, target: Target, name: str) -> str:
    path = target.folder / name
    text, done = spoil(random, json.loads(path.read_text(encoding="utf-8")))
    path.write_text(text, encoding="utf-8")
    make_fit(target.folder)
    return f"{name}: {done}"
