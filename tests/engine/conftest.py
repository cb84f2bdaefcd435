"""A task of mixed lengths, and an independent reference: Hugging Face, one sequence at a time, hooks of its own."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from hiddenlake.cache.samples import Judgement, Question

SITES = ("resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post")


@dataclass
class ListTask:
    """Questions given as a list; an answer is right when it holds the first alias."""

    questions: list[Question]
    name: str = "list"
    rules: str = "substring 1"
    judged: list[str] = field(default_factory=list)

    def judge(self, question: Question, answer: str) -> Judgement:
        self.judged.append(answer)
        found = next((a for a in question.answers if a.lower() in answer.lower()), None)
        return Judgement(found is not None, found)


COUNTRIES = {
    "Kyoto": "Japan", "Lagos": "Nigeria", "Paris": "France", "Lima": "Peru", "Oslo": "Norway", "Pune": "India",
    "Porto": "Portugal", "Cairo": "Egypt", "Quito": "Ecuador", "Hanoi": "Vietnam", "Turin": "Italy", "Leeds": "England",
}  # fmt: skip


def make_task(n: int) -> ListTask:
    """Questions whose prompts have from 40 to 170 tokens."""
    filler = "It lies at a river, has an old town, two theatres and a university, and its people like to cook. "
    questions = []
    for i in range(n):
        city = list(COUNTRIES)[i % len(COUNTRIES)]
        text = filler * (i % 7) + f"Which country is the city of {city} in?" + " Answer briefly." * (i % 3)
        questions.append(Question(i, text, (COUNTRIES[city],), group=city))
    return ListTask(questions)


@pytest.fixture(scope="session")
def reference(demo_model_folder):
    """A function from token ids to {site: (layer, token, hidden) float32}, `embed` without layer."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model_folder, dtype=torch.float32).eval()
    kept: dict[tuple[str, int], torch.Tensor] = {}

    def keep(name, layer, take):
        def hook(module, args, kwargs, output):
            kept[name, layer] = take(args[0] if args else kwargs["hidden_states"], output)[0].clone()

        return hook

    def first(value):
        return value[0] if isinstance(value, tuple) else value

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(keep("resid_pre", i, lambda x, y: x), with_kwargs=True)
        layer.register_forward_hook(keep("resid_post", i, lambda x, y: first(y)), with_kwargs=True)
        layer.self_attn.register_forward_hook(keep("attn_out", i, lambda x, y: first(y)), with_kwargs=True)
        layer.mlp.register_forward_hook(keep("mlp_in", i, lambda x, y: x), with_kwargs=True)
        layer.mlp.register_forward_hook(keep("mlp_out", i, lambda x, y: y), with_kwargs=True)

    def run(token_ids) -> dict[str, np.ndarray]:
        kept.clear()
        with torch.inference_mode():
            output = model(torch.tensor([list(token_ids)]), output_hidden_states=True)
        n = len(model.model.layers)
        rows = {site: torch.stack([kept[site, i] for i in range(n)]).numpy() for site in SITES}
        # what the hooks saw is what the model itself calls the stream after k blocks; its last entry is normed
        for k in range(1, n):
            assert np.array_equal(rows["resid_post"][k - 1], output.hidden_states[k][0].numpy())
        rows["embed"] = output.hidden_states[0][0].numpy()
        rows["logits"] = output.logits[0].numpy()
        return rows

    return run


def relative_error(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """L2 norm of the difference over that of the expected, along the last axis."""
    return np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
