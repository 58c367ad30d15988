"""Companions: tokenizer, chat template and configurations, which lie beside a bundle's model.

Several bundles may share a directory and its companions, as long as these are the same. What else
lies there is no bundle's: the manifest lists what is.
"""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers.utils.hub import CHAT_TEMPLATE_DIR

from echoatt_exporter.errors import ExportError, OutputExistsError
from echoatt_exporter.share.tokenizer_files import save_tokenizer
from echoatt_exporter.share.weight_files import read_json_object
from echoatt_runtime.bundle import Bundle
from echoatt_runtime.text import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE

# Read by people and tools beside the bundle; the runtime itself reads the manifest.
_CONFIG_FILES = ("config.json", "generation_config.json")


def copy_checkpoint_files(
    source: Path, target: Path, *, trust_remote_code: bool = False
) -> Sequence[str]:
    """Put tokenizer, chat template and configurations of a checkpoint into a directory.

    Args:
        source: The checkpoint's directory.
        target: An existing directory.
        trust_remote_code: Let a tokenizer run code of the checkpoint's own.

    Returns:
        What a user should know of the tokenizer, in a line each; often nothing.

    Raises:
        CheckpointError: There is a tokenizer, and it cannot be loaded.
    """
    notes = save_tokenizer(source, target, trust_remote_code=trust_remote_code)
    _fold_templates(target)
    for name in _CONFIG_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return notes


def _fold_templates(directory: Path) -> None:
    """Put chat templates that lie in a folder into the tokenizer's configuration.

    transformers reads several templates from either place, and a bundle has no folders.
    """
    folder = directory / CHAT_TEMPLATE_DIR
    if not folder.is_dir():
        return
    default = directory / CHAT_TEMPLATE_FILE
    places = {"default": default} if default.is_file() else {}
    places |= {path.stem: path for path in sorted(folder.iterdir())}
    path = directory / TOKENIZER_CONFIG_FILE
    config = read_json_object(path)
    config["chat_template"] = [
        {"name": name, "template": place.read_text(encoding="utf-8")}
        for name, place in places.items()
    ]
    path.write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")
    # It would come before the configuration, alone
    default.unlink(missing_ok=True)
    shutil.rmtree(folder)


def copy_companions(bundle: Bundle, target: Path) -> None:
    """Copy what belongs beside a bundle's model to another directory, and nothing else."""
    for file in bundle.manifest.companions:
        if (path := bundle.companion(file.name)) is not None:
            shutil.copyfile(path, target / file.name)


def check_companions(staged: Path, place: Path, *, force: bool) -> None:
    """Refuse to replace what may be another model's.

    Args:
        staged: The directory of what is to come.
        place: Where to.
        force: Whether files that differ may be replaced.

    Raises:
        OutputExistsError: A file is there and differs, and not `force`.
        ExportError: A directory is there.
    """
    for path in sorted(staged.iterdir()):
        there = place / path.name
        if there.is_dir():
            raise ExportError(f"{there} is a directory; choose an empty place for the bundle")
        if there.exists() and not force and not filecmp.cmp(path, there, shallow=False):
            raise OutputExistsError(
                f"{there} exists and differs from what goes beside this model (it may be another"
                " model's); choose an empty directory, or pass --force to replace it"
            )
