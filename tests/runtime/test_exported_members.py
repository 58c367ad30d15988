import importlib
import json
import subprocess
import sys
from importlib.metadata import version

import pytest

import echoatt_runtime
from echoatt_runtime import EchoAttError

EXPORTED = [
    "BundleError",
    "BundleNotFoundError",
    "ChatTemplateError",
    "ContextOverflowError",
    "DamagedBundleError",
    "DeviceError",
    "EchoAttError",
    "EchoModel",
    "ForeignModelError",
    "GenerationResult",
    "Manifest",
    "MissingDependencyError",
    "NewerFormatError",
    "NumericalError",
    "OptionError",
    "OutOfMemoryError",
    "PlanError",
    "PromptError",
    "RunError",
    "SamplingError",
    "SamplingParams",
    "SharingPlan",
    "Specification",
    "SpecificationError",
    "TextPiece",
    "Timings",
    "__version__",
]

# Below the top: what exporter, bench and parity may use, and nothing else
PUBLIC_ROOMS = {
    "bundle": ("Bundle file_sha256 find_model read_manifest read_onnx_file"),
    "cache": ("BUCKET HostMemory KVCache Memory bucket_capacity"),
    "contract": (
        "Bits BundleFile CAPABILITIES CHOICES COMPANION CacheSpec DEVICES DTYPES Dtype "
        "ELEMENT_TYPES ElementType FORMAT FORMAT_NUMBER INPUT_IDS LAYER_KINDS LOGITS "
        "LOGITS_INDICES LOGIT_SUMS LayerKind METADATA_KEY MODEL_FILE Manifest PAST_LENGTHS "
        "Quantisation ROUNDINGS RoundingCost SharingPlan SourceCheckpoint Specification "
        "Verification WEIGHTS head_order_fault lay_out_caches required_by"
    ),
    "executor": (
        "Choice Executor executor_of Integers Logits open_executor PREFILL_CHUNK run_texts "
        "slots_of TextLogits TopLogits"
    ),
    "generation": ("Batch TokenSequence check_token_ids generate"),
    "measures": ("kl_divergence log_probabilities log_softmax perplexity same_top_token spread"),
    "ort": (
        "Binding cuda_library has_cuda import_onnxruntime LentTensor LentWeights open_session "
        "OrtSession PROVIDERS SessionOptions SharedWeights TensorInfo TOP_LOGITS TOP_LOGITS_INPUT "
        "top_model TOP_TOKENS"
    ),
    "text": (
        "CHAT_TEMPLATE_FILE Detokenizer Message StopMatcher TOKENIZER_CONFIG_FILE "
        "TOKENIZER_FILE TextTokenizer is_message render_chat "
        "unicode_fault"
    ),
}


def run_python(program, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_exported_members():
    assert echoatt_runtime.__all__ == EXPORTED
    assert all(hasattr(echoatt_runtime, name) for name in EXPORTED)
    assert echoatt_runtime.__version__ == version("echoatt")


@pytest.mark.parametrize("room", PUBLIC_ROOMS)
def test_members_of_the_rooms(room):
    module = importlib.import_module(f"echoatt_runtime.{room}")
    assert sorted(module.__all__) == sorted(PUBLIC_ROOMS[room].split())
    assert all(hasattr(module, name) for name in module.__all__)


def test_every_error_is_exported_and_of_one_tree():
    errors = {name for name in EXPORTED if name.endswith("Error")}
    declared = {
        name
        for name, member in vars(echoatt_runtime.errors).items()
        if isinstance(member, type) and issubclass(member, EchoAttError)
    }
    assert declared == errors


def test_generating_needs_no_framework(bundle):
    program = """
import json, sys
from echoatt_runtime import EchoModel, SamplingParams
EchoModel.load(sys.argv[1]).generate("a", SamplingParams(max_new_tokens=2, temperature=1))
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    done = run_python(program, bundle)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert {"onnxruntime", "tokenizers", "numpy"} <= loaded
    unwanted = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "echoatt_exporter"}
    assert not loaded & unwanted


def test_without_onnxruntime_the_import_works_and_loading_says_what_to_install(bundle):
    program = """
import sys
sys.modules["onnxruntime"] = None  # What the import system does for a package it cannot find.
import echoatt_runtime
try:
    echoatt_runtime.EchoModel.load(sys.argv[1])
except echoatt_runtime.MissingDependencyError as error:
    print(error)
"""
    done = run_python(program, bundle)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "pip install onnxruntime, or for CUDA 'onnxruntime-gpu[cuda,cudnn]'" in done.stdout


def test_importing_does_not_load_onnxruntime():
    done = run_python("import sys, echoatt_runtime; print('onnxruntime' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
