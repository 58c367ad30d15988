"""`echoatt generate BUNDLE PROMPT`: stream text from a bundle; never needs torch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from echoatt_runtime import EchoModel, OptionError, SamplingParams
from echoatt_runtime.errors import one_line

HELP = "stream text from a bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle's .onnx file or directory")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue")
    parser.add_argument(
        "--chat", action="store_true", help="send the prompt as a user's message, by the template"
    )
    parser.add_argument(
        "--tools", metavar="FILE", help="with --chat: what the model may call, a JSON list"
    )
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="with --chat: further arguments of the template, '{\"enable_thinking\": false}'",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads (default: ONNX Runtime's choice)")
    defaults = SamplingParams()
    for option, kind, meaning in (
        ("max-new-tokens", int, "most tokens to generate"),
        ("temperature", float, "0 is greedy"),
        ("top-k", int, "keep the k most probable tokens; 0 keeps all"),
        ("top-p", float, "keep the most probable tokens up to this mass"),
        ("min-p", float, "keep tokens this fraction as probable as the best"),
        ("repetition-penalty", float, "above 1 makes tokens seen before less likely"),
        ("seed", int, "makes a draw repeatable"),
    ):
        default = getattr(defaults, option.replace("-", "_"))
        parser.add_argument(
            f"--{option}", type=kind, default=default, help=f"{meaning} (default {default})"
        )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeatable"
    )
    parser.add_argument("--stats", action="store_true", help="print counts and speed on stderr")


def run(arguments: argparse.Namespace) -> int:
    """Generate, and print the text as it comes."""
    params = SamplingParams(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        stop=arguments.stop,
    )
    options = _template_options(arguments)
    model = EchoModel.load(arguments.bundle, device=arguments.device, threads=arguments.threads)
    chat = [{"role": "user", "content": arguments.prompt}]
    result = None
    for piece in model.stream(chat if arguments.chat else arguments.prompt, params, **options):
        sys.stdout.write(piece.text)
        sys.stdout.flush()
        result = piece.result
    sys.stdout.write("\n")
    if arguments.stats and result is not None:
        timings = result.timings
        print(
            f"{result.prompt_tokens} prompt tokens, {result.new_tokens} new"
            f" ({result.finish_reason}); first after {timings.time_to_first_token * 1e3:.0f} ms,"
            f" then {timings.decode_tokens_per_second:.1f} tokens/s",
            file=sys.stderr,
        )
    return 0


def _template_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is handed to the chat template."""
    options: dict[str, Any] = {}
    if arguments.tools is not None:
        try:
            text = Path(arguments.tools).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise OptionError(f"--tools {arguments.tools} cannot be read ({error})") from error
        options["tools"] = _read_json(text, f"--tools {arguments.tools}")
    if arguments.chat_template_kwargs is not None:
        text = arguments.chat_template_kwargs
        options["chat_template_kwargs"] = _read_json(text, "--chat-template-kwargs")
    return options


def _read_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{name} is not JSON ({one_line(error)})") from error
