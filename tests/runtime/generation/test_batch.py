import numpy as np
import pytest
from tests.runtime.conftest import TinyDecoder

from echoatt_runtime import ContextOverflowError, NumericalError, PromptError, SamplingParams
from echoatt_runtime.executor import open_executor
from echoatt_runtime.generation import Batch, TokenSequence, generate

GENERATOR = np.random.default_rng(3)
# Lengths on both sides of chunks and buckets.
PROMPTS = [[int(t) for t in GENERATOR.integers(0, 256, n)] for n in (1, 300, 5, 64, 256)]
LONG_TAIL = PROMPTS[2]


def sequences_of(executor, prompts, params):
    """A sequence for each prompt, with parameters for all or one each."""
    each = params if isinstance(params, list) else [params] * len(prompts)
    return [
        TokenSequence(prompt, own, executor.specification, None)
        for prompt, own in zip(prompts, each, strict=True)
    ]


def results_of(sequences):
    """New tokens and finish reasons."""
    return (
        [list(sequence.result.token_ids) for sequence in sequences],
        [sequence.result.finish_reason for sequence in sequences],
    )


def tokens_of(executor, prompts, params, chunk_size=64):
    sequences = sequences_of(executor, prompts, params)
    for sequence, piece in generate(executor, sequences, chunk_size):
        assert sequence.finished == (piece.finish_reason is not None)
    return results_of(sequences)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 300, 512])
def test_prefill_in_any_chunks_equals_the_whole_computation(executor, decoder, chunk_size):
    prompts = PROMPTS if chunk_size > 1 else PROMPTS[2:4]
    sequences = sequences_of(executor, prompts, SamplingParams(max_new_tokens=2, ignore_eos=True))
    batch = Batch(executor, len(prompts), chunk_size)
    batch.join(sequences)
    assert batch.cache.capacity == (304 if chunk_size > 1 else 80)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert sequence.last_token == decoder.logits(prompt)[-1].argmax()


def test_rows_that_a_device_cuts_to_the_most_probable_tokens_draw_the_same(
    make_bundle, make_specification, executor, monkeypatch
):
    device = open_executor(make_bundle(make_specification(device="cuda")), foreign=True)
    monkeypatch.setattr(type(device), "most_top", 64)
    cut = []
    top = type(device).top
    monkeypatch.setattr(
        type(device), "top", lambda self, *a, **k: cut.append(top(self, *a, **k)) or cut[-1]
    )
    common = {"max_new_tokens": 12, "ignore_eos": True}
    params = [
        SamplingParams(temperature=1.2, seed=row, top_k=k, top_p=0.9, **common)
        for row, k in enumerate((1, 20, 64))
    ]
    params += [SamplingParams(**common)]
    found = tokens_of(device, PROMPTS[:4], params)
    assert [top.token_ids.shape for top in cut] == [(4, 65)] * 11
    monkeypatch.undo()
    assert found == tokens_of(executor, PROMPTS[:4], params)


def test_greedy_tokens_equal_the_whole_computation(executor, decoder):
    rows, _ = tokens_of(executor, [LONG_TAIL], SamplingParams(max_new_tokens=40, ignore_eos=True))
    assert rows[0] == decoder.greedy(LONG_TAIL, 40)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=12),
        SamplingParams(max_new_tokens=12, temperature=1.2, seed=5),
        SamplingParams(max_new_tokens=12, temperature=0.9, top_k=20, top_p=0.9, seed=1),
        SamplingParams(max_new_tokens=12, repetition_penalty=1.5),
    ],
)
def test_a_batch_gives_what_its_prompts_give_alone(executor, params):
    together, reasons = tokens_of(executor, PROMPTS, params)
    for prompt, row, reason in zip(PROMPTS, together, reasons, strict=True):
        assert tokens_of(executor, [prompt], params) == ([row], [reason])


def test_rows_finish_at_their_own_time(executor, decoder):
    # Each row has its own end: a token that only its own greedy text reaches, at its own place.
    texts = [decoder.greedy(prompt, 20) for prompt in PROMPTS[2:4]]
    stop = next(token for token in texts[0] if token not in texts[1])
    params = SamplingParams(max_new_tokens=20, stop_token_ids=[stop], ignore_eos=True)
    rows, reasons = tokens_of(executor, PROMPTS[2:4], params)
    assert rows == [texts[0][: texts[0].index(stop) + 1], texts[1]]
    assert reasons == ["stop", "length"]


def test_finished_rows_leave_the_work(executor, decoder, monkeypatch):
    texts = [decoder.greedy(prompt, 6) for prompt in PROMPTS[2:4]]
    stop = next(token for token in texts[0] if token not in texts[1])
    batches, run = [], executor.session.run

    def counted(binding):
        batches.append(len(batch.rows))
        run(binding)

    monkeypatch.setattr(executor.session, "run", counted)
    params = SamplingParams(max_new_tokens=6, stop_token_ids=[stop], ignore_eos=True)
    batch = Batch(executor, 2)
    batch.join(sequences_of(executor, PROMPTS[2:4], params))
    while batch.rows:
        batch.step()
    both = texts[0].index(stop) + 1
    assert batches[1:] == [2] * (both - 1) + [1] * (6 - both)


def test_rows_that_leave_early_do_not_disturb_the_rest(executor):
    # Draws at a high temperature show what greedy text may hide: a single lost cache entry.
    params = SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=2.0, seed=0)
    prompts = PROMPTS[:4]
    alone = [tokens_of(executor, [prompt], params)[0][0] for prompt in prompts]
    sequences = sequences_of(executor, prompts, params)
    batch = Batch(executor, 4)
    batch.join(sequences)
    for leaving in (1, 3):  # the first slot, and one out of the middle
        batch.step()
        batch.leave(sequences[leaving])
    while batch.rows:
        batch.step()
    assert batch.step() == []
    for index in (0, 2):
        assert list(sequences[index].result.token_ids) == alone[index]
    assert not sequences[1].finished


def test_rows_join_others_at_work(executor):
    params = [
        SamplingParams(max_new_tokens=new, ignore_eos=True, temperature=1.5, seed=new)
        for new in (9, 30, 12, 20, 5)
    ]
    alone = [tokens_of(executor, [p], own)[0][0] for p, own in zip(PROMPTS, params, strict=True)]
    sequences = sequences_of(executor, PROMPTS, params)
    batch = Batch(executor, 3, prefill_chunk=64)
    waiting = list(sequences)
    while batch.rows or waiting:
        # Two more as soon as there is room: a short one beside a long one's growing cache
        if waiting and len(batch.rows) < 3:
            joining = [waiting.pop(0) for _ in range(min(3 - len(batch.rows), len(waiting)))]
            batch.join(joining)
        batch.step()
    assert [list(sequence.result.token_ids) for sequence in sequences] == alone


def test_who_leaves_moves_one_row_and_copies_no_other(executor, monkeypatch):
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    sequences = sequences_of(executor, [PROMPTS[2]] * 4, params)
    batch = Batch(executor, 4)
    batch.join(sequences)
    moves, layout = [], batch.cache.layout
    move = batch.cache.move
    monkeypatch.setattr(batch.cache, "move", lambda *where: moves.append(where) or move(*where))
    batch.leave(batch.rows[3])
    assert moves == []
    batch.leave(batch.rows[0])
    assert moves == [(2, 0, 5)]
    assert batch.cache.layout == layout


def test_a_short_row_does_not_pay_for_a_long_one_that_has_left(executor, decoder):
    short, long = PROMPTS[2], (PROMPTS[1] * 2)[:560]
    sequences = sequences_of(
        executor,
        [short, long],
        [
            SamplingParams(max_new_tokens=20, ignore_eos=True),
            SamplingParams(max_new_tokens=3, ignore_eos=True),
        ],
    )
    batch = Batch(executor, 2)
    batch.join(sequences)
    assert batch.cache.capacity == 576
    while not sequences[1].finished:
        batch.step()
    assert batch.cache.capacity == 32
    while batch.rows:
        batch.step()
    assert list(sequences[0].result.token_ids) == decoder.greedy(short, 20)
    assert list(sequences[1].result.token_ids) == decoder.greedy(long, 3)


def test_a_batch_goes_on_from_a_cache_that_holds_its_tokens(executor, decoder):
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    first = sequences_of(executor, [PROMPTS[3]], SamplingParams(max_new_tokens=1))
    batch = Batch(executor, 1)
    batch.join(first)
    again = sequences_of(executor, [PROMPTS[3]], params)
    resumed = Batch.resume(executor, batch.cache, again)
    while resumed.rows:
        resumed.step()
    assert list(again[0].result.token_ids) == decoder.greedy(PROMPTS[3], 8)


def test_the_models_end_token_stops_and_may_be_ignored(make_bundle, make_specification, decoder):
    text = decoder.greedy(LONG_TAIL, 8)
    end = text[5]
    executor = open_executor(make_bundle(make_specification(eos_token_ids=(end,))), threads=1)
    place = text.index(end)
    assert tokens_of(executor, [LONG_TAIL], SamplingParams(max_new_tokens=8)) == (
        [text[: place + 1]],
        ["stop"],
    )
    ignoring = SamplingParams(max_new_tokens=8, ignore_eos=True)
    assert tokens_of(executor, [LONG_TAIL], ignoring) == ([text], ["length"])


def test_generation_ends_with_the_context(executor, decoder):
    # The context holds 600 tokens: of the long prompt and of 5, which ends much later.
    params = SamplingParams(max_new_tokens=1000, ignore_eos=True)
    long_prompt = (PROMPTS[1] * 2)[:590]
    rows, reasons = tokens_of(executor, [long_prompt, PROMPTS[1]], params)
    assert [len(row) for row in rows] == [10, 300]
    assert reasons == ["length", "length"]
    assert rows[0] == decoder.greedy(long_prompt, 10)


def test_the_last_place_of_the_context_can_be_used(executor):
    prompt = (PROMPTS[1] * 2)[:599]
    rows, reasons = tokens_of(executor, [prompt], SamplingParams(ignore_eos=True))
    assert (len(rows[0]), reasons) == (1, ["length"])
    with pytest.raises(ContextOverflowError, match="the prompt has 600 tokens and the context"):
        sequences_of(executor, [prompt, [*prompt, 1]], SamplingParams())


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ([], "the prompt has no tokens"),
        ([1, 258], "the prompt has token 258, outside the vocabulary of 258"),
        ([-1], "the prompt has token -1, outside"),
    ],
)
def test_prompts_that_cannot_run(executor, prompt, fault):
    with pytest.raises(PromptError, match=fault):
        sequences_of(executor, [prompt], SamplingParams())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_fails_ends_alone(make_bundle, executor, temperature):
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, temperature=temperature, seed=1)
    prompts = [PROMPTS[3][at : at + 4] for at in (0, 4, 8, 12)]
    whole = tokens_of(executor, prompts, params)[0]
    # A token that no row but the second has, and it after two of its own; and one of a prompt
    fatal = next(t for t in whole[1][1:] if not any(t in row for row in (*prompts, *whole[2:])))
    place = whole[1].index(fatal)
    embedding = TinyDecoder.random(executor.specification).weights["embedding"].copy()
    embedding[[fatal, prompts[0][3]]] = np.nan
    failing = open_executor(make_bundle(weights={"embedding": embedding}), threads=1)
    sequences = sequences_of(failing, prompts, params)
    for _ in generate(failing, sequences):
        pass
    tokens, reasons = results_of(sequences)
    assert reasons == ["error", "error", "length", "length"]
    assert tokens == [[], whole[1][: place + 1], whole[2], whole[3]]
    for sequence in sequences:
        assert isinstance(sequence.result.error, NumericalError | None)
    assert "after 4 tokens are not finite" in str(sequences[0].result.error)


def test_a_slot_is_clean_for_whoever_comes_after_a_failure(make_bundle, executor, decoder):
    """Masked probabilities are zero, and zero times what is not a number is none either."""
    # So many that the memory is not laid out anew, which would clean it too
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    embedding = decoder.weights["embedding"].copy()
    embedding[7] = np.nan
    failing = open_executor(make_bundle(weights={"embedding": embedding}), threads=1)
    batch = Batch(failing, 2)
    sequences = sequences_of(failing, [[*PROMPTS[3][:20], 7], PROMPTS[2], PROMPTS[4][:4]], params)
    batch.join(sequences[:2])
    assert batch.rows == sequences[1:2]  # and it took the first slot
    batch.join(sequences[2:])
    while batch.rows:
        batch.step()
    for sequence, prompt in zip(sequences[1:], (PROMPTS[2], PROMPTS[4][:4]), strict=True):
        assert list(sequence.result.token_ids) == decoder.greedy(prompt, 100)
