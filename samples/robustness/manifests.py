"""Spoils the manifest of a bundle."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from samples.robustness.json_values import WEIRD, shown, spoil, to_text
from samples.robustness.target import (
    MODEL,
    Target,
    format_2,
    read_manifest_text,
    write_manifest_text,
)


def values(random: Random, target: Target) -> str:
    """Change a few values anywhere in it."""
    text, done = spoil(random, _manifest(target))
    write_manifest_text(target.folder, text)
    return done


def old_format(random: Random, target: Target) -> str:
    """Change a few values of a manifest of the format before."""
    text, done = spoil(random, format_2(target.folder))
    write_manifest_text(target.folder, text)
    return f"format 2; {done}"


def newer(random: Random, target: Target) -> str:
    """Let it be of another format, need what nobody knows, or have fields that nobody knows."""
    manifest = _manifest(target)
    how = random.choice(("format", "requires", "unknown"))
    if how == "format":
        numbers = ("4", "999999999", "1", "9" * 5000, "-3", "3\n", "\u0663", "")
        manifest["format"] = f"echoatt-bundle/{random.choice(numbers)}"
    elif how == "requires":
        needs: tuple[Any, ...] = (
            ["teleport"],
            ["cache-list", "a\nb"],
            ["x" * 9999],
            ["x"] * 9999,
            [None],
            "x",
            [],
        )
        manifest["requires"] = random.choice(needs)
    else:
        part = random.choice((manifest, manifest["specification"], manifest["files"][0]))
        part["colour"] = random.choice(WEIRD)
    write_manifest_text(target.folder, to_text(manifest))
    return f"{how}: {shown(manifest[how]) if how in manifest else 'colour'}"


def files(random: Random, target: Target) -> str:
    """Let it list other files: outside, twice, itself, with other sizes and roles."""
    manifest = _manifest(target)
    (target.outside / "secret").write_bytes((target.folder / MODEL).read_bytes())
    entry = random.choice(manifest["files"])
    how = random.choice(("name", "name", "bytes", "role", "twice", "none", "many"))
    if how == "name":
        entry["name"] = random.choice(
            (
                "../outside/secret",
                f"{target.outside}/secret",
                "..",
                ".",
                "",
                "a\0b",
                MODEL,
                "tokenizer.json/../../outside/secret",
                "C:\\secret",
                "x" * 5000,
                "\u202egpj.exe",
            )
        )
    elif how == "bytes":
        entry["bytes"] = random.choice((-1, 0, 2**62, None, entry["bytes"] + 1))
    elif how == "role":
        entry["role"] = random.choice(("weights", "companion", "model", "x" * 9000))
    elif how == "twice":
        manifest["files"].append(
            dict(entry, name=random.choice((entry["name"].upper(), entry["name"])))
        )
    elif how == "none":
        manifest["files"] = []
    else:
        manifest["files"] += [dict(entry, name=f"file {number}") for number in range(20_000)]
    write_manifest_text(target.folder, to_text(manifest))
    return f"{how}: {shown(entry.get(how, entry['name']))}"


def text(random: Random, target: Target) -> str:
    """Spoil its text: cut, with keys that are there twice, twice in the file, or absent."""
    good = read_manifest_text(target.folder)
    how = random.choice(("cut", "key twice", "two", "none", "long", "no JSON", "foreign"))
    texts: tuple[str, ...] = {
        "cut": (good[: random.randrange(len(good))],),
        "key twice": (good.replace('{"', '{"format": "echoatt-bundle/2", "', 1),),
        "two": (good, good),
        "none": (),
        "long": (good + " " * 5_000_000,),
        "no JSON": (random.choice(("", "\0", "{", "nan", "\ufeff" + good, "[" * 100_000)),),
        "foreign": (json.dumps({"format": "other/3", "layers": [1, 2]}),),
    }[how]
    write_manifest_text(target.folder, *texts)
    return how


def _manifest(target: Target) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(read_manifest_text(target.folder))
    return found
