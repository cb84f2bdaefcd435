"""compat="llmsknow": the probe of "LLMs Know More Than They Show" (arXiv:2410.02707), to the letter.

What its code (technion-cs-nlp/LLMsKnow, probing_utils.py) does in a heatmap, with seed s:

1. seeds NumPy with s, shuffles arange(len(data)) in task order, takes the first 1000,
   train_test_split(test_size=0.2, random_state=s);
2. drops, from both parts, rows without a valid exact answer, then rows of more than 10,000 tokens;
3. fits LogisticRegression(random_state=s): L2, C=1, lbfgs, at most 100 iterations, raw float32 rows;
4. takes roc_curve(y, P(class 0), pos_label=0), class 0 being the wrong answers, and accuracy, accuracy
   minus the majority's, F1, precision and recall of class 0 at a threshold of one half.

The probe is usually not converged: the certificate says by how much, and `converged` is False.
"""

import warnings

import numpy as np
import sklearn
import xarray as xr
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_curve
from sklearn.metrics import auc as area
from sklearn.model_selection import train_test_split

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.cell import Cell
from hiddenlake.probing.cells import Cells
from hiddenlake.probing.checkpoint import Checkpoint
from hiddenlake.probing.metrics import auroc, delong_interval
from hiddenlake.probing.result import assemble
from hiddenlake.probing.solve import two_classes
from hiddenlake.probing.solvers.certificate import certify
from hiddenlake.probing.solvers.problem import make_problem
from hiddenlake.probing.sweep import Progress, sweep

N_SAMPLES = 1000
TEST_SIZE = 0.2
MAX_TOKENS = 10_000
_TOL = 1e-6  # what `converged` is judged by; lbfgs has its own

_METRICS = ("accuracy", "baseline_accuracy", "accuracy_above_baseline", "f1", "precision", "recall")
_COUNTS = ("n_train", "n_validation")


def split_llmsknow(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation rows of n samples in task order, before any is dropped. Each (rows,) int.

    RandomState(seed) shuffles as np.random.shuffle does after np.random.seed(seed).
    """
    indices = np.arange(n)
    np.random.RandomState(seed).shuffle(indices)
    train, validation = train_test_split(indices[:N_SAMPLES], test_size=TEST_SIZE, random_state=seed)
    return train, validation


def fit_llmsknow(
    cells: Cells,
    positive: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    keep: np.ndarray | None = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """One probe a cell, fitted and scored as the paper does.

    cells : float32 activations of all samples, in task order.
    positive : (sample,) bool, True for a wrong answer: the paper's class 0.
    mask : (position, sample) bool, whether there is a token, in the answer or not.
    keep : (sample,) bool, the rows with a valid exact answer and at most 10,000 tokens. The split is
        drawn before the others are dropped.
    checkpoint : where finished cells are kept.

    `exact_answer_after_last` takes the last token (position `-1`) where the exact answer ends the sequence.
    Where the paper's code would stop with an IndexError (`second_answer` of a one-token answer, -k before the
    start), the sample is left out of the cell and counted in `n_left_out`.

    Returns what fit_probes returns, with C = [1] and one fold (the validation part); and over
    (layer, position, C): accuracy, baseline_accuracy, accuracy_above_baseline, f1, precision, recall; over
    (layer, position): n_train, n_validation; over (position): n_left_out, n_last_token_instead.
    """
    n = len(positive)
    if n < 5:
        raise ProbeError(f"{n} samples cannot be split into 80 % and 20 %: expected at least 5")
    train, validation = split_llmsknow(n, seed)
    # The rows keep the order of the draw: a fit that stops early on raw float32 rows depends on it.
    place = np.full(n, -1)
    place[np.concatenate([train, validation])] = np.arange(len(train) + len(validation))
    drawn = place >= 0
    used = drawn if keep is None else drawn & keep
    if mask is None:
        mask = np.stack([np.isfinite(cells.read(0, p)).all(axis=1) for p in range(len(cells.positions))])
    mask, borrow = _last_token_instead(cells.positions.tolist(), mask, used)

    def fit(X: np.ndarray, rows: np.ndarray, _: int) -> Cell:
        order = np.argsort(place[rows])
        rows = rows[order]
        # Float32, as the paper's rows are: widened exactly where they are stored in less.
        return _fit_cell(X[order].astype(np.float32), positive[rows], place[rows] < len(train), seed)

    with warnings.catch_warnings():
        # Said by the certificate instead, in every cell.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = sweep(cells, mask, used, fit, borrow=borrow, checkpoint=checkpoint, progress=progress)
    result = assemble(cells, fitted, C=np.array([1.0]), n_folds=1, n_shuffles=0)
    for name in (*_METRICS, *_COUNTS):
        values = np.full(result.n.shape, np.nan)
        for at, cell in fitted.items():
            values[at] = cell.metrics[name][0]
        if name in _COUNTS:
            result[name] = ("layer", "position"), values.astype(np.int32)
        else:
            result[name] = ("layer", "position", "C"), values[..., None]
    instead = np.zeros(mask.shape[0], np.int32)
    for position, (_, borrowed) in borrow.items():
        instead[position] = int((borrowed & used).sum())
    result["n_left_out"] = "position", (used & ~mask).sum(axis=1).astype(np.int32)
    result["n_last_token_instead"] = "position", instead
    result.attrs = {
        "cv": 1,
        "C": [1.0],
        "scale": "none",
        "solver": f"sklearn lbfgs, max_iter 100 (scikit-learn {sklearn.__version__})",
        "tol": _TOL,
        "shuffles": 0,
        "seed": seed,
        "compat": "llmsknow",
        "n": int(used.sum()),
        "n_groups": int(used.sum()),
        "n_dropped": int((drawn & ~used).sum()),
        "split": f"{len(train)} training and {len(validation)} validation rows of {n}, before dropping",
        "interval": "95 %, DeLong on the validation rows",
        "fallback": "exact_answer_after_last takes the last token where the exact answer ends the sequence "
        f"({int(instead.sum())} samples)",
    }
    return result


def _last_token_instead(
    positions: list[str], mask: np.ndarray, used: np.ndarray
) -> tuple[np.ndarray, dict[int, tuple[int, np.ndarray]]]:
    """min(len - 1, t + 1): where `exact_answer_after_last` is absent, the last token, which is `-1`."""
    if "exact_answer_after_last" not in positions or "-1" not in positions:
        return mask, {}
    after, last = positions.index("exact_answer_after_last"), positions.index("-1")
    borrowed = used & ~mask[after] & mask[last]
    mask = mask.copy()
    mask[after] |= borrowed
    return mask, {after: (last, borrowed)}


def _fit_cell(X: np.ndarray, wrong: np.ndarray, in_train: np.ndarray, seed: int) -> Cell:
    counts = {"n_train": in_train.sum(), "n_validation": (~in_train).sum()}
    sizes = {"n_positive": int(wrong.sum()), "n_negative": int((~wrong).sum())}
    for name, inside in (("training", in_train), ("validation", ~in_train)):
        if not two_classes(wrong, inside):
            n_wrong = int(wrong[inside].sum())
            reason = f"one class only in the {name} rows: {n_wrong} wrong, {int(inside.sum()) - n_wrong} correct"
            return Cell(**sizes, reason=reason, metrics=_one_C(dict.fromkeys(_METRICS, np.nan) | counts))
    correct = (~wrong).astype(int)
    model = LogisticRegression(random_state=seed).fit(X[in_train], correct[in_train])
    truth, held = correct[~in_train], X[~in_train]
    of_wrong = model.predict_proba(held)[:, 0]
    false_positive_rate, true_positive_rate, _ = roc_curve(truth, of_wrong, pos_label=0)
    auc = float(area(false_positive_rate, true_positive_rate))
    variance = auroc(of_wrong[:, None], (truth == 0)[:, None]).variance
    low, high = delong_interval(np.array([auc]), variance)
    problem = make_problem(
        X[in_train],
        wrong[None, in_train],
        np.ones((1, int(in_train.sum())), bool),
        C=np.array([1.0]),
        fold=np.array([0]),
        label_set=np.array([0]),
        scale="none",
    )
    # The problem's positive class is the wrong answers, scikit-learn's the correct ones.
    found = certify(problem, -model.coef_.T.astype(np.float64), np.zeros(1))
    objective, gap_bound = found.objective.numpy(), found.gap_bound.numpy()
    prediction = model.predict(held)
    accuracy = float(accuracy_score(truth, prediction))
    baseline = float(max(truth.mean(), 1.0 - truth.mean()))
    scored = {"pos_label": 0, "zero_division": 0.0}
    extra = counts | {
        "accuracy": accuracy,
        "baseline_accuracy": baseline,
        "accuracy_above_baseline": accuracy - baseline,
        "f1": float(f1_score(truth, prediction, **scored)),
        "precision": float(precision_score(truth, prediction, **scored)),
        "recall": float(recall_score(truth, prediction, **scored)),
    }
    return Cell(
        **sizes,
        metrics=_one_C(extra),
        fold_auc=np.full((1, 1, 1), auc),
        fold_objective=objective.reshape(1, 1, 1),
        fold_gap_bound=gap_bound.reshape(1, 1, 1),
        fold_n_iter=np.full((1, 1, 1), int(np.max(model.n_iter_))),
        fold_converged=(gap_bound <= _TOL * objective).reshape(1, 1, 1),
        auc=np.array([auc]),
        auc_lo=np.array([low]),
        auc_hi=np.array([high]),
        shuffled_auc=np.array([np.nan]),
    )


def _one_C(values: dict[str, float]) -> dict[str, np.ndarray]:
    return {name: np.array([value], np.float64) for name, value in values.items()}
