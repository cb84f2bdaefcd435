"""Transformers: the reference engine. Generates a batch, then reads its activations in one teacher-forced pass."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hiddenlake.cache import positions
from hiddenlake.cache.engines.base import Request
from hiddenlake.cache.errors import BadInputError, CaptureError
from hiddenlake.cache.rows import find_fault, put_rows
from hiddenlake.cache.samples import Generation, Prompt
from hiddenlake.cache.store.shard import attach
from hiddenlake.cache.worker.plan import Placement

_BATCH = 16


class TransformersEngine:
    """A Hugging Face model, one batch at a time. See Engine for the interface."""

    def __init__(self, request: Request) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise CaptureError(
                f"transformers cannot be imported ({error}): install `hiddenlake[transformers]`"
            ) from error
        if unknown := sorted(request.options.keys() - {"batch_size"}):
            raise BadInputError(f"the transformers engine has no option {', '.join(unknown)}: it has batch_size")
        model = request.model
        self._request = request
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model.path, dtype=getattr(torch, model.dtype))
        self._model.to(self._device).eval()
        self._batch = int(request.options.get("batch_size", _BATCH))
        needed = self._batch * request.rows_per_sample * request.row_bytes
        if needed > request.ring_bytes:
            raise CaptureError(
                f"--ring-bytes {request.ring_bytes} is too small: a batch of {self._batch} needs {needed} bytes; raise "
                f"it, or lower batch_size"
            )
        self._queue: list[Prompt] = []
        # per finished sample: token index -> column, and its rows (tap, column, hidden) as stored bits
        self._rows: dict[str, tuple[dict[int, int], np.ndarray]] = {}
        self.provenance = {
            "engine": "transformers",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu",
        }

    def has_room(self) -> bool:
        return len(self._queue) + len(self._rows) < self._batch

    def submit(self, prompt: Prompt) -> None:
        self._queue.append(prompt)

    def step(self) -> list[Generation]:
        prompts, self._queue = self._queue, []
        if not prompts:
            return []
        answers = self._generate(prompts)
        sequences = [(*p.token_ids, *answer) for p, answer in zip(prompts, answers, strict=True)]
        wanted = [self._wanted(len(p.token_ids), len(s)) for p, s in zip(prompts, sequences, strict=True)]
        rows, logprobs = self.teacher_force(sequences, wanted, [len(p.token_ids) for p in prompts])
        for prompt, tokens, block in zip(prompts, wanted, rows, strict=True):
            self._rows[prompt.key] = ({token: column for column, token in enumerate(tokens)}, block)
        ends = self._request.model.end_ids
        return [
            Generation(p.key, tuple(answer), tuple(lp), "stop" if answer[-1] in ends else "length")
            for p, answer, lp in zip(prompts, answers, logprobs, strict=True)
        ]

    def _wanted(self, q: int, n: int) -> list[int]:
        """Token indices that some position may mean: no more than the ring was sized for."""
        offsets = positions.answer_rows(self._request.positions)
        answer = range(q, n) if offsets is None else [q + k for k in sorted(offsets) if q + k < n]
        return [*positions.prompt_rows(self._request.positions, q), *answer]

    def _generate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Greedy answers, end-of-sequence token included."""
        import torch
        from transformers import GenerationConfig

        model = self._request.model
        # any id pads: the mask hides it
        pad = model.tokenizer.pad_token_id if model.tokenizer.pad_token_id is not None else model.end_ids[0]
        width = max(len(p.token_ids) for p in prompts)
        ids = torch.full((len(prompts), width), pad)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[i, width - len(prompt.token_ids) :] = 1
        room = min(self._request.max_new_tokens, model.context - min(len(p.token_ids) for p in prompts))
        with torch.inference_mode():
            # a config of our own: the checkpoint's may sample or penalise
            output = self._model.generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                generation_config=GenerationConfig(
                    do_sample=False, max_new_tokens=room, eos_token_id=list(model.end_ids), pad_token_id=pad
                ),
            )
        answers = []
        for prompt, row in zip(prompts, output[:, width:].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in model.end_ids), len(row))
            answers.append(row[: min(end, model.context - len(prompt.token_ids))])
        return answers

    def teacher_force(
        self, sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], prompt_lengths: Sequence[int]
    ) -> tuple[list[np.ndarray], list[list[float]]]:
        """One forward pass over whole sequences.

        wanted : token indices to keep, per sequence.

        Returns the rows, per sequence (tap, token, hidden) as stored bits, and the log-probability of each
        token from prompt_length on.
        """
        import torch

        from hiddenlake.cache.worker.bits import as_bits
        from hiddenlake.kernels.gather import gather_rows

        request, table = self._request, self._request.table
        lengths = [len(s) for s in sequences]
        width = max(lengths)
        # padded on the right, where causal attention never looks
        ids = torch.zeros(len(sequences), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)] = torch.tensor(sequence)
            mask[i, : len(sequence)] = 1
        flat = torch.tensor([i * width + t for i, tokens in enumerate(wanted) for t in tokens], device=self._device)
        count = torch.tensor([len(flat)], device=self._device)
        dtype = getattr(torch, request.model.dtype)
        out = torch.full((len(table), len(flat), request.model.hidden), torch.nan, dtype=dtype, device=self._device)

        def keep(row: int, hidden: torch.Tensor) -> None:
            gather_rows(hidden.flatten(0, 1), None, flat, count, out[row])

        handles = _hook(self._model, request, keep)
        try:
            with torch.inference_mode():
                hidden = self._model.model(
                    input_ids=ids.to(self._device), attention_mask=mask.to(self._device), use_cache=False
                ).last_hidden_state
                logprobs = []
                for i, (sequence, q) in enumerate(zip(sequences, prompt_lengths, strict=True)):
                    logits = self._model.lm_head(hidden[i, q - 1 : len(sequence) - 1]).float()
                    answer = torch.tensor(sequence[q:], device=self._device)
                    logprobs.append(logits.log_softmax(-1).gather(1, answer[:, None])[:, 0].tolist())
        finally:
            for handle in handles:
                handle.remove()
        blocks = np.split(as_bits(out.cpu()), np.cumsum([len(tokens) for tokens in wanted])[:-1], axis=1)
        return blocks, logprobs

    def store(self, handle: dict[str, Any], placements: Sequence[Placement]) -> list[str | None]:
        import torch

        from hiddenlake.cache.worker.bits import as_bits

        weight = self._model.get_submodule(self._request.model.family.embed).weight
        causes: list[str | None] = []
        for placement in placements:
            column_of, block = self._rows.pop(placement.key)
            present = [(p, token) for p, token in enumerate(placement.token_index) if token >= 0]
            rows = block[:, [column_of[token] for _, token in present]]
            ids = torch.tensor([placement.token_ids[token] for _, token in present], device=weight.device)
            fault = find_fault(self._request.table, rows, as_bits(weight.detach()[ids].cpu()))
            if fault is None:
                put_rows(attach(handle), self._request.table, rows, [p for p, _ in present], placement.slot)
            causes.append(fault)
        return causes

    def close(self) -> None:
        self._model = None


def _hook(model: Any, request: Request, keep: Any) -> list[Any]:
    """Forward hooks for every tap of the table. Returns their handles."""
    family = request.model.family
    layers = model.get_submodule(family.layers)
    handles = []
    for row, (site, layer) in enumerate(request.table.pairs):
        block = layers[layer]
        module = {"attn_out": family.attn, "mlp_in": family.mlp, "mlp_out": family.mlp}.get(site)
        module = block.get_submodule(module) if module else block
        if site in ("embed", "resid_pre", "mlp_in"):

            def before(module: Any, args: tuple, kwargs: dict, row: int = row) -> None:
                keep(row, args[0] if args else kwargs["hidden_states"])

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:

            def after(module: Any, args: tuple, output: Any, row: int = row) -> None:
                keep(row, output[0] if isinstance(output, tuple) else output)

            handles.append(module.register_forward_hook(after))
    return handles
