"""The exact reference engine: batched generation with plain Transformers, no vLLM needed.

It samples as vLLM 0.32 does, step by step, so that equal seeds give equal tokens in float32: banned rows to -inf,
temperature, min-p, top-k, top-p, then the Gumbel-max draw with one generator per request. On a CPU vLLM draws one
integer a step from that generator and expands it with SplitMix64 into independent noise per token; elsewhere it divides
by exponential noise. Both are here; the first is tested against vLLM. Slower than vLLM: the batches of `generate` are
static, and a session keeps no cache at all. Shapes: B rows, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    check_request,
    joint_of,
    own_dtype,
)
from ziprc.engines.taps import LiveReadout, Taken, TextRows
from ziprc.engines.watchdog import Watchdog
from ziprc.joint.checkpoint import JointHead, load_model
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


def sample(logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Next tokens [B] from float32 logits [B, V] in which banned rows are already -inf."""
    if sampling.temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    return draw(filtered(logits, sampling), generators)


@dataclass
class _Row:
    """One response in the making."""

    request: Request
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    joint: list[NDArray[np.float32]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    log_prob: float = 0.0  # of the last token, where a session asks for it

    @property
    def text(self) -> tuple[int, ...]:
        return (*self.request.prompt_token_ids, *self.tokens)

    def add(self, token: int, stops: frozenset[int]) -> None:
        self.tokens.append(token)
        if token in stops:
            self.finish_reason = FinishReason.STOP
        elif len(self.tokens) >= self.request.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH

    def response(self) -> Response:
        assert self.finish_reason is not None
        joint = np.stack(self.joint) if self.joint else None
        return Response(self.request.key, tuple(self.tokens), self.finish_reason, joint)


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


class HFEngine:
    """Static batches of `max_num_seqs` requests, sorted by prompt length, padded on the left."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(settings.model, getattr(torch, own_dtype(settings))).to(self.device)
        self.stops = frozenset(settings.stop_token_ids)
        self.watchdog = Watchdog(settings.stall_limit_s, f"Transformers with {settings.model}")

    def generate(self, requests: Sequence[Request], on_tokens: OnTokens | None = None) -> list[Response]:
        """As `Engine.generate`."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_token_ids))
        responses: dict[int, Response] = {}
        for start in range(0, len(order), self.settings.max_num_seqs):
            batch = order[start : start + self.settings.max_num_seqs]
            rows = [self._row(requests[i]) for i in batch]
            self._finish(rows, on_tokens or (lambda tokens: None))
            responses.update((i, row.response()) for i, row in zip(batch, rows, strict=True))
        return [responses[i] for i in range(len(requests))]

    def session(self) -> HFSession:
        return HFSession(self, joint_of(self.settings))

    def close(self) -> None:
        self.watchdog.close()
        del self.model

    def _row(self, request: Request) -> _Row:
        return _Row(request, torch.Generator(device=self.device).manual_seed(request.seed))

    def _padded(self, rows: Sequence[_Row]) -> _Inputs:
        """Prompts, and whatever has been sampled after them; padded on the left, with an empty cache."""
        texts = [torch.tensor(row.text) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_side="left").to(self.device)
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        mask = (torch.arange(ids.shape[1], device=self.device) >= ids.shape[1] - lengths[:, None]).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return _Inputs(ids, mask, positions, DynamicCache(config=self.model.config))

    @torch.inference_mode()
    def _finish(self, rows: Sequence[_Row], on_tokens: OnTokens) -> None:
        """Generate until every row has its finish reason."""
        batch, inputs = list(rows), self._padded(rows)
        while batch:
            logits = self._logits(inputs)
            if self.settings.joint is not None:
                for row, reading in zip(batch, self._joint(logits), strict=True):
                    if row.finish_reason is None:
                        row.joint.append(reading)
            tokens = self._sample(batch, logits)
            for row, token in zip(batch, tokens.tolist(), strict=True):
                if row.finish_reason is None:
                    row.add(token, self.stops)
                    if row.finish_reason is not None:
                        on_tokens(len(row.tokens))
            inputs.advance(tokens)
            live = [i for i, row in enumerate(batch) if row.finish_reason is None]
            if len(live) < LIVE_SHARE * len(batch):
                batch = [batch[i] for i in live]
                if batch:
                    inputs.keep(live)

    def _logits(self, inputs: _Inputs) -> torch.Tensor:
        """One forward pass: what every row says next, [B, V] float32."""
        with self.watchdog.watching():
            output = self.model(
                input_ids=inputs.ids,
                attention_mask=inputs.mask,
                position_ids=inputs.positions,
                past_key_values=inputs.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1].float()

    def _joint(self, logits: torch.Tensor) -> NDArray[np.float32]:
        """[B, R·L], to be read before the rows are banned."""
        assert self.settings.joint is not None
        return logits[:, self.settings.joint.layout.joint_slice].softmax(-1).cpu().numpy()

    def _sample(self, batch: Sequence[_Row], logits: torch.Tensor) -> torch.Tensor:
        """The next token of every row, [B]; bans rows of `logits` in place."""
        for first, last in self.settings.banned:
            logits[:, first:last] = -torch.inf
        return sample(logits, self.settings.sampling, [row.generator for row in batch])


class HFSession:
    """The reference of live control: every step is one full forward pass over the first `max_num_seqs` requests."""

    def __init__(self, engine: HFEngine, joint: JointHead) -> None:
        self.engine = engine
        text = TextRows(engine.settings.banned, engine.model.config.vocab_size)
        self.reader = LiveReadout(joint.layout.joint_slice, text)
        self.rows: list[_Row] = []

    def add(self, request: Request) -> None:
        check_request(request, [row.request.key for row in self.rows], self.engine.settings.max_model_len)
        self.rows.append(self.engine._row(request))

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
        places = [(i, len(row.tokens)) for i, row in enumerate(batch)]
        logits = self.engine._logits(self.engine._padded(batch))
        self.reader.read(places, logits)
        tokens = self.engine._sample(batch, logits).cpu().numpy().astype(np.int32)
        step = self._emitted(batch, tokens, self.reader.take(places, tokens))
        self.rows = [row for row in self.rows if row.finish_reason is None]
        return step

    def _emitted(self, batch: Sequence[_Row], tokens: NDArray[np.int32], taken: Taken) -> Step:
        """Append the tokens [B] and say what was drawn in which state."""
        log_prob = np.array([row.log_prob for row in batch], dtype=np.float32)
        for row, token, own in zip(batch, tokens.tolist(), taken.log_prob.tolist(), strict=True):
            row.add(token, self.engine.stops)
            row.log_prob = own
        return Step(
            keys=[row.request.key for row in batch],
            token_ids=tokens,
            position=np.array([len(row.tokens) - 1 for row in batch], dtype=np.int32),
            finish=[row.finish_reason for row in batch],
            joint=taken.joint,
            log_prob=log_prob,
            entropy=taken.entropy,
            cached=np.zeros(len(batch), dtype=np.int32),
        )
