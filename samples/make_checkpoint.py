"""Trains the small checkpoint that the project ships as `samples/tiny-books`.

A byte-level BPE tokenizer and a Llama-architecture model are trained from scratch on plain text or
Markdown, on one CPU thread, and written as a Hugging Face directory with bfloat16 weights. The
shipped checkpoint comes from:

    python samples/make_checkpoint.py --text path/to/books/train/Arthur_Conan_Doyle_*.md \
        --valid path/to/books/valid/Arthur_Conan_Doyle_*Milverton.md --out samples/tiny-books

The same arguments, package versions and kind of processor give the same weights.
"""

from __future__ import annotations

import argparse
import math
import platform
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1  # the tokenizer's trainer numbers the special tokens first
CONTEXT_LENGTH = 512
# Old editions mix typographic and plain marks; folding them leaves the model fewer spellings.
PLAIN_MARKS = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--"}
)


def plain_text(markdown: str) -> str:
    """Return the running text of a Markdown book, one paragraph a line."""
    kept = []
    for line in markdown.translate(PLAIN_MARKS).splitlines():
        if line.startswith("#") or re.fullmatch(r"\s*([-*_]\s*){3,}", line):  # headings and rules
            continue
        unescaped = re.sub(r"\\([^\w\s])", r"\1", line)
        kept.append(" ".join(re.sub(r"[*_]", "", unescaped).split()))
    return "\n".join(line for line in kept if line)


def read_documents(paths: Sequence[Path]) -> list[str]:
    """Read every file of `paths` (of a directory, each .md and .txt in it) as plain text."""
    files: list[Path] = []
    for path in paths:
        inside = sorted(f for f in path.rglob("*") if f.suffix in {".md", ".txt"})
        files.extend(inside if path.is_dir() else [path])
    if not files:
        raise SystemExit(f"no .md or .txt file in {', '.join(map(str, paths))}")
    return [plain_text(file.read_text(encoding="utf-8")) for file in files]


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer that puts `<s>` before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into the directory `out`."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(out)


def token_stream(tokenizer: Tokenizer, documents: Sequence[str]) -> torch.Tensor:
    """Return the documents as one int64 [tokens] stream, `</s>` after each, no `<s>`."""
    encodings = tokenizer.encode_batch(documents, add_special_tokens=False)
    return torch.tensor([token for encoding in encodings for token in (*encoding.ids, EOS_ID)])


def training_batches(
    stream: torch.Tensor, batch: int, length: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield int64 [batch, length] windows for ever, each `<s>` and then running text.

    An epoch takes every window once, in random order; its windows start at a random offset.
    """
    generator = torch.Generator().manual_seed(seed)
    width = length - 1
    if len(stream) < (batch + 1) * width:
        raise SystemExit(f"the text's {len(stream):,} tokens do not fill one batch: give more text")
    while True:
        offset = int(torch.randint(width, (1,), generator=generator))
        count = (len(stream) - offset) // width
        windows = stream[offset : offset + count * width].view(count, width)
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch + 1, batch):
            text = windows[order[start : start + batch]]
            yield torch.cat([torch.full((batch, 1), BOS_ID), text], dim=1)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream: torch.Tensor, length: int) -> float:
    """Return the mean cross-entropy, nats a token, over consecutive windows of `stream`."""
    count = len(stream) // (length - 1)
    windows = stream[: count * (length - 1)].view(count, length - 1)
    rows = torch.cat([torch.full((count, 1), BOS_ID), windows], dim=1)
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in rows]
    return float(torch.stack(losses).mean())


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Return linear warm-up, then a cosine from 1 to 0.05, as a factor of the peak rate."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(
    model: LlamaForCausalLM, batches: Iterator[torch.Tensor], steps: int, peak_rate: float
) -> None:
    """Trains `model` in place for `steps` batches and prints the mean loss every 100."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.95))
    warmup = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, warmup)
    )
    started, recent = time.monotonic(), []
    for step in range(1, steps + 1):
        tokens = next(batches)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % 100 == 0 or step == steps:
            mean, seconds = sum(recent) / len(recent), time.monotonic() - started
            print(f"step {step:5d}  loss {mean:.4f}  {seconds:6.0f} s", flush=True)
            recent.clear()


def main() -> None:
    """Read the arguments, trains, saves, and reports the saved checkpoint's held-out loss."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="training text")
    parser.add_argument("--valid", type=Path, nargs="+", required=True, help="held-out text")
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=4, help="windows in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a training window")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)

    documents = read_documents(args.text)
    tokenizer = train_tokenizer(documents, args.vocab_size)
    stream = token_stream(tokenizer, documents)
    valid_documents = read_documents(args.valid)
    valid = token_stream(tokenizer, valid_documents)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = LlamaForCausalLM(config)
    print(f"{len(stream):,} training tokens, {model.num_parameters():,} parameters", flush=True)
    batches = training_batches(stream, args.batch, args.length, args.seed)
    train(model, batches, args.steps, args.lr)

    model.bfloat16().save_pretrained(args.out)
    save_tokenizer(tokenizer, args.out)
    # Loaded back, because the rounding to bfloat16 is part of what is shipped.
    saved = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    loss = mean_loss(saved, valid, args.length)
    nats = loss * len(valid)
    bits = nats / math.log(2) / sum(len(text.encode()) for text in valid_documents)
    print(f"held-out loss {loss:.4f} nats a token, {bits:.3f} bits a byte")
    print(f"Python {platform.python_version()}, torch {torch.__version__}", end="")
    print(f", transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")


if __name__ == "__main__":
    main()
