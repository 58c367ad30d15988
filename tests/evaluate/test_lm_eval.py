"""lm-evaluation-harness runs a student unchanged and comes to our own score."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from echoatt_exporter import load_shared
from echoatt_exporter.evaluate.models import CheckpointModel
from echoatt_exporter.evaluate.perplexity import score_documents
from echoatt_exporter.share.save import save_student
from echoatt_exporter.texts import load_tokenizer, read_texts

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm_eval is not installed: pip install '.[eval]'",
)

SAMPLES = Path(__file__).resolve().parents[2] / "samples"

# Each text is a document by itself, whole and shorter than a window
TASK = """\
task: local_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {documents}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
"""

# The harness has nothing of this project but the directory
SCRIPT = """
import sys
for name in ("echoatt_exporter", "echoatt_runtime", "echoatt_cli"):
    sys.modules[name] = None
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@torch.no_grad()
def test_harness_and_project_agree_on_bits_a_byte(tmp_path: Path) -> None:
    student_dir, documents = tmp_path / "student", tmp_path / "documents.jsonl"
    teacher = SAMPLES / "tiny-books"
    pairs = "1:0,2:0,3:0"
    save_student(load_shared(teacher, pairs, dtype=torch.float32), student_dir, teacher)
    paragraphs = (teacher / "README.md").read_text(encoding="utf-8").split("\n\n")[:5]
    documents.write_text("".join(json.dumps({"text": part}) + "\n" for part in paragraphs))
    (tmp_path / "task.yaml").write_text(TASK.format(documents=documents))

    # The harness puts <s> before a text as what its first token is predicted from. The tokenizer
    # is told to add none of its own, which would be a second one, and be scored.
    model_arguments = f"pretrained={student_dir},trust_remote_code=True,add_bos_token=False"
    harness = subprocess.run(
        [
            *(sys.executable, "-c", SCRIPT),
            *("--model", "hf", "--model_args", model_arguments, "--device", "cpu"),
            *("--tasks", "local_text", "--include_path", str(tmp_path), "--batch_size", "5"),
            *("--output_path", str(tmp_path / "results")),
        ],
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert harness.returncode == 0, harness.stderr
    (results,) = (tmp_path / "results").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]["local_text"]["bits_per_byte,none"]

    student, tokenizer = load_shared(student_dir, None), load_tokenizer(student_dir)
    texts = read_texts([documents])
    ours = score_documents(CheckpointModel(student, tokenizer), texts, length=512, stride=256)
    assert ours.bytes == sum(len(part.encode()) for part in paragraphs)
    assert theirs == pytest.approx(ours.bits_per_byte, rel=1e-5)
    # Sharing shows in the figure, so that the line above compares the student and not its teacher
    unshared = load_shared(teacher, None, dtype=torch.float32)
    of_teacher = score_documents(
        CheckpointModel(unshared, tokenizer), texts, length=512, stride=256
    )
    assert theirs != pytest.approx(of_teacher.bits_per_byte, rel=1e-3)
