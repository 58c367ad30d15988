"""Damage to a file whatever is in it: bytes that change, files that are exchanged, and links."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from random import Random
from typing import Final

from samples.robustness.target import SECRET, Mutation, Target, make_fit

_HUGE: Final = 1 << 36


def truncate(random: Random, target: Target) -> str:
    """Cut a file short."""
    path = target.some_file(random)
    size = path.stat().st_size
    kept = random.choice((0, 1, 8, size // 2, max(size - 1, 0), random.randint(0, size)))
    os.truncate(path, min(kept, size))
    return f"{path.name} cut to {kept} bytes"


def flip(random: Random, target: Target) -> str:
    """Change single bytes."""
    path = target.some_file(random)
    data = bytearray(path.read_bytes())
    # The beginnings of files hold lengths and counts
    reach = random.choice((64, 4096, len(data)))
    count = random.choice((1, 2, 16, 256))
    for _ in range(count):
        data[random.randrange(min(reach, len(data)))] = random.randrange(256)
    path.write_bytes(data)
    return f"{path.name}: {count} bytes among the first {reach}"


def insert(random: Random, target: Target) -> str:
    """Push random bytes in."""
    path = target.some_file(random)
    data = path.read_bytes()
    at, count = random.randint(0, len(data)), random.choice((1, 7, 64, 10_000))
    path.write_bytes(data[:at] + random.randbytes(count) + data[at:])
    return f"{path.name}: {count} bytes at {at}"


def delete(random: Random, target: Target) -> str:
    """Take bytes out."""
    path = target.some_file(random)
    data = path.read_bytes()
    at, count = random.randint(0, len(data)), random.choice((1, 7, 64, 10_000))
    path.write_bytes(data[:at] + data[at + count :])
    return f"{path.name}: {count} bytes less at {at}"


def repeat(random: Random, target: Target) -> str:
    """Write a file, or a part of it, several times over."""
    path = target.some_file(random)
    data = path.read_bytes()
    at = random.choice((0, random.randint(0, len(data))))
    times = random.choice((1, 2, 10))
    path.write_bytes(data + data[at:] * times)
    return f"{path.name}: from {at} on {times} times more"


def replace(random: Random, target: Target) -> str:
    """Put other contents in a file's place."""
    path = target.some_file(random)
    texts = (b"", b"{}", b"[]", b"null", b"\0" * 4096, b"\xff" * 4096, b"[" * 200_000, b"7")
    data = random.choice((*texts, random.randbytes(5000)))
    path.write_bytes(data)
    return f"{path.name} is {data[:8]!r}, {len(data)} bytes"


def swap(random: Random, target: Target) -> str:
    """Put another model's file, or another file of the same model, in a file's place."""
    path = target.some_file(random)
    others = sorted(target.other.iterdir())
    same = [other for other in others if other.name == path.name]
    taken = random.choice(same or others) if random.random() < 0.7 else target.some_file(random)
    path.write_bytes(taken.read_bytes())
    return f"{path.name} is {taken.parent.name}'s {taken.name}"


def make_huge(random: Random, target: Target) -> str:
    """Let a file be 64 GB long, most of which takes no room on the disk."""
    path = target.some_file(random)
    if random.random() < 0.5:
        path.write_bytes(b"")
    os.truncate(path, _HUGE)
    return f"{path.name} has {_HUGE} bytes"


def remove(random: Random, target: Target) -> str:
    """Take a file away, or call it by a name that differs by case only."""
    path = target.some_file(random)
    if random.random() < 0.5:
        path.unlink()
        return f"{path.name} is gone"
    path.rename(path.with_name(path.name.upper()))
    return f"{path.name} is called {path.name.upper()}"


def link(random: Random, target: Target) -> str:
    """Put a link in a file's place: out of the directory, to itself, to nothing."""
    path = target.some_file(random)
    kind = random.choice(("outside", "outside", "itself", "nothing", "hard", "device"))
    away = target.outside / path.name
    shutil.copyfile(path, away)
    if kind == "hard":
        path.unlink()
        path.hardlink_to(away)
        return f"{path.name} is a hard link"
    path.unlink()
    places = {"outside": away, "itself": path, "nothing": target.outside / "nothing"}
    path.symlink_to(places.get(kind) or Path(random.choice(("/dev/zero", "/dev/tty"))))
    return f"{path.name} is a link: {kind}"


def no_file(random: Random, target: Target) -> str:
    """Put what is no file in a file's place."""
    path = target.some_file(random)
    path.unlink()
    kind = random.choice(("directory", "pipe", "socket"))
    if kind == "directory":
        path.mkdir()
        (path / path.name).write_text(SECRET)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        # A path that fits the few bytes that a socket's name may have
        with socket.socket(socket.AF_UNIX) as one:
            here = os.open(target.folder, os.O_RDONLY)
            one.bind(f"/proc/self/fd/{here}/{path.name}")
            os.close(here)
    return f"{path.name} is a {kind}"


def fitting(mutation: Mutation) -> Mutation:
    """The same damage, and a manifest that fits it."""

    def mutate(random: Random, target: Target) -> str:
        done = mutation(random, target)
        make_fit(target.folder)
        return f"{done}; manifest made to fit"

    return mutate
