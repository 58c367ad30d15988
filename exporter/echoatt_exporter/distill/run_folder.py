"""The folder of a healing run: what lies where, whose run it is, and how far it got."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echoatt_exporter.distill.config import DistillConfig
from echoatt_exporter.errors import OutputExistsError, TrainingError
from echoatt_exporter.share.weight_files import read_json_object

# Written last by transformers.Trainer, so a checkpoint with a whole one is whole
_STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run lies.

    Attributes:
        root: The folder; made by `begin`.
    """

    root: Path

    @property
    def student(self) -> Path:
        """The healed student; it appears last, and whole."""
        return self.root / "student"

    @property
    def curves(self) -> Path:
        """The picture of the losses."""
        return self.root / "loss.png"

    @property
    def log(self) -> Path:
        """The losses, one JSON object a line."""
        return self.root / "log.jsonl"

    @property
    def config(self) -> Path:
        """The configuration in effect."""
        return self.root / "distill.yaml"

    @property
    def inputs(self) -> Path:
        """What the run was begun with, to know it again."""
        return self.root / "inputs.json"

    def checkpoints(self, stage: int) -> Path:
        """The checkpoints of a stage."""
        return self.root / "checkpoints" / f"stage-{stage}"

    def stage_student(self, stage: int) -> Path:
        """The student as a stage left it; there when the stage is finished."""
        return self.checkpoints(stage) / "student"

    def check_unfinished(self) -> None:
        """Refuse a folder that holds a finished run, or something else.

        Raises:
            OutputExistsError: It does.
        """
        if self.student.exists():
            raise OutputExistsError(
                f"{self.student}: exists, this run is finished; name another directory"
            )
        if self.root.is_file():
            raise OutputExistsError(f"{self.root}: is a file; name a directory")
        if self.root.is_dir() and not self.inputs.exists() and any(self.root.iterdir()):
            raise OutputExistsError(
                f"{self.root}: holds files that are not of a training run; name another directory"
            )

    def begin(self, config: DistillConfig, **inputs: str | int) -> None:
        """Make the folder, or see that it belongs to the same run.

        Args:
            config: The configuration in effect.
            inputs: Digests of teacher, student and text, and the number of processes.

        Raises:
            TrainingError: The run in the folder was begun with something else; or the folder
                cannot be made.
            CheckpointError: The folder's own record cannot be read.
        """
        asked: dict[str, Any] = {**inputs, **config.to_dict()}
        if self.inputs.exists():
            found = read_json_object(self.inputs)
            changed = [
                f"{name} ({found.get(name)} before, {asked.get(name)} now)"
                if name not in ("teacher", "student", "text")
                else name
                for name in sorted(found.keys() | asked.keys())
                if found.get(name) != asked.get(name)
            ]
            if changed:
                raise TrainingError(
                    f"{self.root}: holds a run that was begun with another"
                    f" {', '.join(changed)}; give the same to go on, or name another directory"
                )
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.config.write_text(config.to_yaml(), encoding="utf-8")
            # Last, and whole: without it the folder is nobody's run
            partial = self.inputs.with_suffix(".partial")
            partial.write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
            partial.replace(self.inputs)
        except OSError as error:
            raise TrainingError(f"{self.root}: cannot be written ({error.strerror})") from error

    def newest_checkpoint(self, stage: int) -> Path | None:
        """The newest whole checkpoint of a stage."""
        whole = [path for path in self._checkpoints(stage) if _is_whole(path)]
        return max(whole, key=_step, default=None)

    def clean_up(self, stage: int) -> None:
        """Remove what a killed run left behind: all after its last whole checkpoint."""
        newest = self.newest_checkpoint(stage)
        for path in self._checkpoints(stage):
            if path != newest:
                shutil.rmtree(path)
        shutil.rmtree(self.stage_student(stage).with_suffix(".partial"), ignore_errors=True)
        reached = (stage, 0 if newest is None else _step(newest))
        lines = [line for line in self.read_log() if (line["stage"], line["step"]) <= reached]
        partial = self.log.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        partial.replace(self.log)

    def append_log(self, line: dict[str, Any]) -> None:
        """Add a line to the log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """The log's lines, without one that a killed process left unfinished."""
        if not self.log.exists():
            return []
        text = self.log.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def _checkpoints(self, stage: int) -> list[Path]:
        folder = self.checkpoints(stage)
        return [path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.get("global_step") == _step(checkpoint)
