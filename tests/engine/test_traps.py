"""Traps into which others have fallen, each with a test that bears its name, here or beside its subject.

trap                                                        where it was seen                 test
padding of CUDA graphs overwrites rows                      vllm #43810                       here
all-zero states pass for activations                        vllm #46301, speculators #613     here
lengths mismatch with prefix caching                        vllm #44485                       test_prefix_cache
several tokens a step                                       vllm #56417                       test_speculative
requests of a batch get mixed up                            speculators #279, sglang #4997    here
the next norm overwrites what was captured                  nnsight #630                      test_families
the residual is left out of the stream                      IBM vLLM-Hook #11                 test_refusals, test_families
rejected drafts are shipped                                 vllm-omni #6863                   test_speculative
a second BOS                                                TransformerLens #1624             here
a copy to the host per request and layer, in the hook       vllm-lens, sglang #8003           here
exceptions swallowed in hooks                               vllm-lens, IBM vLLM-Hook          here
the KV cache gives way to activations                       vLLM's extract_hidden_states      here, test_memory
one layer of all samples lies scattered                     steerkit                          here
float32 where the model has bfloat16                        steerkit, LMCache                 here
compression that costs more than it saves                   zstd on bfloat16                  here
keys of a model's name and a text                           lmprobe, brain-score              here, test_identity
pickle on the wire                                          vllm-lens, nnsight                here
an extra step after the end of the answer                   vllm-lens                         here, test_versions
a request that is the prefix of another's name              vllm-lens                         here
vLLM is touched everywhere, so one version is pinned        vllm-lens, undercurrent           here, test_versions
the engine is taken to equal Hugging Face                   nemotron-extraction               here, test_exactness
hooks that never fire under compiled graphs                 IBM vLLM-Hook #7                  test_refusals, test_compile
Newton without line search on separable data                probekit                          test_solvers
"""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from hiddenlake.cache.capture import run_job
from hiddenlake.cache.errors import UnknownNameError
from hiddenlake.cache.families import family_of
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.spot_check import TOLERANCE as PUBLISHED
from hiddenlake.cache.spot_check import spot_check
from hiddenlake.cache.worker import taps

from .captures import (
    CHUNKED,
    TOLERANCE,
    capture_all,
    core_of,
    generate,
    recorder_of,
    running,
    scheduler_of,
    worker_of,
    worst_errors,
)  # fmt: skip
from .conftest import make_task
from .small_models import Reference

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

REPO = Path(__file__).parents[2]
N = 8
SITES = ("attn_out", "mlp_out", "resid_post")
POSITIONS = ("last_q", "0", "first_answer", "-1", "-8")


def plan(model, **settings):
    settings = {
        "sites": SITES,
        "positions": POSITIONS,
        "dtype": "float32",
        "max_new_tokens": 8,
        "options": CHUNKED,
    } | settings
    return plan_job(model, make_task(N), **settings)


@pytest.fixture(scope="module")
def job(tiny_model):
    return plan(tiny_model)


@pytest.fixture(scope="module")
def engine(job):
    with running(job) as engine:
        yield engine


@pytest.fixture(scope="module")
def tiny_reference(tiny_model):
    return Reference("llama", tiny_model)


@pytest.fixture(scope="module")
def captured(job, engine, module_path):
    return capture_all(job, engine, module_path / "x")[0]


def test_each_trap_has_its_test():
    """The table above names files that hold tests."""
    rows = [line for line in __doc__.splitlines() if re.match(r"\w.*  \w", line)][1:]
    assert len(rows) >= 20
    for row in rows:
        for name in re.split(r"  +", row.strip())[-1].split(", "):
            file = Path(__file__) if name == "here" else next(Path(__file__).parents[1].rglob(f"{name}.py"))
            names = [node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
            assert any(name.startswith("test_") for name in names), row


def test_padding_overwrites_no_row():
    """A graph replays with the rows of its size: those behind the batch's are of no request, and name stale slots."""
    out = torch.zeros(6, 4)
    buffers = taps.TapBuffers(4, out, torch.zeros(1, dtype=torch.int64))
    values = torch.arange(16.0).view(4, 4) + 1
    buffers.set(torch.tensor([0, 1, 2, 3]), torch.tensor([2, 3, 4, 5]))
    torch.ops.hiddenlake.tap(values, None, buffers.rows, buffers.slots, buffers.count, out, 0)
    before = out.clone()
    buffers.set(torch.tensor([1]), torch.tensor([0]))
    torch.ops.hiddenlake.tap(-values, None, buffers.rows, buffers.slots, buffers.count, out, 0)
    assert torch.equal(out[0], -values[1])
    assert torch.equal(out[1:], before[1:])


def test_all_zero_states_are_refused(job, engine, monkeypatch):
    """A module that is never run leaves zeros in vLLM's own buffers; hybrid models, where it was seen, are no family."""
    recorder = recorder_of(engine)
    rows = recorder.rows

    def zeroed(key, tokens):
        found = rows(key, tokens)
        if not isinstance(found, str):
            block = next(block for block in worker_of(engine).hiddenlake_table.blocks if block.site == "mlp_out")
            found[:, block.offset : block.offset + block.width] = 0
        return found

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "rows", zeroed)
        with pytest.raises(Exception, match=r"left no values \(first: mlp_out 0\)"):
            engine._check_canary(job.prompts[0].token_ids)
    engine.abort(["canary"])
    with pytest.raises(UnknownNameError, match="Qwen3NextForCausalLM"):
        family_of(["Qwen3NextForCausalLM"])


def test_a_batch_mixes_no_requests(job, engine, captured, tiny_reference):
    """Rows of a batch are those of each prompt alone, and far from those of any other."""
    assert max(worst_errors(captured, tiny_reference).values()) <= TOLERANCE
    stored = captured.read("resid_post", position="last_q", layer=job.request.model.n_layers - 1)
    distance = np.linalg.norm(stored[:, None] - stored[None], axis=-1) / np.linalg.norm(stored, axis=-1)
    assert distance[~np.eye(N, dtype=bool)].min() > 100 * TOLERANCE


def test_rows_of_another_request_are_refused(job, engine, tmp_path, monkeypatch):
    """Should a row map ever name the wrong request: no sample is stored."""
    recorder = recorder_of(engine)
    rows_of = recorder.rows_of

    def swapped(*batch):
        found = list(rows_of(*batch))
        ids = [request for request, *_ in found]
        return [
            (other, first, start, n) for other, (_, first, start, n) in zip([*ids[1:], *ids[:1]], found, strict=True)
        ]

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "rows_of", swapped)
        summary = run_job(job, out=tmp_path / "x", engine=engine)
    assert (summary.committed, summary.failed) == (0, N)
    assert engine.stats()[0]["books"] == 0


def test_no_second_bos(demo_model_folder, tmp_path):
    """Where the chat template begins with the token that the tokenizer would add as well."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    from hiddenlake.cache.model import load_model

    folder = tmp_path / "model"
    folder.mkdir()
    for file in demo_model_folder.iterdir():
        (folder / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos, number = "<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    assert tokenizer("x")["input_ids"][0] == number
    model = load_model(folder)
    object.__setattr__(model, "tokenizer", tokenizer)
    _, ids = model.encode("Which country is Paris in?")
    assert ids[0] == number and ids[1] != number
    assert model.decode(ids).count(bos) == model.encode("")[0].count(bos)


def test_no_copy_to_the_host_for_each_request_and_layer(job, engine, monkeypatch):
    """Taps fire once a layer, whatever the batch; nothing is read back from the device while the model runs."""
    calls = {"steps": 0, "taps": 0, "reads": 0}
    runner, recorder = worker_of(engine).model_runner, recorder_of(engine)
    forward, gather, cpu, item = runner._model_forward, taps.gather_rows, torch.Tensor.cpu, torch.Tensor.item
    inside = []

    def counted_forward(*args, **kwargs):
        calls["steps"] += 1
        inside.append(1)
        try:
            return forward(*args, **kwargs)
        finally:
            inside.pop()

    def counting(name, function):
        def call(*args, **kwargs):
            calls[name] += bool(inside)
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_model_forward", counted_forward)
        patch.setattr(taps, "gather_rows", counting("taps", gather))
        patch.setattr(torch.Tensor, "cpu", counting("reads", cpu))
        patch.setattr(torch.Tensor, "item", counting("reads", item))
        generate(engine, job.prompts)
    engine.abort([prompt.key for prompt in job.prompts])
    fired = len(list(worker_of(engine).hiddenlake_table.taps()))
    print(f"\n{calls}, {fired} taps, {N} requests")
    assert calls["steps"] > 8 and calls["taps"] <= calls["steps"] * fired
    assert calls["reads"] == 0
    assert not recorder.books


def test_exceptions_in_hooks_are_not_swallowed(job, engine, tmp_path, monkeypatch):
    """An error in the recorder is the cause of the samples in flight, which are tried again."""
    recorder, raised = recorder_of(engine), []
    pool = recorder.staging.collect

    def once():
        if not raised:
            raised.append(1)
            raise RuntimeError("a hook went wrong")
        pool()

    with monkeypatch.context() as patch:
        patch.setattr(recorder.staging, "collect", once)
        key = job.prompts[0].key
        [answer] = generate(engine, job.prompts[:1]).values()
        assert "a hook went wrong" in recorder.rows(key, [0])
        engine.abort([key])
        raised.clear()
        summary = run_job(job, out=tmp_path / "x", engine=engine)
    assert raised and answer.answer_ids
    assert (summary.committed, summary.failed) == (N, 0)


def test_the_kv_cache_keeps_its_size(job, engine):
    """Activations have memory of their own, so that as many requests run at once as without capture."""
    from hiddenlake.cache.worker.plugin import CONFIG_KEY

    cache = core_of(engine).vllm_config.cache_config
    specs = [spec for group in scheduler_of(engine).kv_cache_config.kv_cache_groups for spec in group.layer_names]
    assert len(specs) == job.request.model.n_layers, "no cache group holds activations"
    assert CONFIG_KEY in engine._config.additional_config and engine._config.speculative_config is None
    assert engine.memory.device_bytes == 0 and cache.num_gpu_blocks > 0


def test_one_layer_of_all_samples_lies_together(captured):
    """A chunk holds one layer and one position of a site, of as many samples as the shard has."""
    import zarr

    for site in SITES:
        array = zarr.open_array(str(captured.path), path=site, mode="r")
        assert array.chunks[:2] == (1, 1) and array.chunks[2] >= N
        assert array.shards[:2] == array.shape[:2]


def test_stored_as_the_model_computes(demo_model_folder):
    """bfloat16 stays bfloat16, unless it is asked for otherwise."""
    job = plan_job(demo_model_folder, make_task(2))
    assert job.identity.compute_dtype == job.identity.stored_dtype == "bfloat16"
    assert job.request.row_bytes == 2 * len(job.request.table)


def test_nothing_is_compressed_unasked(captured):
    """A site's file is as large as its values, its checksums and its index."""
    for site in SITES:
        [file] = Path(captured.path).glob(f"{site}/c.*")
        values = captured.read(site).nbytes // len(captured) * 8
        assert values <= file.stat().st_size <= 1.05 * values + 65536


def test_keys_are_not_of_name_and_text(tiny_model, job, tmp_path):
    """A model of the same name with one other weight, and the same text: other keys."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "other" / tiny_model.name
    folder.mkdir(parents=True)
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
    [weights] = tiny_model.glob("*.safetensors")
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, folder / weights.name, {"format": "pt"})
    other = plan(folder)
    assert other.identity.model == job.identity.model
    assert [p.text for p in other.prompts] == [p.text for p in job.prompts]
    assert not {p.key for p in other.prompts} & {p.key for p in job.prompts}


def test_nothing_is_pickled(job, engine, tmp_path, monkeypatch):
    """What crosses to the workers and back is plain JSON, and so is all that a capture keeps beside its arrays."""
    call, crossed = engine._engine.collective_rpc, []

    def watched(verb, args=(), **kwargs):
        found = call(verb, args=args, **kwargs)
        crossed.append(verb)
        assert json.loads(json.dumps([args, found])) is not None
        return found

    with monkeypatch.context() as patch:
        patch.setattr(engine._engine, "collective_rpc", watched)
        capture, _ = capture_all(job, engine, tmp_path / "x")
        engine.stats()
    assert {"hiddenlake_store", "hiddenlake_stored", "hiddenlake_stats"} <= set(crossed)
    for file in (path for path in Path(capture.path).rglob("*") if path.is_file()):
        assert not file.read_bytes()[:2].startswith((b"\x80\x04", b"\x80\x05")) and file.suffix not in (".pt", ".pkl")
    # A file for torch is what a user asks for by name; tests of a backend send it to another process.
    asked = {REPO / "cache" / "exchange" / "torch.py", *(REPO / "cache" / "testing").rglob("*.py")}
    for source in {*(REPO / "cache").rglob("*.py"), *(REPO / "probing").rglob("*.py")} - asked:
        assert not re.search(
            r"^\s*(import|from) (pickle|cloudpickle|dill)\b|torch\.(save|load)\(", source.read_text(), re.M
        )


def test_no_shell_and_no_file_of_a_name_that_can_be_guessed():
    """What a prompt, a path or a setting says is never part of a command line that is parsed again."""
    sources = [
        file for room in ("cache", "probing", "kernels", "src", "benchmarks") for file in (REPO / room).rglob("*.py")
    ]
    assert len(sources) > 100
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                shell = [word.value for word in node.keywords if word.arg == "shell"]
                assert not shell and not re.search(r"os\.(system|popen)$|mktemp$|getoutput$", called), (source, called)


def test_no_step_behind_the_end_leaves_a_row(job, engine):
    """vLLM computes on when an answer has ended; what it computes then is no token's."""
    answers = generate(engine, job.prompts)
    books = recorder_of(engine).books
    for prompt in job.prompts:
        length = len(prompt.token_ids) + len(answers[prompt.key].answer_ids)
        assert max(books[prompt.key].slots) == length - 1
    engine.abort([prompt.key for prompt in job.prompts])


def test_a_name_that_begins_like_another(job, engine):
    """vLLM appends to the names of requests: samples are told apart by all of it."""
    from dataclasses import replace

    short, long = (replace(job.prompts[i], key=key) for i, key in enumerate(("sample-1", "sample-11")))
    answers = generate(engine, [short, long])
    recorder = recorder_of(engine)
    block = worker_of(engine).hiddenlake_table.embed
    for prompt in (short, long):
        ids = [*prompt.token_ids, *answers[prompt.key].answer_ids]
        row = recorder.rows(prompt.key, [len(ids) - 1])
        other = recorder.check([ids[-1]], [len(ids) - 1], row)
        assert other is None and row[0, block.offset : block.end].any()
    engine.abort(["sample-1"])
    assert "sample-11" in recorder.books and "sample-1" not in recorder.books
    engine.abort(["sample-11"])


def test_vllm_is_touched_in_few_places():
    """What may change with its version lies in the worker, in the engine's files and in the server's start."""
    importing = {
        str(path.relative_to(REPO))
        for room in ("cache", "probing", "kernels")
        for path in (REPO / room).rglob("*.py")
        if re.search(r"^\s*(import|from) vllm\b", path.read_text(), re.M)
    }
    allowed = (
        "cache/engines/vllm",
        "cache/engines/plain_vllm",
        "cache/worker/",
        "cache/vllm_server/",
        "cache/attach.py",
    )
    assert importing and all(path.startswith(allowed) for path in importing), sorted(importing)


def test_the_difference_to_hugging_face_is_published(captured, tiny_model):
    """With the capture, and against a limit that is named."""
    found = spot_check(captured, tiny_model, samples=4)
    assert 0 < found.worst <= found.worst_allowed == PUBLISHED["float32"][0]
    assert json.loads(Path(captured.path, "spot_check.json").read_text())["worst"] == found.worst
