import numpy as np
import pytest

from echoatt_runtime import ContextOverflowError, NumericalError, PromptError, SamplingParams
from echoatt_runtime.executor.session import open_session
from echoatt_runtime.generate import BatchDecoder, iter_chunks, prefill

GENERATOR = np.random.default_rng(3)
# Lengths on both sides of chunks and buckets.
PROMPTS = [[int(t) for t in GENERATOR.integers(0, 256, n)] for n in (1, 300, 5, 64, 256)]
LONG_TAIL = PROMPTS[2]


def tokens_of(session, prompts, params, chunk_size=64):
    decoder = BatchDecoder(session, prompts, params, chunk_size)
    rows = [[] for _ in prompts]
    reasons = [None] * len(prompts)
    while steps := decoder.step():
        for step in steps:
            assert reasons[step.row] is None, "a finished row went on"
            rows[step.row].append(step.token_id)
            reasons[step.row] = step.finish_reason
    return rows, reasons


def test_chunks_cut_and_pad():
    chunks = list(iter_chunks([[1, 2, 3, 4, 5], [6], [7, 8, 9]], 2))
    assert [chunk.token_ids.tolist() for chunk in chunks] == [
        [[1, 2], [6, 0], [7, 8]],
        [[3, 4], [0, 0], [9, 0]],
        [[5], [0], [0]],
    ]
    assert [chunk.past_lengths.tolist() for chunk in chunks] == [[0, 0, 0], [2, 1, 2], [4, 1, 3]]
    assert [chunk.lengths.tolist() for chunk in chunks] == [[2, 1, 2], [2, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 300, 512])
def test_prefill_in_any_chunks_equals_the_whole_computation(session, decoder, chunk_size):
    prompts = PROMPTS if chunk_size > 1 else PROMPTS[2:4]
    cache, logits = prefill(session, prompts, 300, chunk_size)
    assert cache.capacity == (304 if chunk_size > 1 else 272)
    for prompt, logits_V in zip(prompts, logits, strict=True):
        np.testing.assert_allclose(logits_V, decoder.logits(prompt)[-1], atol=1e-4)


def test_greedy_tokens_equal_the_whole_computation(session, decoder):
    rows, _ = tokens_of(session, [LONG_TAIL], SamplingParams(max_new_tokens=40, ignore_eos=True))
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
def test_a_batch_gives_what_its_prompts_give_alone(session, params):
    together, reasons = tokens_of(session, PROMPTS, params)
    for prompt, row, reason in zip(PROMPTS, together, reasons, strict=True):
        assert tokens_of(session, [prompt], params) == ([row], [reason])


def test_rows_finish_at_their_own_time(session, decoder):
    # Each row has its own end: a token that only its own greedy text reaches, at its own place.
    texts = [decoder.greedy(prompt, 20) for prompt in PROMPTS[2:4]]
    stop = next(token for token in texts[0] if token not in texts[1])
    params = SamplingParams(max_new_tokens=20, stop_token_ids=[stop], ignore_eos=True)
    rows, reasons = tokens_of(session, PROMPTS[2:4], params)
    assert rows == [texts[0][: texts[0].index(stop) + 1], texts[1]]
    assert reasons == ["stop", "length"]


def test_finished_rows_leave_the_work(session, decoder, monkeypatch):
    texts = [decoder.greedy(prompt, 6) for prompt in PROMPTS[2:4]]
    stop = next(token for token in texts[0] if token not in texts[1])
    batches = []
    run = session.run
    monkeypatch.setattr(
        session, "run", lambda cache, ids, *rest: batches.append(len(ids)) or run(cache, ids, *rest)
    )
    params = SamplingParams(max_new_tokens=6, stop_token_ids=[stop], ignore_eos=True)
    tokens_of(session, PROMPTS[2:4], params)
    both = texts[0].index(stop) + 1
    assert batches == [2] * both + [1] * (6 - both)


def test_dropped_rows_leave_and_the_rest_goes_on(session):
    # Draws at a high temperature show what greedy text may hide: a single lost cache entry.
    params = SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=2.0, seed=0)
    alone, _ = tokens_of(session, PROMPTS[2:3], params)
    decoder = BatchDecoder(session, [PROMPTS[0], PROMPTS[2]], params)
    decoder.step()
    decoder.drop(0)
    rest = [decoder.step() for _ in range(19)]
    assert [[step.row for step in steps] for steps in rest] == [[1]] * 19
    assert [steps[0].token_id for steps in rest] == alone[0][1:]
    assert decoder.step() == []


def test_the_models_end_token_stops_and_may_be_ignored(make_bundle, decoder):
    text = decoder.greedy(LONG_TAIL, 8)
    end = text[5]
    session = open_session(make_bundle(eos_token_ids=(end,)), threads=1)
    place = text.index(end)
    assert tokens_of(session, [LONG_TAIL], SamplingParams(max_new_tokens=8)) == (
        [text[: place + 1]],
        ["stop"],
    )
    ignoring = SamplingParams(max_new_tokens=8, ignore_eos=True)
    assert tokens_of(session, [LONG_TAIL], ignoring) == ([text], ["length"])


def test_generation_ends_with_the_context(session, decoder):
    # The context holds 600 tokens: of the long prompt and of 5, which ends much later.
    params = SamplingParams(max_new_tokens=1000, ignore_eos=True)
    long_prompt = (PROMPTS[1] * 2)[:590]
    rows, reasons = tokens_of(session, [long_prompt, PROMPTS[1]], params)
    assert [len(row) for row in rows] == [10, 300]
    assert reasons == ["length", "length"]
    assert rows[0] == decoder.greedy(long_prompt, 10)


def test_the_last_place_of_the_context_can_be_used(session):
    prompt = (PROMPTS[1] * 2)[:599]
    rows, reasons = tokens_of(session, [prompt], SamplingParams(ignore_eos=True))
    assert (len(rows[0]), reasons) == (1, ["length"])
    with pytest.raises(ContextOverflowError, match="prompt 1 has 600 tokens and the context holds"):
        BatchDecoder(session, [prompt, [*prompt, 1]], SamplingParams())


@pytest.mark.parametrize(
    ("prompts", "fault"),
    [
        ([], "there are no prompts"),
        ([[1], []], "prompt 1 has no tokens"),
        ([[1, 258]], "prompt 0 has token 258, outside the vocabulary of 258"),
        ([[1], [-1]], "prompt 1 has token -1, outside"),
    ],
)
def test_prompts_that_cannot_run(session, prompts, fault):
    with pytest.raises(PromptError, match=fault):
        BatchDecoder(session, prompts, SamplingParams())


def test_overflowing_logits_are_an_error(make_bundle, decoder):
    head = decoder.weights["head"].copy()
    head[0, 0] = np.nan
    session = open_session(make_bundle(weights={"head": head}), threads=1)
    with pytest.raises(NumericalError, match="not finite"):
        BatchDecoder(session, [[1]], SamplingParams()).step()
