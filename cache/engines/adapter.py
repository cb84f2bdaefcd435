"""Adapter: a PEFT LoRA folder, and what must hold of it before vLLM loads it."""

import json
import re
from pathlib import Path

from hiddenlake.cache.errors import BadInputError, UnknownNameError
from hiddenlake.cache.model import Model

# Ranks that vLLM offers.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def check_adapter(folder: str, model: Model) -> int:
    """The smallest rank that vLLM offers and that holds an adapter's.

    Raises BadInputError for a folder that is no adapter, for a rank that vLLM does not serve and for an adapter that
    changes more than the blocks, UnknownNameError for a model whose adapters were not tested.
    """
    if model.quantization is not None or not model.family.adapted:
        what = "quantised weights" if model.quantization is not None else f"the family {model.family.name}"
        raise UnknownNameError(
            f"LoRA adapters on {what} were not tested with capture: merge the adapter into the model"
        )
    path = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
        kind, targets = config.get("peft_type", "LORA"), config["target_modules"] or []
        rank = max(map(int, [config["r"], *(config.get("rank_pattern") or {}).values()]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(
            f"{path} could not be read ({error!r}): expected the folder of a PEFT LoRA adapter"
        ) from error
    if kind != "LORA":
        raise BadInputError(f"{path}: the adapter is of the type {kind}, expected LORA: merge it into the model")
    changed = [*(config.get("modules_to_save") or ())]
    changed += [module for module in model.family.outside_blocks if _aims_at(targets, module)]
    if changed:
        raise BadInputError(
            f"{path}: the adapter changes {', '.join(dict.fromkeys(changed))}, but rows are checked against the model's "
            f"own embedding, and log-probabilities are those of its own head: merge the adapter into the model"
        )
    for offered in _RANKS:
        if rank <= offered:
            return offered
    raise BadInputError(f"{path}: the adapter has rank {rank}, vLLM serves up to {_RANKS[-1]}: merge it into the model")


def _aims_at(targets: list[str] | str, module: str) -> bool:
    """Whether an adapter has weights for a module, by PEFT's rules: a regular expression, or ends of paths."""
    if isinstance(targets, str):
        return targets != "all-linear" and re.fullmatch(targets, module) is not None
    return any(f".{module}".endswith(f".{target}") for target in targets)
