"""Gather: the wanted rows of one activation, added, selected and cast in one place."""

import torch


def gather_rows(
    hidden: torch.Tensor, residual: torch.Tensor | None, rows: torch.Tensor, count: torch.Tensor, out: torch.Tensor
) -> None:
    """out[i] = hidden[rows[i]] (+ residual[rows[i]]), cast to out's dtype.

    hidden, residual : (token, hidden), the model's dtype. The sum is rounded once, as the model's own
        fused add-and-norm rounds it.
    rows : (R,) int64 on the same device; entries from `count` on are padding and point at row 0.
    count : (1,) int64, how many rows are wanted.
    out : (R, hidden). Rows from `count` on are unspecified afterwards.

    On a CPU only `count` rows are touched. Elsewhere all R are, because a CUDA graph replays fixed
    shapes and reading `count` on the host would wait for the device.
    """
    if hidden.device.type == "cpu":
        n = int(count)
        if n == 0:
            return
        rows, out = rows[:n], out[:n]
    selected = hidden.index_select(0, rows)
    if residual is not None:
        selected += residual.index_select(0, rows)
    out.copy_(selected)
