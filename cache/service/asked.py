"""Asked: what a request to resolve may say, as it is written in JSON."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hiddenlake.cache.identity import Decoding, Sampling

# Neither `true` nor 13.0: nothing that is meant otherwise becomes a number.
_Id = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]
_Layer = Annotated[int, Field(strict=True, ge=0, lt=4096)]
_Token = Annotated[int, Field(strict=True, ge=-(1 << 31), lt=1 << 31)]

# Far more than any model reads: lengths in tokens are checked against the model's own.
_TEXT = 4_000_000
_IDS = 1_000_000


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str = Field(max_length=64, examples=["user"])
    content: str = Field(max_length=_TEXT, examples=["Which country is the city of Lyon in?"])


class Input(BaseModel):
    """One prompt: chat messages, a text, or token ids; and, where nothing is to be generated, an answer that is fed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    messages: tuple[Message, ...] | None = Field(
        None, min_length=1, max_length=1000, description="Through the chat template."
    )
    text: str | None = Field(
        None, min_length=1, max_length=_TEXT, description="As it is, with the tokenizer's special tokens."
    )
    token_ids: tuple[_Id, ...] | None = Field(None, min_length=1, max_length=_IDS, description="As they are.")
    answer: str | None = Field(None, min_length=1, max_length=_TEXT, description="Fed behind the prompt.")
    answer_ids: tuple[_Id, ...] | None = Field(
        None, min_length=1, max_length=_IDS, description="Fed behind the prompt."
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> "Input":
        if sum(value is not None for value in (self.messages, self.text, self.token_ids)) != 1:
            raise ValueError("expected one of messages, text and token_ids")
        if self.answer is not None and self.answer_ids is not None:
            raise ValueError("expected answer or answer_ids, not both")
        if (self.answer is not None and self.token_ids is not None) or (
            self.answer_ids is not None and self.token_ids is None
        ):
            raise ValueError("token_ids go with answer_ids, messages and text with answer")
        return self

    def texts(self) -> dict[str, Any]:
        """What the encoder takes."""
        prompt = {"text": self.text} if self.messages is None else {"messages": [m.model_dump() for m in self.messages]}
        return prompt | ({} if self.answer is None else {"answer": self.answer})


class Generation(BaseModel):
    """How answers come about."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: int = Field(100, ge=1, le=1 << 20)
    temperature: float = Field(0.0, ge=0, le=100, description="0 for greedy answers.", allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=0, lt=1 << 31)
    seed: int = Field(0, ge=0, lt=1 << 53)
    stop: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field((), max_length=16)
    samples: int = Field(1, ge=1, le=1000, description="Answers to each prompt; more than one needs a temperature.")

    @model_validator(mode="after")
    def _more_than_one_differ(self) -> "Generation":
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("more than one sample needs a temperature above 0: greedy answers are all the same")
        return self

    def decoding(self) -> Decoding:
        # What greedy decoding does not look at does not tell answers apart.
        drawn = {"top_p": self.top_p, "top_k": self.top_k, "seed": self.seed} if self.temperature else {}
        return Decoding(self.max_new_tokens, Sampling(temperature=self.temperature, stop=self.stop, **drawn))


class ResolveRequest(BaseModel):
    """Activations of these prompts, from wherever they are, or computed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: tuple[Input, ...] = Field(min_length=1, max_length=100_000)
    model: str | None = Field(
        None, max_length=256, description="Name or id of GET /v1/models; may be left out where there is one."
    )
    sites: tuple[Annotated[str, Field(max_length=64)], ...] | None = Field(
        None, min_length=1, max_length=16, description="All that are tapped by default."
    )
    layers: tuple[_Layer, ...] | None = Field(None, max_length=4096)
    positions: tuple[Annotated[str, Field(max_length=64)] | _Token, ...] = Field(
        ("last_q", "first_answer", "-1"), min_length=1, max_length=256,
        description="Named or numbered tokens, poolings, or `all`, `all_prompt`, `all_generated`.",
    )  # fmt: skip
    generation: Generation | None = Field(
        None, description="Without it nothing is generated: prompts, and answers, are fed."
    )
    only_if_cached: bool = Field(False, description="404 rather than computing anything.")
    wait: float = Field(0.0, ge=0, le=3600, description="Seconds to wait for what is computed.", allow_inf_nan=False)

    @model_validator(mode="after")
    def _generated_or_given(self) -> "ResolveRequest":
        if self.generation is not None and any(i.answer is not None or i.answer_ids is not None for i in self.inputs):
            raise ValueError("answers are either given or generated: leave out `generation` or the inputs' answers")
        return self


class Entry(BaseModel):
    """Where one answer lies."""

    input: int = Field(description="Number of the input.")
    sample_index: int = Field(description="Number of the answer to it.")
    key: str = Field(description="Of the answer, in every capture.")
    state: Literal["ready", "pending"]
    capture: str | None = None
    sample: str | None = Field(None, description="The sample's key in that capture.")


class Resolved(BaseModel):
    """Where the answers lie. `POST /v1/activations:read` takes `capture` and `sample`."""

    state: Literal["complete", "pending"]
    model: str
    sites: list[str]
    layers: list[int]
    positions: list[str]
    tokens: str | None
    entries: list[Entry]
    job: str | None = Field(None, description="That computes what is missing: GET /v1/jobs/{id}.")
