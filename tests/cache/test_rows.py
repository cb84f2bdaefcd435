"""Packed rows: whatever part of them a capture holds goes to its own place."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hiddenlake.cache.rows import put_rows, tap_table
from hiddenlake.cache.sites import SITES as ALL_SITES

SITES = ("resid_pre", "mlp_act", "resid_post", "final_norm")
WIDTHS = {"hidden": 4, ALL_SITES["mlp_act"].width: 6}
N_LAYERS = 7


def width(site: str) -> int:
    return WIDTHS[ALL_SITES[site].width]


@given(
    tapped=st.sets(st.integers(0, N_LAYERS - 1), min_size=1),
    sites=st.sets(st.sampled_from(SITES), min_size=1),
    split=st.integers(0, N_LAYERS),
    ranks=st.sampled_from([1, 2]),
    data=st.data(),
)
def test_a_part_of_the_taps_is_stored_as_if_nothing_else_were_tapped(tapped, sites, split, ranks, data):
    """Any sites and layers of what is tapped, on two pipeline stages of one or two tensor-parallel ranks."""
    layers = tuple(sorted(tapped))
    wanted = tuple(sorted(data.draw(st.sets(st.sampled_from(layers), min_size=1))))
    some = frozenset(data.draw(st.sets(st.sampled_from(sorted(sites)), min_size=1))) | {"embed"}
    tokens = 3
    # the value of an element says which site, layer, token and column it is
    truth = {
        site: np.random.default_rng(i).random((N_LAYERS, tokens, width(site)))
        for i, site in enumerate((*SITES, "embed"))
    }
    views = {
        site: np.full((*((len(wanted),) if site not in ("final_norm", "embed") else ()), tokens, width(site)), np.nan)
        for site in some
    }
    for owned in (range(split), range(split, N_LAYERS)):
        for rank in range(ranks):
            table = tap_table(
                [s for s in SITES if s in sites], layers, WIDTHS, N_LAYERS, owned=owned, rank=rank, ranks=ranks
            )
            rows = np.full((tokens, len(table)), -1.0)
            for block in table.blocks:
                for layer in block.layers or (0,):
                    at = block.layer_offset(layer) if block.layers else block.offset
                    rows[:, at : at + block.width] = truth[block.site][layer][
                        :, block.column : block.column + block.width
                    ]
            put_rows(views, table.part(some, wanted), rows, (slice(0, tokens),))
    for site, view in views.items():
        expected = truth[site][list(wanted)] if view.ndim == 3 else truth[site][0]
        assert np.array_equal(view, expected), site
