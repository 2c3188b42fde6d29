"""The exact reference engine: batched generation with plain Transformers, no vLLM needed.

It samples as vLLM 0.32 does, step by step, so that equal seeds give equal tokens in float32: the taps (taps.py),
temperature, min-p, top-k, top-p, then the Gumbel-max draw with one generator per request. On a CPU vLLM draws one
integer a step from that generator and expands it with SplitMix64 into independent noise per token; elsewhere its first
model runner divides by exponential noise. Both are here; the first is tested against vLLM. (The second model runner has
a noise of its own: there the distributions are equal, not the tokens.) Slower than vLLM: the batches of `generate`
are static, and a session keeps no cache at all. Shapes: B rows, T time, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from ziprc.config.base import Sampling
from ziprc.engines.base import (
    EngineSettings,
    OnTokens,
    Request,
    Response,
    Step,
    Watch,
    check_request,
    check_weights,
    own_dtype,
)
from ziprc.engines.taps import LogitsTap, Place, ReadJoint, ReadStates, Text, TextRows, taps_of
from ziprc.engines.watchdog import Watchdog
from ziprc.joint.checkpoint import load_model
from ziprc.tables.rollouts import FinishReason

GREEDY_BELOW = 1e-5  # vLLM's _SAMPLING_EPS
LIVE_SHARE = 0.75  # finished rows leave the batch once fewer than this share of its rows is live

# SplitMix64 (Steele, Lea, Flood 2014) and the odd constant that numbers its streams.
GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * MIX_1
    z = (z ^ (z >> np.uint64(27))) * MIX_2
    return z ^ (z >> np.uint64(31))


def gumbel_noise(seeds: Sequence[int], vocab_size: int) -> NDArray[np.float64]:
    """[B, V] standard Gumbel noise, a pure function of (seed, token)."""
    keys = _mix(np.asarray(seeds, dtype=np.uint64))[:, None]
    streams = np.arange(1, vocab_size + 1, dtype=np.uint64) * GAMMA
    uniform = ((_mix(keys + streams) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


def filtered(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Temperature, then min-p, top-k and top-p: what is cut becomes -inf. [B, V] float32, temperature > 0."""
    logits = logits / sampling.temperature
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        floor = probabilities.amax(-1, keepdim=True) * sampling.min_p
        logits = logits.masked_fill(probabilities < floor, -torch.inf)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort(-1)
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        tail[:, -1] = False
        logits = logits.scatter(-1, order, ascending.masked_fill(tail, -torch.inf))
    return logits


def draw(logits: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """One token per row of filtered logits, [B]; advances every generator as vLLM would."""
    if logits.device.type == "cpu":
        seeds = [int(torch.randint(0, 2**31, (1,), generator=g)) for g in generators]
        noise = torch.from_numpy(gumbel_noise(seeds, logits.shape[-1]))
        return (logits.double() + noise).argmax(-1)
    noise = torch.empty_like(logits)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return (logits.softmax(-1) / noise).argmax(-1)


def sample(logits: torch.Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Next tokens [B] from float32 logits [B, V] in which banned rows are already -inf; every row has its own settings."""
    tokens = logits.argmax(-1)
    for sampling in {id(one): one for one in samplings}.values():  # nearly always one; to compare them costs more
        rows = [i for i, one in enumerate(samplings) if one is sampling]
        if sampling.temperature >= GREEDY_BELOW:
            own = logits if len(rows) == len(logits) else logits[rows]
            tokens[rows] = draw(filtered(own, sampling), [generators[i] for i in rows])
    return tokens


def drawn_log_probs(logits: torch.Tensor, samplings: Sequence[Sampling], tokens: torch.Tensor) -> torch.Tensor:
    """[B] log-probabilities of `tokens` under the law that `sample` draws from; 0 where it takes the likeliest."""
    found = torch.zeros(len(logits), device=logits.device)
    for sampling in {id(one): one for one in samplings}.values():
        rows = [i for i, one in enumerate(samplings) if one is sampling]
        if sampling.temperature >= GREEDY_BELOW:
            law = filtered(logits[rows], sampling).log_softmax(-1)
            found[rows] = law.gather(-1, tokens[rows, None])[:, 0]
    return found


@dataclass
class _Row:
    """One response in the making; `number` is its name in a reader."""

    request: Request
    number: int
    generator: torch.Generator
    sampling: Sampling
    stops: frozenset[int]
    begin: int  # where in the assistant's turn the prompt ends
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    log_prob: float = 0.0  # of the last token, where a session asks for it
    log_probs: list[float] = field(default_factory=list)  # of all tokens, where `generate` is asked for them

    @property
    def place(self) -> Place:
        return self.number, len(self.tokens)

    def read(self, first: int, last: int) -> list[int]:
        return self.tokens[first:last]

    def add(self, token: int) -> None:
        self.tokens.append(token)
        if token in self.stops:
            self.finish_reason = FinishReason.STOP
        elif len(self.tokens) >= self.request.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH

    def response(self, joint: NDArray[np.float32] | None) -> Response:
        assert self.finish_reason is not None
        log_probs = np.array(self.log_probs, dtype=np.float32) if self.log_probs else None
        return Response(self.request.key, tuple(self.tokens), self.finish_reason, joint, log_probs)


@dataclass
class _Inputs:
    """What the next forward pass is given; the first dimension is the batch."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    cache: DynamicCache

    def advance(self, tokens: torch.Tensor) -> None:
        self.ids = tokens[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], -1)
        self.positions = self.positions[:, -1:] + 1

    def keep(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self.ids.device)
        self.ids, self.mask, self.positions = self.ids[index], self.mask[index], self.positions[index]
        self.cache.batch_select_indices(index)


def _of_batch(watch: Watch, batch: Sequence[int]) -> Watch:
    """The watch of one batch, whose rows are requests of these numbers."""
    row_of = {request: row for row, request in enumerate(batch)}
    return lambda rows, positions, joint: [row_of[i] for i in watch([batch[row] for row in rows], positions, joint)]


class HFEngine:
    """Static batches of `max_num_seqs` requests, sorted by prompt length, padded on the left."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = own_dtype(settings, on_cpu=self.device.type == "cpu")
        self.model = load_model(settings.model, getattr(torch, dtype)).to(self.device)
        self.watchdog = Watchdog(settings.stall_limit_s, f"Transformers with {settings.model}")

    def generate(
        self, requests: Sequence[Request], on_tokens: OnTokens | None = None, watch: Watch | None = None
    ) -> list[Response]:
        """As `Engine.generate`."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_token_ids))
        responses: dict[int, Response] = {}
        for start in range(0, len(order), self.settings.max_num_seqs):
            batch = order[start : start + self.settings.max_num_seqs]
            rows = [self._row(requests[i], number) for number, i in enumerate(batch)]
            reader = ReadJoint(self.settings.joint_rows) if self.settings.joint_rows else None
            self._finish(rows, reader, on_tokens or (lambda tokens: None), watch and _of_batch(watch, batch))
            joint = reader.by_request([len(row.tokens) for row in rows]) if reader else [None] * len(rows)
            responses.update((i, row.response(own)) for i, row, own in zip(batch, rows, joint, strict=True))
        return [responses[i] for i in range(len(requests))]

    def session(self) -> HFSession:
        return HFSession(self)

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """As `Engine.load_weights`."""
        check_weights(weights, self.settings.model)
        self.model.load_state_dict(dict(weights), strict=False)  # a tied matrix is the same tensor under both names

    def close(self) -> None:
        self.watchdog.close()
        del self.model

    def _row(self, request: Request, number: int) -> _Row:
        generator = torch.Generator(device=self.device).manual_seed(request.seed)
        stops = frozenset((*self.settings.stop_token_ids, *request.stop))
        reasoning = self.settings.reasoning
        begin = reasoning.at_end(request.prompt_token_ids) if reasoning else 0
        return _Row(request, number, generator, request.sampling or self.settings.sampling, stops, begin)

    def _padded(self, rows: Sequence[_Row]) -> _Inputs:
        """Prompts, and whatever has been sampled after them; padded on the left, with an empty cache."""
        texts = [torch.tensor((*row.request.prompt_token_ids, *row.tokens)) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_side="left").to(self.device)
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        mask = (torch.arange(ids.shape[1], device=self.device) >= ids.shape[1] - lengths[:, None]).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return _Inputs(ids, mask, positions, DynamicCache(config=self.model.config))

    @torch.inference_mode()
    def _finish(self, rows: Sequence[_Row], reader: ReadJoint | None, on_tokens: OnTokens, watch: Watch | None) -> None:
        """Generate until every row has its finish reason."""
        batch, inputs, taps = list(rows), self._padded(rows), taps_of(self.settings, reader)
        while batch:
            tokens, logits = self._next(batch, inputs, taps)
            said = drawn_log_probs(logits, [row.sampling for row in batch], tokens) if self.settings.log_probs else None
            for row, token, *own in zip(
                batch, tokens.tolist(), *([] if said is None else [said.tolist()]), strict=True
            ):
                if row.finish_reason is None:
                    row.add(token)
                    row.log_probs += own
                    if row.finish_reason is not None:
                        on_tokens(len(row.tokens))
            if watch is not None and reader is not None:
                going = {row.number: row for row in batch if row.finish_reason is None}
                for number in reader.stopped(watch, going):
                    going[number].finish_reason = FinishReason.ABORT
                    on_tokens(len(going[number].tokens))
            inputs.advance(tokens)
            live = [i for i, row in enumerate(batch) if row.finish_reason is None]
            if len(live) < LIVE_SHARE * len(batch):
                batch = [batch[i] for i in live]
                if batch:
                    inputs.keep(live)

    def _next(
        self, batch: Sequence[_Row], inputs: _Inputs, taps: Sequence[LogitsTap]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of every row [B], and the logits [B, V] it was drawn from: one forward pass, the taps, a draw."""
        with self.watchdog.watching():
            output = self.model(
                input_ids=inputs.ids, attention_mask=inputs.mask, position_ids=inputs.positions,
                past_key_values=inputs.cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        logits = output.logits[:, -1].float()
        places, texts = (
            [row.place for row in batch],
            [Text(row.begin, row.sampling.temperature, row.read) for row in batch],
        )
        for tap in taps:
            tap.apply(places, logits, texts)
        return sample(logits, [row.sampling for row in batch], [row.generator for row in batch]), logits


class HFSession:
    """The reference of live control: every step is one full forward pass over the first `max_num_seqs` requests."""

    def __init__(self, engine: HFEngine) -> None:
        settings = engine.settings
        self.engine = engine
        self.reader = ReadStates(settings.joint_rows, TextRows(settings.banned, engine.model.config.vocab_size))
        self.taps = taps_of(settings, self.reader)
        self.rows: list[_Row] = []
        self._numbers = itertools.count()

    def add(self, request: Request) -> None:
        check_request(request, [row.request.key for row in self.rows], self.engine.settings.max_model_len)
        self.rows.append(self.engine._row(request, next(self._numbers)))

    def abort(self, keys: Iterable[str]) -> None:
        gone = set(keys)
        self.rows = [row for row in self.rows if row.request.key not in gone]

    def close(self) -> None:
        self.rows.clear()

    @torch.inference_mode()
    def step(self) -> Step | None:
        """As `Session.step`."""
        batch = self.rows[: self.engine.settings.max_num_seqs]
        if not batch:
            return None
        drawn, _ = self.engine._next(batch, self.engine._padded(batch), self.taps)
        tokens = drawn.cpu().numpy().astype(np.int32)
        states = self.reader.take([row.place for row in batch], tokens)
        log_prob = np.array([row.log_prob for row in batch], dtype=np.float32)
        for row, token, own in zip(batch, tokens.tolist(), states.log_prob.tolist(), strict=True):
            row.add(token)
            row.log_prob = own
        self.rows = [row for row in self.rows if row.finish_reason is None]
        return Step(
            keys=[row.request.key for row in batch],
            token_ids=tokens,
            position=np.array([len(row.tokens) - 1 for row in batch], dtype=np.int32),
            finish=[row.finish_reason for row in batch],
            joint=states.joint,
            log_prob=log_prob,
            entropy=states.entropy,
            cached=np.zeros(len(batch), dtype=np.int32),
        )
