import ctypes
import mmap
import sys
from pathlib import Path

import pytest

from echoatt_runtime import huge_pages
from echoatt_runtime.executor import open_executor
from echoatt_runtime.huge_pages import Region, merge_pages_since, private_memory

MB = 1 << 20

MAPS = """\
55d0c0000000-55d0c0a00000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0004000000 rw-p 00000000 00:00 0 
7f0010000000-7f0010200000 rw-s 00000000 00:00 0 
7f0020000000-7f0020200000 r--p 00000000 00:00 0 
7f0030000000-7f0030200000 rw-p 00000000 fe:00 4711                       /models/a model.onnx.data
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
"""  # fmt: skip # noqa: W291


def huge_kilobytes(address):
    """What of the mapping around an address lies in huge pages, by the kernel's own account."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "AnonHugePages:":
            return int(line.split()[1])
    raise AssertionError("no such mapping")


@pytest.fixture
def memory():
    """Makes written memory of its own: its address, and how to read it."""
    made = []

    def make(size):
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Small pages whatever the system's setting, and no part of a neighbour
        area.madvise(mmap.MADV_NOHUGEPAGE)
        for begin in range(0, size, MB):
            area[begin : begin + 8] = begin.to_bytes(8, "little")
        made.append(area)
        return ctypes.addressof(ctypes.c_char.from_buffer(area)), area

    return make


SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_linux = pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(),
    reason="this system does not merge pages",
)


def test_only_private_writable_memory_of_no_file_counts():
    assert huge_pages._parse(MAPS) == [
        Region(0x55D0C0000000, 0x55D0C0A00000),
        Region(0x7F0000000000, 0x7F0004000000),
    ]


@pytest.mark.parametrize(
    ("after", "new"),
    [
        ([(10, 20)], []),
        ([(10, 20), (50, 60)], [(50, 60)]),
        ([(10, 28)], [(20, 28)]),
        ([(5, 25)], [(5, 10), (20, 25)]),
        ([(5, 45)], [(5, 10), (20, 30), (40, 45)]),
        ([(35, 38), (40, 41)], [(40, 41)]),
        ([], []),
    ],
)
def test_memory_joined_to_what_was_there_counts_for_its_own_part(after, new):
    before = [Region(30, 40), Region(10, 20)]
    assert huge_pages._beyond([Region(*one) for one in after], before) == [
        Region(*one) for one in new
    ]


def kernel_merges(address, size):
    """Whether the kernel merges pages when it is asked itself: it may be old, or have no room."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    begin, end = -(-address // (2 * MB)) * 2 * MB, (address + size) // (2 * MB) * 2 * MB
    return all(
        madvise(begin, end - begin, advice) == 0
        for advice in (huge_pages._MADV_HUGEPAGE, huge_pages._MADV_COLLAPSE)
    )


@needs_linux
def test_new_memory_is_merged_and_keeps_what_it_holds(memory):
    if not kernel_merges(memory(96 * MB)[0], 96 * MB):
        pytest.skip("this kernel does not merge pages, or has no room for it now")
    before = private_memory()
    new, area = memory(96 * MB)
    inside = new + 4 * MB
    assert huge_kilobytes(inside) == 0

    thread = merge_pages_since(before)
    assert thread is not None
    thread.join()

    assert huge_kilobytes(inside) >= 64 * 1024
    for begin in range(0, 96 * MB, MB):
        assert area[begin : begin + 8] == begin.to_bytes(8, "little")


@needs_linux
def test_little_memory_is_left_alone(memory):
    before = private_memory()
    memory(32 * MB)
    assert merge_pages_since(before) is None


def test_a_system_that_says_never_is_obeyed(memory, tmp_path, monkeypatch):
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(huge_pages, "_SETTING", setting)
    memory(96 * MB)
    assert private_memory() == frozenset()
    assert merge_pages_since(frozenset()) is None


@pytest.mark.parametrize("name", ["_SETTING", "_MAPS"])
def test_a_sandbox_without_the_kernels_files_is_none_either(tmp_path, monkeypatch, name):
    monkeypatch.setattr(huge_pages, name, tmp_path / "absent")
    assert private_memory() == frozenset()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at Linux's own account")
def test_a_session_on_the_cpu_asks_for_its_memory(bundle, monkeypatch):
    asked = []
    monkeypatch.setattr("echoatt_runtime.executor.open.private_memory", lambda: "before")
    monkeypatch.setattr("echoatt_runtime.executor.open.merge_pages_since", asked.append)
    open_executor(bundle)
    assert asked == ["before"]
