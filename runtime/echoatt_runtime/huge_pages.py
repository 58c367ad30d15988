"""Lets Linux hold a loaded model's weights in pages of 2 MB.

A decoding step reads every weight once, and looks up where each page of it lies in memory. On
pages of 4 KB the look-ups cost 3 to 4 % of a step of a 1.1-billion-parameter int4 model. ONNX
Runtime packs the weights into ordinary memory and has no setting for its pages; the kernel merges
them afterwards, on request and in place.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

_SETTING: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS: Final = Path("/proc/self/maps")
_PAGE: Final = 2 << 20
# Merging so little is not worth a thread
_LEAST_BYTES: Final = 64 << 20
# Of one request: the kernel is asked again after each, so that it never works for long on one
_REQUEST: Final = 16 * _PAGE
# linux/mman.h; the second is there since Linux 6.1
_MADV_HUGEPAGE: Final = 14
_MADV_COLLAPSE: Final = 25


class Region(NamedTuple):
    """Addresses from `begin` to before `end`."""

    begin: int
    end: int


def private_memory() -> frozenset[Region]:
    """The process's writable memory that belongs to no file; none where pages are not merged."""
    try:
        if sys.platform != "linux" or "[never]" in _SETTING.read_text(encoding="ascii"):
            return frozenset()
        return frozenset(_parse(_MAPS.read_text(encoding="utf-8", errors="replace")))
    except OSError:  # a sandbox without /sys or /proc
        return frozenset()


def merge_pages_since(before: frozenset[Region]) -> threading.Thread | None:
    """Merge the pages of memory that is new, beside whatever the caller does next.

    It changes what no program can see but by its speed. Where the kernel has no room, is too old
    or is told never to, pages stay as they are.

    Args:
        before: What `private_memory` gave before the memory was taken.

    Returns:
        The thread at work, which nobody need wait for; None where there is too little to do.
    """
    whole = [_whole_pages(region) for region in _beyond(private_memory(), before)]
    if sum(end - begin for begin, end in whole if end > begin) < _LEAST_BYTES:
        return None
    thread = threading.Thread(target=_merge, args=(whole,), name="echoatt-huge-pages", daemon=True)
    thread.start()
    return thread


def _parse(maps: str) -> list[Region]:
    """Regions of /proc/self/maps that are writable, private and of no file."""
    regions = []
    for line in maps.splitlines():
        addresses, rights, _, _, inode, *name = line.split(maxsplit=5)
        is_private = rights.startswith("rw") and rights.endswith("p") and inode == "0"
        if is_private and (not name or name[0].strip() == "[heap]"):
            begin, end = (int(address, 16) for address in addresses.split("-"))
            regions.append(Region(begin, end))
    return regions


def _beyond(after: Iterable[Region], before: Iterable[Region]) -> list[Region]:
    """What `after` covers and `before` does not.

    Addresses are compared, and not regions as a whole: the kernel joins new memory to a region
    that ends where it begins.
    """
    known = sorted(before)
    new = []
    for begin, end in sorted(after):
        for known_begin, known_end in known:
            if known_end <= begin or known_begin >= end:
                continue
            if known_begin > begin:
                new.append(Region(begin, known_begin))
            begin = known_end
        if begin < end:
            new.append(Region(begin, end))
    return new


def _whole_pages(region: Region) -> Region:
    """The part of a region that 2 MB pages can cover; empty or less where there is none."""
    return Region(-(-region.begin // _PAGE) * _PAGE, region.end // _PAGE * _PAGE)


def _merge(regions: list[Region]) -> None:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for begin, end in regions:
        for start in range(begin, end, _REQUEST):
            length = min(_REQUEST, end - start)
            # What fails leaves memory as it is: a region may be gone by now
            madvise(start, length, _MADV_HUGEPAGE)
            madvise(start, length, _MADV_COLLAPSE)
