"""Records what vLLM's V1 runner really does with its batches, into recorded.json, from the demo model on a CPU.

    VLLM_ENABLE_V1_MULTIPROCESSING=0 python tests/conformance/record.py

Run it again for each new version of vLLM. Two runs: `scheduled` with prompts in parts, preemption, and batches that mix
prefill with decoding and change their order; `drafts` with n-gram drafts. A step holds

    req_ids             requests in the batch's order
    scheduled           tokens of each in this step
    computed            tokens of each before it, as the runner counts them
    drafts              draft tokens of each, {} where there are none
    tokens, positions   what the model was given: a token id and a position a row
    owners              index into req_ids of the request in whose KV-cache blocks the row was written, at the token's place
"""

import json
from pathlib import Path

from hiddenlake.cache.capture import start_engine
from hiddenlake.cache.demo_model import demo_model
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.samples import Judgement, Question

OUT = Path(__file__).with_name("recorded.json")
BLOCK = 32

RUNS = {
    "scheduled": {
        "max_num_batched_tokens": 64, "max_num_seqs": 6, "block_size": BLOCK, "num_gpu_blocks_override": 10,
        "scheduler_reserve_full_isl": False, "long_prefill_token_threshold": 24,
    },
    "drafts": {
        "max_num_batched_tokens": 64, "max_num_seqs": 4, "block_size": BLOCK,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2},
    },
}  # fmt: skip


class Cities:
    """Prompts from 40 to 130 tokens, which repeat themselves."""

    name, rules = "cities", "none"
    questions = tuple(
        Question(i, f"{city} is a city. " * (1 + 4 * (i % 4)) + f"Where is {city}?", ())
        for i, city in enumerate(("Kyoto", "Lagos", "Paris", "Lima", "Oslo", "Pune", "Porto", "Cairo"))
    )

    def judge(self, question: Question, answer: str) -> Judgement:
        return Judgement(None, None)


def record(options: dict) -> list[dict]:
    """The steps of one run."""
    from vllm.forward_context import get_forward_context

    job = plan_job(demo_model(), Cities(), sites=["resid_post"], positions=["-1"], max_new_tokens=14, options=options)
    engine = start_engine("vllm", job.request, job.prompts[0].token_ids)
    runner = engine._engine.model_executor.driver_worker.worker.model_runner
    steps: list[dict] = []
    prepare_inputs = runner._prepare_inputs

    def prepare(scheduler_output, *args, **kwargs):
        ids = list(runner.input_batch.req_ids)
        steps.append(
            {
                "req_ids": [name[:8] for name in ids],
                "scheduled": [scheduler_output.num_scheduled_tokens[name] for name in ids],
                "computed": runner.input_batch.num_computed_tokens_cpu[: len(ids)].tolist(),
                "drafts": {name[:8]: len(d) for name, d in scheduler_output.scheduled_spec_decode_tokens.items()},
            }
        )
        return prepare_inputs(scheduler_output, *args, **kwargs)

    def feed(module, args, kwargs):
        step = steps[-1]
        n = sum(step["scheduled"])
        step["tokens"], step["positions"] = kwargs["input_ids"][:n].tolist(), kwargs["positions"][:n].tolist()
        slots = next(iter(get_forward_context().slot_mapping.values()))[:n].tolist()
        table = runner.input_batch.block_table[0]
        rows = [
            table.block_table.cpu[i, :blocks].tolist()
            for i, blocks in enumerate(table.num_blocks_per_row[: len(step["req_ids"])])
        ]
        block_of = {block: (i, b) for i, row in enumerate(rows) for b, block in enumerate(row)}
        assert len(block_of) == sum(map(len, rows)), "no two requests share a block"
        places = [(*block_of[slot // BLOCK], slot % BLOCK) for slot in slots]
        assert [block * BLOCK + place for _, block, place in places] == step["positions"]
        step["owners"] = [owner for owner, _, _ in places]

    runner._prepare_inputs = prepare
    runner.model.register_forward_pre_hook(feed, with_kwargs=True)
    for prompt in job.prompts:
        engine.submit(prompt)
    finished = 0
    while finished < len(job.prompts):
        finished += len(engine.step())
    engine.close()
    return steps


if __name__ == "__main__":
    import vllm

    runs = {name: record(options) for name, options in RUNS.items()}
    lines = ",\n".join(
        f'"{name}": [\n' + ",\n".join(json.dumps(step, separators=(",", ":")) for step in steps) + "\n]"
        for name, steps in runs.items()
    )
    OUT.write_text(f'{{"vllm": "{vllm.__version__}",\n{lines}}}\n')
    print(
        {name: (len(steps), sum(len(step["tokens"]) for step in steps)) for name, steps in runs.items()},
        OUT.stat().st_size,
        "bytes",
    )
