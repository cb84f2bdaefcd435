"""The recorder against a model of a runner that chunks, preempts, drafts and reorders: every kept row is its own token's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiddenlake.cache.pools import widen
from hiddenlake.cache.positions import Tokens, parse_positions, resolve, wanted
from hiddenlake.cache.rows import find_fault, tap_table
from hiddenlake.cache.worker import taps
from hiddenlake.cache.worker.bits import as_bits
from hiddenlake.cache.worker.plan import KEY_ARG, LAST_TOKEN_ARG, PROMPT_LENGTH_ARG, TAIL_ARG, TOKENS_ARG, Plan
from hiddenlake.cache.worker.recorder import Recorder
from hiddenlake.cache.worker.staging import make_staging

WIDTHS = {"hidden": 6, "d_attn": 4, "d_mlp": 9}
N_LAYERS = 3
SITES = ("resid_pre", "attn_z", "mlp_act", "resid_post", "final_norm")
MAX_NEW = 8


class Runner:
    """A batch at a time: requests' tokens in random order and portions, each with a value of its own in every tap."""

    def __init__(self, positions, tokens, dtype=torch.bfloat16, ring_rows=4000, spill=None):
        self.table = tap_table(SITES, range(N_LAYERS), WIDTHS, N_LAYERS)
        plan = Plan(
            SITES, tuple(range(N_LAYERS)), N_LAYERS, positions, tokens, WIDTHS, str(dtype)[6:], ring_rows, 512, spill
        )
        self.buffers, staging = make_staging(512, ring_rows, self.table, dtype, torch.device("cpu"))
        self.recorder = Recorder(plan, staging, lambda output: output.batch, self.check)
        self.write = [
            (site, layer, width, taps._writer(self.buffers, offset, width))
            for site, layer, offset, width in self.table.taps()
        ]
        self.dtype = dtype
        self.dead: set[tuple[str, int]] = set()

    def value(self, site, layer, width, token_id, token):
        """(width,) of one token: the embedding depends on the id, everything else on the place as well."""
        place = 0 if site == "embed" else token
        seed = [token_id, place, *site.encode(), layer]
        return torch.from_numpy(np.random.default_rng(seed).standard_normal(width)).to(self.dtype)

    def check(self, ids, tokens, rows):
        expected = [self.value("embed", 0, WIDTHS["hidden"], i, 0) for i in ids]
        return find_fault(self.table, rows, as_bits(torch.stack(expected)) if expected else rows[:, :6])

    def step(self, batch, new=()):
        """batch : (request id, first token, ids) in the order of the rows."""
        rows, row = [], 0
        for request_id, start, ids in batch:
            rows.append((request_id, row, start, len(ids)))
            row += len(ids)
        self.recorder.before_forward(SimpleNamespace(scheduled_new_reqs=list(new), batch=rows))
        fed = [(token_id, start + i) for _, start, ids in batch for i, token_id in enumerate(ids)]
        padding = torch.full((3, 1), torch.nan)  # graphs pad the batch
        for site, layer, width, write in self.write:
            if (site, layer) in self.dead or not fed:
                continue
            hidden = torch.stack([self.value(site, layer, width, *at) for at in fed])
            write(torch.cat([hidden, padding.expand(3, width).to(self.dtype)]), None)
        self.recorder.after_forward()

    def request(self, request_id, prompt, **extra):
        params = SimpleNamespace(extra_args={KEY_ARG: request_id, **extra}, max_tokens=MAX_NEW)
        return SimpleNamespace(
            req_id=f"{request_id}-1234abcd", prompt_token_ids=prompt, num_computed_tokens=0, sampling_params=params
        )

    def expected(self, ids, token):
        """(element,) bits of what must be stored of a token."""
        parts = [self.value(site, layer, width, ids[token], token) for site, layer, _, width in self.table.taps()]
        return as_bits(torch.cat(parts))[: self.table.stored]


scenario = st.fixed_dictionaries(
    {
        "positions": st.lists(
            st.sampled_from(
                ["last_q", "first_answer", "-1", "-3", "2", "exact_answer_first", "mean_prompt", "max_all"]
            ),
            min_size=1,
            max_size=4,
        ),
        "part": st.sampled_from([None, "all", "all_prompt/2", "all_generated"]),
        "requests": st.lists(
            st.tuples(st.integers(1, 12), st.integers(1, MAX_NEW), st.booleans()), min_size=1, max_size=5
        ),
        "seed": st.integers(0, 2**32 - 1),
        "spill": st.booleans(),
        "dtype": st.sampled_from([torch.bfloat16, torch.float32]),
    }
)


@settings(max_examples=150)
@given(scenario)
def test_every_kept_row_is_its_own_tokens(tmp_path_factory, scenario):
    chance = np.random.default_rng(scenario["seed"])
    names, _ = parse_positions(scenario["positions"])
    tokens = scenario["part"] and Tokens.parse(scenario["part"])
    spill = str(tmp_path_factory.getbasetemp()) if scenario["spill"] else None
    runner = Runner(names, tokens, scenario["dtype"], ring_rows=30 if spill else 4000, spill=spill)
    requests = {}
    for k, (q, n_new, captured) in enumerate(scenario["requests"]):
        ids = chance.integers(0, 50, q + n_new).tolist()
        requests[f"r{k}" if captured else f"ordinary{k}"] = SimpleNamespace(q=q, ids=ids, fed=0, known=q, new=True)
    for _ in range(400):
        batch, new, outcome = [], [], []
        for key in chance.permutation(list(requests)):
            r = requests[key]
            if r.fed == len(r.ids) or chance.random() < 0.3:
                continue
            if r.fed and chance.random() < 0.07:
                r.fed = 0  # preempted: everything is computed again
            ids = r.ids[r.fed : min(r.known, r.fed + int(chance.integers(1, 6)))]
            drafts = []
            if r.fed + len(ids) == r.known and chance.random() < 0.3 and r.known < len(r.ids):
                drafts = chance.integers(0, 50, int(chance.integers(1, 4))).tolist()
            batch.append((f"{key}-1234abcd", r.fed, ids + drafts))
            if r.new:
                request = runner.request(key, r.ids[: r.q])
                if key.startswith("ordinary"):
                    request.sampling_params.extra_args = None
                new.append(request)
                r.new = False
            outcome.append((r, len(ids), drafts))
        runner.step(batch, new)
        for r, n, drafts in outcome:
            r.fed += n
            accepted = 0
            while (
                accepted < len(drafts)
                and r.known + accepted < len(r.ids)
                and drafts[accepted] == r.ids[r.known + accepted]
            ):
                accepted += 1
            if r.fed == r.known:
                r.fed += accepted
                r.known = min(len(r.ids), r.fed + 1)
        if all(r.fed == len(r.ids) for r in requests.values()):
            break
    recorder = runner.recorder
    for key, r in requests.items():
        if key.startswith("ordinary"):
            assert key not in recorder.books
            continue
        n = len(r.ids)
        index = [t for t in resolve(names, r.q, n, (r.q, r.q)).tolist() if t >= 0]
        want = sorted({*index, *(tokens.indices(r.q, n) if tokens else ())})
        found = recorder.rows(key, want)
        assert not isinstance(found, str), found
        for row, token in zip(found, want, strict=True):
            assert np.array_equal(row[: runner.table.stored], runner.expected(r.ids, token))
        pool = recorder.books[key].pool
        if names_of := [name for name in names if name in ("mean_prompt", "max_all")]:
            assert pool.complete
            prompt = np.stack([runner.expected(r.ids, t) for t in range(r.q)])
            if "mean_prompt" in names_of:
                got = pool.total.result("mean")[: runner.table.stored]
                np.testing.assert_allclose(widen(got), widen(prompt).mean(0), rtol=2**-8, atol=1e-6)
            if "max_all" in names_of:
                rest = recorder.rows(key, range(r.q, n))
                whole = np.concatenate([prompt, rest[:, : runner.table.stored]])
                total = pool.total.copy()
                total.add(rest)
                found = total.result("max")[: runner.table.stored]
                assert np.array_equal(widen(found), widen(whole).max(0))
        recorder.drop(key)
    assert not recorder.books and recorder.ring.free == len(recorder.bits)
    if recorder.spill is not None:
        assert recorder.spill.used == 0


def test_only_what_positions_may_mean_is_kept():
    runner = Runner(("last_q", "first_answer"), None)
    ids = list(range(20))
    runner.step([("a-1234abcd", 0, ids[:10])], [runner.request("a", ids[:10])])
    for t in range(10, 14):
        runner.step([("a-1234abcd", t, [ids[t]])])
    assert sorted(runner.recorder.books["a"].slots) == [9, 10]
    assert wanted(("last_q", "first_answer"), None, 10).last


def test_given_text_keeps_the_tokens_that_are_named():
    runner = Runner(("last_q", "-1"), None)
    ids = list(range(20))
    request = runner.request("a", ids, **{PROMPT_LENGTH_ARG: 12, TOKENS_ARG: [11, 15, 19]})
    runner.step([("a-1234abcd", 0, ids)], [request])
    assert sorted(runner.recorder.books["a"].slots) == [11, 15, 19]


def test_a_tail_adds_the_last_token_only():
    runner = Runner(("-1",), None)
    ids = list(range(12))
    runner.step([("a-1234abcd", 0, ids[:10])], [runner.request("a", ids[:10], **{LAST_TOKEN_ARG: 1})])
    runner.step([("a-1234abcd", 10, ids[10:11])])
    before = dict(runner.recorder.books["a"].slots)
    tail = runner.request("a", ids, **{TAIL_ARG: 1})
    tail.req_id, tail.num_computed_tokens = "a:last-99999999", 8
    runner.step([("a:last-99999999", 8, ids[8:])], [tail])
    assert runner.recorder.books["a"].slots.keys() - before.keys() == {11}
    assert np.array_equal(runner.recorder.rows("a", [11])[0][: runner.table.stored], runner.expected(ids, 11))
    assert runner.recorder.books["a"].cause is None


def test_a_request_may_be_new_twice_and_its_name_another_samples():
    """The V2 runner calls a request new again when it is resumed; clients name requests as they like."""
    runner = Runner(("last_q", "-1"), None)
    ids = [3, 4, 5]
    first, again = (runner.request("a", ids) for _ in range(2))
    tail = runner.request("a", ids, **{TAIL_ARG: 1})
    runner.step([(first.req_id, 0, ids)], new=[first])
    runner.step([(first.req_id, 0, ids)], new=[again])
    tail.req_id = "tail"
    for _ in range(2):
        runner.step([("tail", 2, ids[2:])], new=[tail])
    other = runner.request("b", ids)
    other.req_id = first.req_id
    runner.step([(other.req_id, 0, ids)], new=[other])
    runner.recorder.drop("a")
    runner.step([(other.req_id, 3, [6])])
    assert np.array_equal(runner.recorder.rows("b", [2, 3]), [runner.expected([*ids, 6], token) for token in (2, 3)])
    runner.recorder.drop("b")
    assert runner.recorder.ring.free == len(runner.recorder.bits) and not runner.recorder._book_of


def test_a_tap_that_stops_firing_leaves_no_old_row():
    """Slots are used again: what a dead tap leaves must never be another sample's row."""
    runner = Runner(("last_q",), None, ring_rows=4)
    ids = list(range(6))
    for k in range(3):
        runner.step([(f"a{k}-1234abcd", 0, ids)], [runner.request(f"a{k}", ids)])
        rows = runner.recorder.rows(f"a{k}", [5])
        fault = runner.check([ids[5]], [5], rows)
        assert (fault is None) == (k == 0)
        if k:
            assert "mlp_act of layer 1 is not finite" in fault
        runner.recorder.drop(f"a{k}")
        runner.dead = {("mlp_act", 1)}


@pytest.mark.parametrize("spill", [False, True])
def test_a_full_ring_fails_the_sample_or_spills(spill, tmp_path):
    runner = Runner(("-1",), Tokens("all"), ring_rows=20, spill=str(tmp_path) if spill else None)
    ids = {key: np.random.default_rng(k).integers(0, 50, 12).tolist() for k, key in enumerate("abc")}
    for key in ids:
        runner.step([(f"{key}-1234abcd", 0, ids[key])], [runner.request(key, ids[key])])
    found = {key: runner.recorder.rows(key, range(12)) for key in ids}
    if not spill:
        assert not isinstance(found["a"], str) and found["b"] == found["c"] == "the ring was full: it has 20 rows"
        return
    assert runner.recorder.spilled >= 16
    for key in ids:
        for token in range(12):
            assert np.array_equal(found[key][token][: runner.table.stored], runner.expected(ids[key], token))
    assert not [path for path in tmp_path.iterdir()], "the scratch file has no name"


def test_tokens_from_the_prefix_cache_are_a_cause():
    runner = Runner(("last_q",), None)
    request = runner.request("a", list(range(10)))
    request.num_computed_tokens = 8
    runner.step([("a-1234abcd", 8, [8, 9])], [request])
    assert "8 tokens came from the prefix cache" in runner.recorder.rows("a", [9])


def test_an_error_in_the_row_map_fails_what_is_in_flight_and_nothing_else():
    runner = Runner(("last_q",), None)
    ids = list(range(5))
    runner.step([("a-1234abcd", 0, ids)], [runner.request("a", ids)])
    rows_of, runner.recorder.rows_of = runner.recorder.rows_of, lambda output: 1 / 0
    runner.step([("a-1234abcd", 5, [7])])
    assert "ZeroDivisionError" in runner.recorder.rows("a", [4])
    runner.recorder.rows_of = rows_of
    runner.step([("b-1234abcd", 0, ids)], [runner.request("b", ids)])
    assert not isinstance(runner.recorder.rows("b", [4]), str)
