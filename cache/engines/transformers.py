"""Transformers: the reference engine. Generates a batch, then reads its activations in one teacher-forced pass."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hiddenlake.cache import positions
from hiddenlake.cache.engines import modules
from hiddenlake.cache.engines.base import Memory, Request
from hiddenlake.cache.engines.generating import ending, generate
from hiddenlake.cache.errors import BadInputError, CaptureError
from hiddenlake.cache.filling import fill
from hiddenlake.cache.inquiry import Ask, Reply
from hiddenlake.cache.pools import PromptPool, blocks
from hiddenlake.cache.rows import find_fault
from hiddenlake.cache.samples import Generation, Prompt
from hiddenlake.cache.worker.plan import Placement

_BATCH = 16


@dataclass(frozen=True, slots=True)
class _Asked:
    key: str
    ids: Sequence[int]
    ask: Ask
    seed: int | None


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
        if request.lora is not None:
            raise CaptureError(
                "the transformers engine loads no LoRA adapters: use vLLM, or merge the adapter into the model"
            )
        if request.model.quantization is not None:
            raise CaptureError(
                "the transformers engine was not tested with quantised weights: use vLLM, or the unquantised checkpoint"
            )
        if unknown := sorted(request.options.keys() - {"batch_size"}):
            raise BadInputError(f"the transformers engine has no option {', '.join(unknown)}: it has batch_size")
        self.request = self._first = request
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = None
        self._batch = int(request.options.get("batch_size", _BATCH))
        # where something is pooled over prompts, all of their rows are kept until it is
        every = request.varying or self._pools(request.max_length)
        rows = request.max_length if every else request.rows_per_sample
        bytes_ = self._batch * rows * request.row_bytes
        self.memory = Memory(
            samples=self._batch,
            sample_bytes=max(rows * request.row_bytes, request.sample_bytes),
            device_bytes=bytes_ if self._device.type == "cuda" else 0,
        )
        needed = self.memory.host_bytes(self._batch)
        if needed > request.ring_bytes:
            raise CaptureError(
                f"--ring-bytes {request.ring_bytes} is too small: a batch of {self._batch} needs {needed} bytes; raise "
                f"it, or lower batch_size"
            )
        self.table = request.table
        self._queue: list[tuple[Prompt, Sequence[int] | None]] = []
        # per finished sample: token index -> row, its rows (token, element) as stored bits, and the pool of its prompt
        self._rows: dict[str, tuple[dict[int, int], np.ndarray, PromptPool | None]] = {}
        self._stored: list[tuple[str, str | None]] = []
        self._asked: list[_Asked] = []
        self._replies: list[tuple[str, Reply]] = []
        self.provenance = {
            "engine": "transformers",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu",
        }

    def start(self, canary: Sequence[int]) -> None:
        import torch
        import transformers

        model = self.request.model
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model.path, dtype=getattr(torch, model.dtype), attn_implementation=model.family.attention
        )
        self._model.to(self._device).eval()

    def serve(self, request: Request) -> None:
        self._first.check_may_follow(request)
        self.request, self.table = request, request.table

    def has_room(self, prompt: Prompt) -> bool:
        return len(self._queue) + len(self._rows) < self._batch

    @property
    def ring_used(self) -> float:
        return min(1.0, (len(self._queue) + len(self._rows)) / self._batch)

    def submit(self, prompt: Prompt, tokens: Sequence[int] | None = None) -> None:
        self._queue.append((prompt, tokens))

    def ask(self, key: str, token_ids: Sequence[int], ask: Ask, seed: int | None) -> None:
        self._asked.append(_Asked(key, token_ids, ask, seed))

    def replies(self) -> list[tuple[str, Reply]]:
        found, self._replies = self._replies, []
        return found

    def step(self) -> list[Generation]:
        asked, self._asked = self._asked, []
        for alike in _batches(asked, self._batch):
            self._replies += self._reply(alike)
        queue, self._queue = self._queue, []
        if not queue:
            return []
        prompts = [prompt for prompt, _ in queue]
        if prompts[0].given is not None:
            answers = [list(prompt.given) for prompt in prompts]
        else:
            answers = self._answers(prompts)
        sequences = [(*p.token_ids, *answer) for p, answer in zip(prompts, answers, strict=True)]
        lengths = [len(p.token_ids) for p in prompts]
        wanted = [
            self._wanted(q, len(s)) if tokens is None else list(tokens)
            for (_, tokens), q, s in zip(queue, lengths, sequences, strict=True)
        ]
        pooled = any(self._pools(q) for q in lengths)
        kept = [sorted({*w, *range(q)}) if pooled else w for w, q in zip(wanted, lengths, strict=True)]
        rows, logprobs = self.teacher_force(sequences, kept, lengths)
        for prompt, tokens, block in zip(prompts, kept, rows, strict=True):
            row_of = {token: row for row, token in enumerate(tokens)}
            pool = None
            if pooled:
                q = len(prompt.token_ids)
                pool = PromptPool(self._pools(q), prompt.token_ids, self._check)
                for part in blocks(range(q), block.shape[1]):
                    # a fault is found again, and reported, when the sample is stored
                    pool.add(part, block[[row_of[token] for token in part]])
            self._rows[prompt.key] = row_of, block, pool
        return [self._generation(p, answer, lp) for p, answer, lp in zip(prompts, answers, logprobs, strict=True)]

    def _answers(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        model, decoding = self.request.model, self.request.decoding
        longest, sampling = decoding.max_new_tokens, decoding.sampling
        if sampling.greedy:
            return generate(self._model, model, [prompt.token_ids for prompt in prompts], longest, sampling)
        answers = []
        for prompt in prompts:  # one by one, because each sample has a seed of its own
            seed = prompt.seed_of(sampling)
            answers += generate(self._model, model, [prompt.token_ids], longest, sampling, seed)
        return answers

    def _generation(self, prompt: Prompt, answer: list[int], logprobs: list[float]) -> Generation:
        reason, text = "given", None
        if prompt.given is None:
            reason, text = ending(answer, self.request.model, self.request.decoding.sampling.stop)
        return Generation(prompt.key, tuple(answer), tuple(logprobs), reason, text)

    def _wanted(self, q: int, n: int) -> list[int]:
        """Token indices that some position may mean: no more than the ring was sized for."""
        want = positions.wanted(self.request.positions, self.request.tokens, q)
        answer = range(q, n) if want.answer is None else [q + k for k in want.answer if q + k < n]
        return [*want.prompt, *answer]

    def _pools(self, q: int) -> tuple[str, ...]:
        return positions.wanted(self.request.positions, self.request.tokens, q).pools

    def _reply(self, asks: Sequence[_Asked]) -> list[tuple[str, Reply]]:
        first, model = asks[0].ask, self.request.model
        answers = generate(
            self._model, model, [asked.ids for asked in asks], first.max_new_tokens, first.sampling, asks[0].seed
        )
        replies = []
        for asked, answer in zip(asks, answers, strict=True):
            reason, text = ending(answer, model, first.sampling.stop)
            text = model.decode_answer(answer) if text is None else text
            replies.append((asked.key, Reply(text, reason == "stop", len(asked.ids), len(answer))))
        return replies

    def teacher_force(
        self, sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], prompt_lengths: Sequence[int]
    ) -> tuple[list[np.ndarray], list[list[float]]]:
        """One forward pass over whole sequences.

        wanted : token indices to keep, per sequence.

        Returns the rows, per sequence (token, element) as stored bits, and the log-probability of each
        token from prompt_length on.
        """
        import torch

        from hiddenlake.cache.worker.bits import as_bits
        from hiddenlake.kernels.gather import gather_rows

        request = self.request
        lengths = [len(s) for s in sequences]
        width = max(lengths)
        # padded on the right, where causal attention never looks
        ids = torch.zeros(len(sequences), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)] = torch.tensor(sequence)
            mask[i, : len(sequence)] = 1
        flat = torch.tensor([i * width + t for i, tokens in enumerate(wanted) for t in tokens], device=self._device)
        slots = torch.arange(len(flat), device=self._device)
        count = torch.tensor([len(flat)], device=self._device)
        dtype = getattr(torch, request.model.dtype)
        out = torch.full((len(flat), len(self.table)), torch.nan, dtype=dtype, device=self._device)

        def gather(offset: int, values: torch.Tensor) -> None:
            gather_rows(values, None, flat, slots, count, out, offset)

        handles = [
            modules.hook(self._model, request.model.family, site, layer, functools.partial(gather, offset))
            for site, layer, offset, _ in self.table.taps()
        ]
        try:
            with torch.inference_mode():
                hidden = self._model.base_model(
                    input_ids=ids.to(self._device), attention_mask=mask.to(self._device), use_cache=False
                ).last_hidden_state
                logprobs = []
                for i, (sequence, q) in enumerate(zip(sequences, prompt_lengths, strict=True)):
                    logits = modules.logits(self._model, hidden[i, q - 1 : len(sequence) - 1])
                    answer = torch.tensor(sequence[q:], device=self._device)
                    logprobs.append(logits.log_softmax(-1).gather(1, answer[:, None])[:, 0].tolist())
        finally:
            for handle in handles:
                handle.remove()
        blocks = np.split(as_bits(out.cpu()), np.cumsum([len(tokens) for tokens in wanted])[:-1])
        return blocks, logprobs

    def store(self, handles: Sequence[dict[str, Any]], placements: Sequence[Placement]) -> list[tuple[str, str | None]]:
        for placement in placements:
            row_of, block, pool = self._rows[placement.key]

            def rows(tokens: Sequence[int], row_of: dict[int, int] = row_of, block: np.ndarray = block) -> np.ndarray:
                return block[[row_of[token] for token in tokens]]

            cause = fill(self.table, placement, handles, rows, pool, self._check)
            self._stored.append((placement.key, cause))
            if placement.done or cause is not None:
                del self._rows[placement.key]
        return self.stored(wait=False)

    def stored(self, wait: bool) -> list[tuple[str, str | None]]:
        found, self._stored = self._stored, []
        return found

    def _check(self, ids: Sequence[int], tokens: Sequence[int], rows: np.ndarray) -> str | None:
        """See find_fault."""
        from hiddenlake.cache.worker.bits import as_bits

        embed = modules.embed(self._model, self.request.model.family, list(ids), list(tokens))
        return find_fault(self.table, rows, as_bits(embed.cpu()))

    def close(self) -> None:
        self._model = None


def _batches(asked: Sequence[_Asked], most: int) -> Iterator[list[_Asked]]:
    """Questions that may be answered together: drawn replies one by one, because each has a seed of its own."""
    alike: dict[tuple[int, Any], list[_Asked]] = {}
    for item in asked:
        if item.seed is not None:
            yield [item]
        else:
            alike.setdefault((item.ask.max_new_tokens, item.ask.sampling), []).append(item)
    for items in alike.values():
        for start in range(0, len(items), most):
            yield items[start : start + most]
