"""The reference tells a right row from another token's, another prompt's, and one that was never written."""

import numpy as np
import pytest
import torch
from _prompts import stories
from _reference import Reference

LAYER = 15
SITES = ("attn_out", "mlp_in", "mlp_out", "resid_post")


@pytest.mark.slow
def test_only_the_row_itself_passes(demo_model_folder):
    from hiddenlake.cache.model import load_model

    encode = load_model(demo_model_folder, "bfloat16").encode
    one, other, third = (list(encode(text)[1]) for text in stories(0, 3))
    reference = Reference(demo_model_folder, LAYER)
    rounded = Reference(demo_model_folder, LAYER)
    rounded.rows.model.to(torch.bfloat16)

    def rows(ids):
        every = rounded.rows(ids)
        return {site: every[site][LAYER, -1].tolist() for site in SITES}

    assert reference.what_is_wrong(one, other, rows(one)) is None
    assert "differs" in reference.what_is_wrong(one, other, rows(one[:-1]))
    assert "another prompt's" in reference.what_is_wrong(one, other, rows(other))
    assert reference.what_is_wrong(third, other, rows(third)) is None
    empty = {site: np.zeros(576) for site in SITES}
    assert "differs" in reference.what_is_wrong(one, other, empty)
    assert "differs" in reference.what_is_wrong(one, other, {site: row * np.nan for site, row in empty.items()})
