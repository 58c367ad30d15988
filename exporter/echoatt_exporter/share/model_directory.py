"""The directory of a model, and what people give in its place: each refused by what it is."""

from __future__ import annotations

from pathlib import Path

from echoatt_exporter.errors import CheckpointError
from echoatt_exporter.share.weight_files import read_json_object

CONFIG = "config.json"

_ADAPTER = "adapter_config.json"
# Larger than any tokenizer; what is here is read into memory, by other libraries too
_LARGEST_TEXT = 256 << 20
_TEXT_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt")
_POINTER = b"version https://git-lfs"
_LARGEST_POINTER = 1024


def model_directory(path: str | Path) -> Path:
    """A path as the directory of a teacher or a student.

    Raises:
        CheckpointError: It is something else, or not all here; says what it is and what to do.
    """
    directory = Path(path)
    if not directory.exists():
        raise CheckpointError(
            f"{directory}: no such directory; give a local model directory (nothing is downloaded)"
        )
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: {_file(directory)}")
    if (directory / _ADAPTER).is_file():
        raise CheckpointError(f"{directory}: {_adapter(directory)}")
    if not (directory / CONFIG).is_file():
        raise CheckpointError(f"{directory}: {_without_config(directory)}")
    _refuse_pointers(directory)
    _refuse_oversized(directory)
    return directory


def _file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return f"a GGUF file, {_GGUF_ADVICE}"
    if suffix == ".onnx":
        return f"an ONNX file; give the checkpoint's directory, which holds {CONFIG}"
    return f"is a file; give the directory that holds {CONFIG}"


_GGUF_ADVICE = (
    "which is for llama.cpp and its like; give the Hugging Face directory that it was made from,"
    f" with {CONFIG} and model.safetensors"
)


def _without_config(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    if gguf := [name for name in names if name.lower().endswith(".gguf")]:
        return f"holds GGUF files ({gguf[0]}), {_GGUF_ADVICE}"
    if "params.json" in names or any(name.startswith("consolidated.") for name in names):
        return f"holds its maker's own format (no {CONFIG}); download the Hugging Face files"
    if "model_index.json" in names:
        return "a pipeline of several models, such as for images; not a decoder of text"
    return f"no {CONFIG}; not a Hugging Face model directory"


def _adapter(directory: Path) -> str:
    """What an adapter's directory is, and how it is merged."""
    beside = (directory / CONFIG).is_file()
    named = read_json_object(directory / _ADAPTER).get("base_model_name_or_path")
    base = str(directory) if beside or not isinstance(named, str) else named[:1000]
    adapter = "ADAPTER" if beside else str(directory)
    is_what = f"holds an adapter ({_ADAPTER})" if beside else f"an adapter ({_ADAPTER}) of {base}"
    move, unless = "", ""
    if beside:
        unless = f"; or, if the weights have it already, remove {_ADAPTER}"
    if beside or (Path(base) / _ADAPTER).is_file():
        # Otherwise transformers loads the adapter with its base, and cannot save what was merged
        move = f"move the adapter_* files out of {base} (to a new directory ADAPTER), then "
    return (
        f"{is_what}; merge it first: {move}run, with peft installed, python -c"
        ' "from peft import PeftModel; from transformers import AutoModelForCausalLM;'
        f" PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{base}', dtype='auto'),"
        f" '{adapter}').merge_and_unload().save_pretrained('MERGED')\", and copy the tokenizer's"
        f" files to MERGED{unless}"
    )


def _refuse_pointers(directory: Path) -> None:
    """Refuse files that a clone without Git LFS leaves in the place of large ones."""
    for pattern in (*_TEXT_PATTERNS, "*.safetensors", "*.bin"):
        for path in sorted(directory.glob(pattern)):
            if path.is_file() and 0 < path.stat().st_size < _LARGEST_POINTER:
                with path.open("rb") as file:
                    start = file.read(len(_POINTER))
                if start == _POINTER:
                    raise CheckpointError(
                        f"{path}: a Git LFS pointer, not the file itself; run git lfs pull there,"
                        " or download the file"
                    )


def _refuse_oversized(directory: Path) -> None:
    """Refuse configurations and tokenizers that are too large to be any."""
    for pattern in _TEXT_PATTERNS:
        for path in directory.glob(pattern):
            if path.is_file() and (size := path.stat().st_size) > _LARGEST_TEXT:
                raise CheckpointError(f"{path}: has {size} bytes; copy or download it again")
