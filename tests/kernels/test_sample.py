"""sample against its reference; the reference against transformers' warpers and against chance."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from batchgen.kernels import cases, reference
from batchgen.kernels.cases import FILTERS, random_tensor
from batchgen.kernels.noise import next_noise_key, noise_bits, noise_key
from batchgen.kernels.reference import Filters
from batchgen.kernels.sample import sample

DTYPES = cases.dtypes_for("cuda" if torch.cuda.is_available() else "cpu")
SAMPLERS = [sample, reference.sample]


def few(sampler: object, device: str, few: int, many: int) -> int:
    """The number of draws: few where the interpreter runs the kernel."""
    return few if sampler is sample and device == "cpu" else many


def rows(batch: int, device: str) -> tuple[Tensor, Tensor]:
    """A seed and a position for each row, of all magnitudes."""
    seeds_B = torch.randint(0, 2**63 - 1, (batch,), generator=cases.generator("cpu", 5))
    positions_B = torch.arange(batch, dtype=torch.int32) * 37
    return seeds_B.to(device), positions_B.to(device)


def draw(
    sampler: object, logits_BV: Tensor, rows: tuple[Tensor, Tensor], filters: Filters
) -> Tensor:
    assert callable(sampler)
    return sampler(
        logits_BV,
        *rows,
        temperature=filters.temperature,
        top_k=filters.top_k,
        top_p=filters.top_p,
        min_p=filters.min_p,
    )


def kept_by_transformers(logits_BV: Tensor, filters: Filters) -> Tensor:
    """Mask of the tokens that generate() of transformers would draw from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(filters.temperature)])
    if filters.top_k > 0:
        warpers.append(TopKLogitsWarper(filters.top_k))
    if filters.top_p < 1.0:
        warpers.append(TopPLogitsWarper(filters.top_p))
    if filters.min_p > 0.0:
        warpers.append(MinPLogitsWarper(filters.min_p))
    ids = torch.zeros(len(logits_BV), 1, dtype=torch.long, device=logits_BV.device)
    return warpers(ids, logits_BV.double()) > -torch.inf


SAMPLING = [f for f in FILTERS if f.temperature > 0.0]


@pytest.mark.parametrize("filters", SAMPLING, ids=str)
@pytest.mark.parametrize("vocabulary", [50, 3001, 20_000])
def test_reference_keeps_what_transformers_keeps(
    vocabulary: int, filters: Filters, device: str
) -> None:
    # In fp64: near the bound of top_p, fp32 sums in another order keep other tokens.
    logits_BV = random_tensor(6, vocabulary, dtype=torch.float64, device=device, scale=3.0)
    expected = kept_by_transformers(logits_BV, filters)
    thresholds = torch.tensor(
        [reference.keep_thresholds(row, filters)[1] for row in logits_BV], device=device
    )
    assert torch.equal(logits_BV >= thresholds[:, None], expected)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["kernel", "reference"])
@pytest.mark.parametrize("filters", [f for f in SAMPLING if f != Filters()], ids=str)
def test_every_kept_token_is_drawn_and_no_other(
    sampler: object, filters: Filters, device: str
) -> None:
    """Low logits and a staircase: the tokens drawn are those that transformers keeps."""
    logits_V = torch.cat((torch.linspace(-10.0, -9.0, 84), torch.linspace(0.0, 2.5, 16)))
    order = torch.randperm(100, generator=cases.generator("cpu"))
    logits_V = logits_V[order].to(device)
    kept = kept_by_transformers(logits_V[None], filters)[0]
    batch = few(sampler, device, 8, 4000)
    tokens_B = draw(sampler, logits_V.expand(batch, -1), rows(batch, device), filters)
    drawn = torch.zeros(100, dtype=torch.bool, device=device)
    drawn[tokens_B] = True
    assert not bool((drawn & ~kept).any())
    if batch == 4000:
        likely = kept & (logits_V > -1.0)
        assert torch.equal(drawn & likely, likely)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 50, 10_001])
def test_sample(vocabulary: int, filters: Filters, dtype: torch.dtype, device: str) -> None:
    logits_BV = random_tensor(4, vocabulary, dtype=dtype, device=device, scale=3.0)
    settings = rows(4, device)
    tokens_B = draw(sample, logits_BV, settings, filters)
    assert tokens_B.dtype == torch.int64
    assert torch.equal(tokens_B, draw(reference.sample, logits_BV, settings, filters))


@pytest.mark.parametrize(
    ("filters", "scale"),
    [
        (Filters(temperature=0.0), 1.0),
        (Filters(temperature=0.8), 1.0),
        (Filters(top_k=50), 0.0),
        (Filters(top_k=50), 4.0),
        (Filters(top_p=0.95), 1.0),
        (Filters(top_p=0.95), 4.0),
        (Filters(top_k=3000, top_p=0.95, min_p=0.001), 1.0),
    ],
    ids=str,
)
def test_sample_of_a_large_vocabulary(filters: Filters, scale: float, device: str) -> None:
    """Flat logits, for which every tile counts, and peaked ones, for which few do."""
    logits_BV = random_tensor(2, 151_936, dtype=torch.float16, device=device, scale=scale)
    settings = rows(2, device)
    tokens_B = draw(sample, logits_BV, settings, filters)
    assert torch.equal(tokens_B, draw(reference.sample, logits_BV, settings, filters))


@triton.jit
def _noise_kernel(seeds_ptr, positions_ptr, out_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    key = noise_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    for _ in range(2):
        tl.store(out_ptr + row * BLOCK + lanes, noise_bits(key, lanes - BLOCK // 2))
        key = next_noise_key(key)
        out_ptr += tl.num_programs(0) * BLOCK


def test_noise_is_the_references_to_the_bit(device: str) -> None:
    """Of token ids and of tiles, in the first draw and in the second."""
    seeds_B, positions_B = rows(64, device)
    bits = torch.empty(2, 64, 1024, dtype=torch.int32, device=device)
    _noise_kernel[(64,)](seeds_B, positions_B, bits, BLOCK=1024)
    keys_B = reference.noise_keys(seeds_B, positions_B)
    counters = torch.arange(-512, 512, dtype=torch.int32, device=device)
    for drawn in bits:
        expected = reference.noise_bits(keys_B, counters)
        assert int(expected.min()) >= 0
        assert torch.equal(drawn, expected)
        keys_B = reference.next_noise_keys(keys_B)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["kernel", "reference"])
@pytest.mark.parametrize(
    "filters", [Filters(temperature=0.9), Filters(top_k=20), Filters(top_p=0.5)], ids=str
)
def test_a_row_is_drawn_the_same_in_any_batch(
    sampler: object, filters: Filters, device: str
) -> None:
    """Alone, in a larger batch, in another place, in a wider matrix."""
    row_V = random_tensor(1, 9000, dtype=torch.float32, device=device, scale=2.0)
    batch = few(sampler, device, 6, 40)
    seeds_B, positions_B = rows(batch, device)
    alone = [
        int(draw(sampler, row_V, (seeds_B[i : i + 1], positions_B[i : i + 1]), filters))
        for i in range(3)
    ]
    memory = torch.full((batch, 9500), 99.0, device=device)
    memory[:, 100:9100] = row_V
    in_batch = draw(sampler, memory[:, 100:9100], (seeds_B, positions_B), filters)
    assert in_batch[:3].tolist() == alone
    flipped = draw(sampler, memory[:, 100:9100], (seeds_B.flip(0), positions_B.flip(0)), filters)
    assert torch.equal(flipped.flip(0), in_batch)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["kernel", "reference"])
def test_greedy_takes_the_lowest_id_of_a_tie(sampler: object, device: str) -> None:
    logits_BV = torch.zeros(3, 7000, device=device)
    logits_BV[0, [17, 6000]] = 5.0
    logits_BV[1, [2048, 4096]] = 5.0
    logits_BV[2, 1:] = -1.0
    tokens_B = draw(sampler, logits_BV, rows(3, device), Filters(temperature=0.0))
    assert tokens_B.tolist() == [17, 2048, 0]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["kernel", "reference"])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_forbidden_token_is_never_drawn(sampler: object, filters: Filters, device: str) -> None:
    """-inf stays out, though a filter would keep more tokens than are allowed."""
    batch = few(sampler, device, 6, 64)
    logits_BV = torch.full((batch, 200), -torch.inf, device=device)
    logits_BV[:, [3, 199]] = 1.0
    tokens_B = draw(sampler, logits_BV, rows(batch, device), filters)
    assert set(tokens_B.tolist()) <= {3, 199}


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["kernel", "reference"])
def test_ties_at_the_threshold_are_kept(sampler: object, device: str) -> None:
    batch = few(sampler, device, 30, 400)
    logits_BV = torch.tensor([1.0, 0.0, -0.0, 0.0, -3.0], device=device).repeat(batch, 1)
    tokens_B = draw(sampler, logits_BV, rows(batch, device), Filters(top_k=2))
    assert set(tokens_B.tolist()) == {0, 1, 2, 3}


def chi_square_z(counts: Tensor, probabilities: Tensor) -> float:
    """How many standard deviations the chi-square statistic lies above its expectation."""
    expected = probabilities.double() * counts.sum()
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_fit_the_softmax(temperature: float, device: str) -> None:
    """Over seeds at one position, and over positions of one seed."""
    logits_V = random_tensor(40, dtype=torch.float32, device=device)
    probabilities = torch.softmax(logits_V / temperature, 0)
    count = 5000
    numbers = torch.arange(count, device=device)
    fixed = torch.full_like(numbers, 12345)
    sampler = sample if device == "cuda" else reference.sample
    for settings in ((numbers, fixed), (fixed, numbers)):
        tokens_B = draw(
            sampler,
            logits_V.expand(count, -1),
            settings,
            Filters(temperature=temperature),
        )
        counts = tokens_B.bincount(minlength=40)
        assert abs(chi_square_z(counts, probabilities)) < 5


@pytest.mark.parametrize(
    "filters",
    [
        Filters(temperature=0.8),
        Filters(temperature=1.5, top_k=9),
        Filters(temperature=0.8, top_p=0.4),
        Filters(temperature=1.2, top_p=0.7),
        Filters(temperature=1.2, min_p=0.2),
        Filters(temperature=1.1, top_k=12, top_p=0.5, min_p=0.1),
    ],
    ids=str,
)
def test_draws_fit_what_the_filters_leave(filters: Filters, device: str) -> None:
    """Peaks over three blocks of a hilly ground: tiles with several, with one, with none."""
    vocabulary, count = 20_000, 20_000 if device == "cuda" else 4000
    logits_V = random_tensor(vocabulary, dtype=torch.float32, device=device, scale=1.5)
    peaks = torch.tensor([0, 1, 2, 1024, 1025, 4000, 8191, 8192, 8200, 12_000, 19_999])
    logits_V[peaks.to(device)] = torch.linspace(8.0, 9.5, len(peaks), device=device)
    kept_V = kept_by_transformers(logits_V[None], filters)[0]
    scores_V = (logits_V.double() / filters.temperature).masked_fill(~kept_V, -torch.inf)
    probabilities_V = torch.softmax(scores_V, 0)
    sampler = sample if device == "cuda" else reference.sample
    tokens_B = draw(sampler, logits_V.expand(count, -1), rows(count, device), filters)
    assert bool(kept_V[tokens_B].all())
    # The tokens that are expected ten times or more, and all others as one.
    common = (probabilities_V * count >= 10).nonzero()[:, 0]
    counts = tokens_B.bincount(minlength=vocabulary)[common]
    odds = probabilities_V[common]
    if float(odds.sum()) * count < count - 5:
        counts = torch.cat((counts, count - counts.sum(0, keepdim=True)))
        odds = torch.cat((odds, 1 - odds.sum(0, keepdim=True)))
    assert abs(chi_square_z(counts, odds / odds.sum())) < 5


@pytest.mark.parametrize("filters", [Filters(), Filters(top_k=5), Filters(top_p=0.1)], ids=str)
def test_no_token_is_favoured_by_where_it_stands(filters: Filters, device: str) -> None:
    """Flat logits over as many tokens as a model has: a filter keeps them all."""
    vocabulary, count = 65_536, 30_000 if device == "cuda" else 800
    sampler = sample if device == "cuda" else reference.sample
    logits_BV = torch.zeros(1, vocabulary, device=device).expand(count, -1)
    tokens_B = draw(sampler, logits_BV, rows(count, device), filters)
    # By block, by run, by tile of a block, by place in a run.
    for places in (tokens_B // 4096, tokens_B // 1024, tokens_B // 8, tokens_B):
        counts = (places % 16).bincount(minlength=16)
        assert abs(chi_square_z(counts, torch.full((16,), 1 / 16, device=device))) < 5


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1), (1 << 32, 0)], ids=str)
def test_neighbouring_draws_are_independent(step: tuple[int, int], device: str) -> None:
    """Pairs of tokens of (seed, position) and of the next one fit the product of their odds."""
    numbers = torch.arange(160_000, device=device)
    seeds_B, positions_B = numbers * step[0], numbers * step[1]
    keys_B = reference.noise_keys(seeds_B, positions_B)
    bits = reference.noise_bits(keys_B, torch.arange(8, dtype=torch.int32, device=device))
    tokens_B = (-reference.log_exponential(bits)).argmax(-1)
    pairs = (tokens_B[:-1] * 8 + tokens_B[1:]).bincount(minlength=64)
    assert abs(chi_square_z(pairs, torch.full((64,), 1 / 64, device=device))) < 5
    uniform = bits.double() / 2**31 - 0.5
    for lag in (1, 2, 7):
        # Of each token's noise from draw to draw, and of one draw's from token to token.
        serial = float((uniform[lag:] * uniform[:-lag]).mean()) * 12
        assert abs(serial) < 5 / math.sqrt(uniform[lag:].numel())
        across = float((uniform[:, lag:] * uniform[:, :-lag]).mean()) * 12
        assert abs(across) < 5 / math.sqrt(uniform[:, lag:].numel())


def test_the_noise_is_exponential_down_to_its_tail(device: str) -> None:
    """The smallest E decide a draw from 150k tokens: their frequencies must be right, too."""
    keys_B = reference.noise_keys(*rows(64, device))
    token_ids_V = torch.arange(1 << 16, dtype=torch.int32, device=device)
    exponential = reference.log_exponential(reference.noise_bits(keys_B, token_ids_V)).exp()
    count = exponential.numel()
    for bound in (3.0, 1.0, 0.1, 1e-3, 1e-4, 1e-5):
        probability = 1 - math.exp(-bound)
        share = float((exponential < bound).sum()) / count
        deviation = math.sqrt(probability * (1 - probability) / count)
        assert abs(share - probability) < 5 * deviation


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["kernel", "reference"])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_row_of_nan_is_still_a_token(sampler: object, filters: Filters, device: str) -> None:
    """A model that overflows yields a bad row: not a crash, nor an id past the vocabulary."""
    logits_BV = torch.zeros(4, 60, device=device)
    logits_BV[1] = torch.nan
    logits_BV[2] = -torch.inf
    logits_BV[3, 7] = torch.inf
    tokens_B = draw(sampler, logits_BV, rows(4, device), filters)
    assert 0 <= int(tokens_B.min()) <= int(tokens_B.max()) < 60
    assert int(tokens_B[3]) == 7


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["kernel", "reference"])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_nan_among_others_is_not_drawn(sampler: object, filters: Filters, device: str) -> None:
    batch = few(sampler, device, 6, 64)
    logits_BV = torch.full((batch, 200), torch.nan, device=device)
    logits_BV[:, [3, 12, 199]] = 1.0
    tokens_B = draw(sampler, logits_BV, rows(batch, device), filters)
    assert set(tokens_B.tolist()) <= {3, 12, 199}


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["kernel", "reference"])
@pytest.mark.parametrize(
    "filters",
    [Filters(temperature=1e-4), Filters(top_k=1), Filters(top_p=1e-6), Filters(min_p=1.0)],
    ids=str,
)
def test_what_leaves_one_token_is_greedy(sampler: object, filters: Filters, device: str) -> None:
    batch = few(sampler, device, 4, 40)
    logits_BV = random_tensor(batch, 10_000, dtype=torch.float32, device=device)
    tokens_B = draw(sampler, logits_BV, rows(batch, device), filters)
    assert torch.equal(tokens_B, logits_BV.argmax(-1))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["kernel", "reference"])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_dominating_token_is_always_drawn(sampler: object, filters: Filters, device: str) -> None:
    batch = few(sampler, device, 4, 64)
    logits_BV = random_tensor(batch, 3000, dtype=torch.float32, device=device)
    logits_BV[:, 2345] = 100.0
    tokens_B = draw(sampler, logits_BV, rows(batch, device), filters)
    assert tokens_B.tolist() == [2345] * batch


def test_no_rows(device: str) -> None:
    empty = torch.empty(0, dtype=torch.int64, device=device)
    logits_BV = torch.empty(0, 100, device=device)
    assert draw(sample, logits_BV, (empty, empty), Filters()).shape == (0,)
