import itertools

import numpy as np
import pytest
from tests.wording import says

from echoatt_runtime import NumericalError, SamplingError, SamplingParams
from echoatt_runtime.sampling import (
    Sampler,
    apply_repetition_penalty,
    apply_temperature,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sample,
)

INF = np.inf


def row(*logits):
    return np.array(logits, np.float32)


def log_row(*probabilities):
    return np.log(np.array(probabilities, np.float32))


def kept(logits):
    return np.flatnonzero(logits > -INF).tolist()


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = row(2, -2, 1, 0, -1)
    penalised = apply_repetition_penalty(logits, np.array([0, 1, 1, 3]), 2.0)
    assert penalised.tolist() == [1, -4, 1, 0, -1]
    assert logits.tolist() == [2, -2, 1, 0, -1]


def test_temperature_divides_distances_from_the_largest():
    assert apply_temperature(row(1, -2, 0), 0.5).tolist() == [0, -6, -2]
    assert apply_temperature(row(1, -INF, 0), 2).tolist() == [0, -INF, -0.5]


def test_top_k_keeps_the_largest_and_their_equals():
    assert keep_top_k(row(1, 3, 2, 3, 0), 2).tolist() == [-INF, 3, -INF, 3, -INF]
    assert kept(keep_top_k(row(1, 3, 2, 3, 0), 1)) == [1, 3]
    assert kept(keep_top_k(row(1, 3), 5)) == [0, 1]


@pytest.mark.parametrize(
    ("top_p", "tokens"),
    [(0.05, [2]), (0.49, [2]), (0.51, [1, 2]), (0.79, [1, 2]), (0.9, [0, 1, 2])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(top_p, tokens):
    # Sorted: 0.5, 0.3, 0.15, 0.05; running mass: 0.5, 0.8, 0.95, 1.
    assert kept(keep_top_p(log_row(0.15, 0.3, 0.5, 0.05), top_p)) == tokens


def test_top_p_prefers_lower_tokens_among_equals():
    assert kept(keep_top_p(log_row(0.25, 0.25, 0.25, 0.25), 0.4)) == [0, 1]


def test_top_p_ignores_tokens_already_removed():
    logits = log_row(0.4, 0.3, 0.2, 0.1)
    logits[0] = -INF
    # The rest is 0.3, 0.2, 0.1 of 0.6: the first is half of it.
    assert kept(keep_top_p(logits, 0.49)) == [1]
    assert kept(keep_top_p(logits, 0.51)) == [1, 2]


def test_top_p_looks_beyond_its_first_guess():
    logits = np.zeros(4000, np.float32)
    logits[0] = 12  # far above the rest, and yet only about 0.976 of e^12 + 3999
    share = np.exp(12) / (np.exp(12) + 3999)
    assert kept(keep_top_p(logits, share - 0.01)) == [0]
    assert len(kept(keep_top_p(logits, share + 0.01))) > 1


@pytest.mark.parametrize(("min_p", "tokens"), [(0.05, [0, 1, 2, 3]), (0.25, [0, 1, 2]), (0.9, [2])])
def test_min_p_is_relative_to_the_most_probable(min_p, tokens):
    assert kept(keep_min_p(log_row(0.15, 0.3, 0.5, 0.05), min_p)) == tokens


def test_sample_draws_with_the_probabilities():
    logits = log_row(0.1, 0.6, 0.3)
    generator = np.random.default_rng(0)
    drawn = np.bincount([sample(logits, generator) for _ in range(20_000)], minlength=3) / 20_000
    # Five standard deviations of the worst of three shares.
    assert np.abs(drawn - [0.1, 0.6, 0.3]).max() < 5 * np.sqrt(0.25 / 20_000)


class FixedGenerator:
    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


@pytest.mark.parametrize(
    ("number", "token"), [(0.0, 1), (0.19, 1), (0.21, 3), (0.69, 3), (0.71, 4), (1.0, 4)]
)
def test_sample_inverts_the_distribution(number, token):
    # Running mass over tokens 1, 3, 4: 0.2, 0.7, 1. Token 5 has none to draw.
    logits = row(-INF, *np.log([0.2]), -INF, *np.log([0.5, 0.3]), -INF)
    assert sample(logits, FixedGenerator(number)) == token


def test_sample_finds_tokens_in_every_block():
    logits = np.zeros(3000, np.float32)
    for token in (0, 511, 512, 1700, 2999):
        assert sample(logits, FixedGenerator((token + 0.5) / 3000)) == token


@pytest.mark.parametrize("seed", range(3))
def test_filters_agree_with_transformers(seed):
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    generator = np.random.default_rng(seed)
    logits = (generator.normal(size=2000) * 4).astype(np.float32)
    tokens = generator.integers(0, 2000, 300)
    pairs = [
        (processors.RepetitionPenaltyLogitsProcessor(1.3), apply_repetition_penalty, (tokens, 1.3)),
        (processors.TemperatureLogitsWarper(0.7), apply_temperature, (0.7,)),
        (processors.TopKLogitsWarper(50), keep_top_k, (50,)),
        (processors.TopPLogitsWarper(0.9), keep_top_p, (0.9,)),
        (processors.MinPLogitsWarper(0.05), keep_min_p, (0.05,)),
    ]

    def check(ours, theirs):
        # our temperature makes the largest logit 0, which changes no probability
        ours, theirs = ours - ours.max(), theirs - theirs.max()
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-5)

    # Each on the raw logits, and all in a row on what the one before left.
    theirs, ours = torch.tensor(logits)[None], logits
    for processor, function, arguments in pairs:
        alone = processor(torch.tensor(tokens)[None], torch.tensor(logits)[None])[0].numpy()
        check(function(logits, *arguments), alone)
        theirs = processor(torch.tensor(tokens)[None], theirs)
        ours = function(ours, *arguments)
        check(ours, theirs[0].numpy())


FILTERS = [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 3, "top_p": 0.9}]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-39, 1e-38, 1e-20, 1e-8])
def test_a_tiny_temperature_takes_the_most_probable_token(temperature, filters):
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0, **filters))
    for logits, best in [(row(1, 5, -3, 4.999), 1), (row(-1e6, -INF, -40, -41), 2)]:
        assert {sampler(logits, np.array([0])) for _ in range(50)} == {best}


def test_equals_stay_equal_at_a_tiny_temperature():
    sampler = Sampler(SamplingParams(temperature=1e-39, seed=0, top_p=0.9))
    assert {sampler(row(1, 5, 5, 4), np.array([0])) for _ in range(50)} == {1, 2}


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e45, 1e308])
def test_a_large_temperature_draws_evenly_from_what_filters_keep(temperature):
    for filters, allowed in [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.5}, {1, 3}),
        ({"min_p": 1}, {1}),
    ]:
        sampler = Sampler(SamplingParams(temperature=temperature, seed=0, **filters))
        drawn = [sampler(row(1, 5, -3, 4), np.array([0])) for _ in range(200)]
        assert set(drawn) == allowed
        assert min(drawn.count(token) for token in allowed) > 25


@pytest.mark.parametrize("penalty", [1e-45, 1e-39, 1e39, 1e308])
def test_a_huge_penalty_leaves_numbers(penalty):
    penalised = apply_repetition_penalty(row(2, -2, 0, 1), np.array([0, 1, 2]), penalty)
    assert np.isfinite(penalised).all()
    assert (penalised[0] > penalised[3]) == (penalty < 1)


ENDS = {
    "temperature": [5e-324, 1e-38, 1.0, 1e308],
    "top_k": [0, 2**70],
    "top_p": [5e-324, 1 - 1e-16, 1],
    "min_p": [0, 5e-324, 1],
    "repetition_penalty": [5e-324, 1e-39, 1, 1e39, 1.7e308],
}
LARGEST = float(np.finfo(np.float32).max)
ROWS = [
    row(1, 5, -3, 4.999),
    row(-1, -5, -3, -0.999),
    row(LARGEST, -LARGEST, 0, 1),
    row(*[-LARGEST] * 4),
    row(*[LARGEST] * 4),
    row(1e-38, -1e-38, 1e-45, 0),
    row(-INF, -INF, 3, -INF),
]


@pytest.mark.parametrize("seen", [[0], [1, 1, 3], [0, 1, 2, 3]], ids=str)
def test_all_ends_at_once_take_a_possible_token(seen):
    """Whatever numpy has been told to do about rounding; at a tiny temperature the best of all."""
    context = np.array(seen)
    with np.errstate(all="raise"):
        for values in itertools.product(*ENDS.values()):
            params = SamplingParams(seed=0, **dict(zip(ENDS, values, strict=True)))
            for logits in ROWS:
                token = Sampler(params)(logits, context)
                assert logits[token] > -INF
                if params.temperature > 1e-38 or np.abs(logits[logits > -INF]).max() > 100:
                    continue
                exact = logits.astype(np.longdouble)
                factor = np.longdouble(params.repetition_penalty)
                with np.errstate(all="ignore"):
                    exact[context] = np.where(
                        exact[context] < 0, exact[context] * factor, exact[context] / factor
                    )
                # What is as near to the best as float32 can tell, or to zero, equals it
                assert exact[token] >= exact.max() - abs(exact.max()) * 1e-6 - 1e-29


def test_default_is_greedy():
    sampler = Sampler(SamplingParams())
    assert sampler(row(0, 5, 5, 1), np.array([0])) == 1


def test_repetition_penalty_applies_to_greedy_too():
    sampler = Sampler(SamplingParams(repetition_penalty=3.0))
    assert sampler(row(2, 5, 4), np.array([1])) == 2


def test_seeded_samplers_repeat_and_differ_by_seed():
    logits = np.zeros(1000, np.float32)
    context = np.array([0])

    def draws(seed):
        sampler = Sampler(SamplingParams(temperature=1, seed=seed))
        return [sampler(logits, context) for _ in range(8)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}, {"min_p": 0.05}], ids=str)
@pytest.mark.parametrize("vocabulary", [70, 3000])
def test_the_most_probable_tokens_are_chosen_among_as_all_are(filters, vocabulary):
    generator = np.random.default_rng(vocabulary)
    params = SamplingParams(temperature=0.9, top_k=40, seed=1, **filters)
    whole, among = Sampler(params), Sampler(params)
    for _ in range(50):
        logits = generator.normal(0, 2, vocabulary).astype(np.float32)
        # As a device gives them, with some more
        top = np.argsort(-logits)[: params.enough + 5]
        assert among.among(top, logits[top]) == whole(logits, np.array([0]))


@pytest.mark.parametrize(
    ("changes", "enough"),
    [
        ({}, 1),
        ({"top_k": 7}, 1),
        ({"temperature": 1, "top_k": 7}, 7),
        ({"temperature": 1}, 0),
        ({"repetition_penalty": 1.1}, 0),
    ],
)
def test_how_many_tokens_are_enough(changes, enough):
    assert SamplingParams(**changes).enough == enough


def test_a_low_temperature_with_filters_draws_only_what_they_keep():
    logits = log_row(0.4, 0.3, 0.2, 0.1)
    context = np.array([0])
    for changes, allowed in [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.65}, {0, 1}),
        ({"min_p": 0.6}, {0, 1}),
        ({"top_k": 3, "top_p": 0.4}, {0}),
    ]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=0, **changes))
        assert {sampler(logits, context) for _ in range(200)} == allowed


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad, temperature):
    sampler = Sampler(SamplingParams(temperature=temperature))
    with pytest.raises(NumericalError, match="not finite"):
        sampler(row(1, bad, 2), np.array([0]))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, not a number at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": np.True_}, "temperature is np.True_"),
        ({"temperature": np.float32(-1)}, "temperature is np.float32(-1.0)"),
        ({"temperature": 10**400}, f"temperature is {10**400}, not a number"),
        ({"top_k": -1}, "top_k is -1, not an integer of at least 0"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_k": np.True_}, "top_k is np.True_"),
        ({"top_k": np.float32(5)}, "top_k is np.float32(5.0)"),
        ({"top_p": 0}, "top_p is 0, not a number above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": 1.1}, "min_p is 1.1, not a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, not a number above 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, not an integer of at least 1"),
        ({"stop": [""]}, "stop is ('',)"),
        ({"stop": [3]}, "stop is (3,)"),
        ({"stop": None}, "stop is (None,)"),
        ({"stop_token_ids": "x"}, "stop_token_ids is 'x'"),
        ({"stop_token_ids": [-2]}, "stop_token_ids is -2"),
    ],
)
def test_parameters_out_of_range_are_named(changes, fault):
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**changes)
    assert says(str(caught.value), fault)


def test_all_faults_are_told_at_once():
    with pytest.raises(
        SamplingError, match=r"temperature is -1,.*top_p is 2,.*max_new_tokens is 0,"
    ):
        SamplingParams(temperature=-1, top_p=2, max_new_tokens=0)


def test_a_single_stop_string_is_not_taken_apart():
    assert SamplingParams(stop="END").stop == ("END",)


def test_numpy_numbers_are_kept_as_pythons_own():
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(5),
        top_p=np.float16(0.5),
        min_p=np.int32(0),
        repetition_penalty=np.float64(1.5),
        seed=np.uint8(7),
        max_new_tokens=np.int32(3),
        stop_token_ids=[np.int64(2), 3],
    )
    expected = SamplingParams(
        temperature=0.5,
        top_k=5,
        top_p=0.5,
        repetition_penalty=1.5,
        seed=7,
        max_new_tokens=3,
        stop_token_ids=(2, 3),
    )
    assert params == expected
    assert repr(params) == repr(expected)
