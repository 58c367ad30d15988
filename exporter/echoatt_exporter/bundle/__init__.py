"""Writing a bundle: stage, check, publish, and sweep up after exports that were killed."""

from echoatt_exporter.bundle.companions import (
    check_companions,
    copy_checkpoint_files,
    copy_companions,
)
from echoatt_exporter.bundle.place import BundlePath, writing_to
from echoatt_exporter.bundle.room import check_room, least_bytes
from echoatt_exporter.bundle.stage import Stage, open_stage
from echoatt_exporter.bundle.sweep import sweep
from echoatt_exporter.bundle.write import write_bundle

__all__ = [
    "BundlePath",
    "Stage",
    "check_companions",
    "check_room",
    "copy_checkpoint_files",
    "copy_companions",
    "least_bytes",
    "open_stage",
    "sweep",
    "write_bundle",
    "writing_to",
]
