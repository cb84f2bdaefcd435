"""Memory: what the probes of one cell take while they are solved for and judged, projected before they are.

Shape letters: n samples of the cell, m <= n training rows of a fold, d features, k columns of a fold, h held-out rows.
"""

# Of rows that are widened, hashed or looked at block by block, on a CPU and on a GPU.
_BLOCKS = {"cpu": 64 << 20, "cuda": 768 << 20}


def projected(n: int, d: int, itemsize: int, columns: int, n_folds: int, n_masks: int, device: str = "cpu") -> int:
    """Bytes at most, beside the rows themselves, whatever the solver has to do to reach its certificate.

    itemsize : of the rows as they are stored.  columns : k.  n_masks : of training rows, the folds' and inner ones.

    Newton takes the most (solvers.newton, solvers.spaces), in its last resort, an exact Hessian in float64:

        itemsize m d      the training rows, as they are stored
        48 m d            the rows of its space in float64, and preconditioned; those of the Hessian, and three products
        64 min(m, d)^2    factors of a d x d or m x m matrix, in float64
        192 n k, 128 d k  scores, curvatures and weights of all columns: up to 24 and 16 arrays in float64

    Judging (probing.judge) takes, after that,

        (itemsize + 32) h d    held-out rows in float64, those of one class, their squares
        192 h k + 48 KiB h     ranks; pairs of 1,024 samples with all others

    and both what `Problem` holds of n rows in each mask, and blocks of rows that are widened.
    """
    m = n if n_folds == 1 else n - n // n_folds
    h = -(-n // n_folds)
    solving = (itemsize + 48) * m * d + 64 * min(m, d) ** 2 + (192 * n + 128 * d) * columns
    judging = (itemsize + 32) * h * d + 192 * h * columns + (48 << 10) * h
    held = 24 * n_masks * (n + d) + 8 * d * columns * n_masks + _BLOCKS[device]
    return max(solving, judging) + held
