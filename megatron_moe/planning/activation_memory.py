"""What each part of a layer saves for its backward pass, and what it needs on top while it runs.

Read from the code that runs: Megatron-Core's linear layers and our norms, attention, experts and
loss. A part is a `Unit` (`memory_units.py`); `step_memory.py` puts units together to stages and
micro-batches.

Letters as in `tensor_sizes.py`; r = t H b bytes is the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.moe.expert_gemm import make_buckets
from megatron_moe.planning.linear_inputs import LinearInputs
from megatron_moe.planning.memory import MemoryByCategory
from megatron_moe.planning.memory_units import Moment, Saved, Unit
from megatron_moe.planning.tensor_sizes import Device, TensorSizes

PLAIN = LinearInputs()
"""Local layers, in the type of the run."""


@dataclass(frozen=True, kw_only=True)
class UnitMaker:
    """Makes the units of one rank.

    Args:
        sizes: of its tensors.
        device: whose implementations run.
        threads: of the CPU that computes experts; 0 computes them all in one batched GEMM.
        overwrites_gradient: whether the gate's kernel writes into its gradient, which is copied.
    """

    sizes: TensorSizes
    device: Device
    threads: int = 0
    overwrites_gradient: bool = False

    @property
    def residual(self) -> int:
        """Bytes r."""
        return self.sizes.residual * self.sizes.bytes

    @property
    def whole(self) -> int:
        """Bytes of activations of whole sequences: r without sequence parallelism."""
        return self.sizes.whole * self.sizes.bytes

    @property
    def gathered(self) -> int:
        """Bytes of a gradient that is gathered over the sequence; nothing without shards."""
        return self.whole if self.sizes.sequence_parallel else 0

    def _norm(self, normed: str, inputs: LinearInputs = PLAIN) -> tuple[Saved, ...]:
        """A norm and its output, which the matrices that follow save."""
        s, r = self.sizes, self.residual
        inverse = Saved("inverse root mean square", "4 t", 4 * s.shard_tokens)
        output = Saved(normed, inputs.formula("t H"), inputs.bytes_of(s.residual, s.bytes))
        return Saved("input of the norm", "t H b", r), inverse, output

    def attention(self, inputs: LinearInputs = PLAIN, *, recompute: bool = False) -> Unit:
        """Norm, projections and core attention."""
        s, b, r = self.sizes, self.sizes.bytes, self.residual
        queries, keys = s.queries * b, s.keys * b
        fused = queries + 2 * keys
        grouped = s.kv_heads != s.heads
        kept = [
            Saved("rotated queries", "T n d b", queries),
            Saved("rotated keys, repeated for n heads", "T n d b", queries),
            Saved("log-sum-exp of the scores", "4 T n", 4 * s.tokens * s.heads),
        ]
        kept.append(Saved("values, contiguous, repeated for n heads", "T n d b", queries))
        projected: list[Saved] = []
        if recompute or s.qk_norm is not None:
            projected.append(Saved("queries, keys, values", "T (n + 2 g) d b", fused))
            if grouped:
                projected.append(Saved("queries, contiguous", "T n d b", queries))
        projected += self._qk_norm()
        outs = [Saved("output of attention", "T n d b", queries)]
        if inputs.recipe is not None:  # The projection keeps its input in a type of its own.
            held = inputs.bytes_of(s.queries, b)
            outs.insert(0, Saved("output of attention, FP8", inputs.formula("T n d"), held))
        weight = s.heads * s.head_dim * s.hidden * b
        copied = queries if s.rows > 1 else 0
        backward = (
            _moment(
                "gradient of the output projection",
                "r + gathered + 2 T n d b + W",
                r + self.gathered + queries + copied + weight,
            ),
            _moment("gradient of attention", "r + 4 T n d b", r + 4 * queries),
        )
        forward = (_moment("output projection", "T H b + r", self.whole + r),)
        norm = self._norm("normalised input", inputs)
        unit = Unit("attention", (*norm, *projected, *outs, *kept), forward, backward)
        keeps = len(norm) + len(projected) + 1
        return unit.recomputed(keeps, queries) if recompute else unit

    def _qk_norm(self) -> list[Saved]:
        """Norms of queries and keys; the rotation that follows saves nothing of its input."""
        s = self.sizes
        if s.qk_norm is None:
            return []
        if s.qk_norm == "head":
            inverse = 4 * s.tokens * (s.heads + s.kv_heads)
            return [Saved("inverse root mean squares of heads", "4 T (n + g)", inverse)]
        both = s.queries + s.keys
        return [
            Saved("queries and keys, fp32", "4 T (n + g) d", 4 * both),
            Saved("normalised queries and keys", "T (n + g) d b", both * s.bytes),
        ]

    def feed_forward(
        self,
        name: str,
        width: int,
        inputs: LinearInputs = PLAIN,
        *,
        normed: bool = True,
        recompute: bool = False,
    ) -> Unit:
        """A dense feed-forward layer, or the shared expert.

        Args:
            name: of the unit.
            width: F on this rank.
            inputs: what its matrices keep.
            normed: whether it has a norm of its own.
            recompute: whether it is recomputed.
        """
        s, b, r = self.sizes, self.sizes.bytes, self.residual
        gated = s.tokens * width * b
        fused, weight = s.gate_blocks * gated, width * s.hidden * b
        saved = (
            Saved("input of the gate", "T m F b", fused),
            Saved("gated product", inputs.formula("T F"), inputs.bytes_of(s.tokens * width, b)),
        )
        clone = gated if self.overwrites_gradient else 0
        backward = (
            _moment(
                "gradient of the second matrix",
                "r + gathered + T F b + W",
                r + self.gathered + gated + weight,
            ),
            _moment(
                "gradient of the gate", "r + (m + 2) T F b", r + gated + clone + fused
            ),  # The saved product is freed, and computed again.
            _moment(
                "gradient of the first matrix",
                "r + T H b + m W - T F b",
                r + self.whole + s.gate_blocks * weight - gated,
            ),
        )
        forward = (_moment("second matrix", "T H b + r", self.whole + r),)
        norm = self._norm("normalised input", inputs) if normed else ()
        unit = Unit(name, (*norm, *saved), forward, backward)
        return unit.recomputed(len(norm), r) if recompute else unit

    def experts(self, inputs: LinearInputs = PLAIN, *, recompute: bool = False) -> Unit:
        """Router, dispatch, exchanges, experts and combination."""
        s, b, r = self.sizes, self.sizes.bytes, self.residual
        rows, here = s.buffer_rows, s.expert_rows
        buffer, arrived = rows * s.hidden * b, here * s.hidden * b
        small = s.tokens * s.topk
        saved: tuple[Saved, ...] = (
            Saved("probabilities, log Z", "4 t (E + 1)", 4 * s.shard_tokens * (s.experts + 1)),
            Saved("choices and weights", "12 t K", 12 * s.shard_tokens * s.topk),
            Saved("rows of choices, tokens of rows", "13 T K + 8 R", 13 * small + 8 * rows),
            *self._expert_matrices(inputs),
            Saved("rows before they are combined", "R H b", buffer, "dispatch_buffers"),
        )
        if s.sorts_rows:
            order = Saved("order of rows by expert, and back", "16 R'", 16 * here)
            saved = (*saved[:-1], order, saved[-1])
        norm = self._norm("normalised input")
        backward = tuple(self._expert_backward(buffer, arrived))
        # Rows as they arrived stay until the layer has those that go back.
        unsorted = arrived if s.sorts_rows else 0
        forward = (
            _moment(
                "experts",
                "r + gated product + two buffers",
                r + self.gathered + self._most_rows() * s.expert * b,
                dispatch_buffers=arrived + unsorted - buffer,
            ),
            *self._unsorting(buffer, arrived),
            _moment("combination", "T H b + 2 r", self.whole + 2 * r),
        )
        unit = Unit("experts", (*norm, *saved), forward, backward)
        return unit.recomputed(len(norm), r) if recompute else unit

    def _expert_matrices(self, inputs: LinearInputs) -> Iterator[Saved]:
        """What the two matrices of experts and the gate keep of this rank's R' rows."""
        s, b = self.sizes, self.sizes.bytes
        rows = s.local_experts * inputs.rows(s.expert_rows // s.local_experts)
        held = inputs.bytes_of(rows * s.hidden, b)
        yield Saved("rows of this rank's experts", inputs.formula("R' H"), held, "dispatch_buffers")
        yield Saved("input of the gate", "R' m F b", rows * s.gate_blocks * s.expert * b)
        if inputs.engine:
            held = inputs.bytes_of(rows * s.expert, b)
            yield Saved("gated product", inputs.formula("R' F"), held)

    def _unsorting(self, buffer: int, arrived: int) -> Iterator[Moment]:
        """Rows on their way back, by expert and by source, next to those that arrived."""
        if self.sizes.sorts_rows:
            yield _moment(
                "order of the sources",
                "r + 3 R' H b - R H b",
                self.residual + self.gathered,
                dispatch_buffers=3 * arrived - buffer,
            )

    def _expert_backward(self, buffer: int, arrived: int) -> Iterator[Moment]:
        s, b, r = self.sizes, self.sizes.bytes, self.residual
        weights = s.local_experts * (s.gate_blocks + 1) * s.expert * s.hidden * b
        work = self._most_rows() * (s.gate_blocks + 2) * s.expert * b
        yield _moment(
            "gradient of the combination",
            "r + gathered + R H b",
            r + self.gathered,
            dispatch_buffers=buffer,
        )
        if s.chunks > 1:
            yield from self._overlapped_backward(buffer, weights)
            return
        # The rows before they are combined are gone; gradients of what arrived and left are there.
        yield _moment(
            "gradient of the experts",
            "r + gathered + (m + 2) F b a row + weights + 2 R' H b - R H b",
            r + self.gathered + work + weights,
            dispatch_buffers=2 * arrived - buffer,
        )

    def _overlapped_backward(self, buffer: int, weights: int) -> Iterator[Moment]:
        """Gradients in chunks, and by expert for those of the weights."""
        s, b = self.sizes, self.sizes.bytes
        rows, chunk = s.buffer_rows, s.buffer_rows // s.chunks
        whole = rows * (s.gate_blocks + 1) * s.expert * b
        one = chunk * ((s.gate_blocks + 2) * s.expert + 3 * s.hidden) * b
        yield _moment(
            "gradient of the last chunk of experts",
            "r + gathered + (m + 1) F b a row + ((m + 2) F + 3 H) b a row of a chunk + 3 R H b",
            self.residual + self.gathered + whole + one,
            dispatch_buffers=3 * buffer,
        )
        yield _moment(
            "gradient of the weights of experts",
            "r + gathered + (m + 1) F b a row + weights + 2 R H b",
            self.residual + self.gathered + whole + weights,
            dispatch_buffers=2 * buffer,
        )

    def _most_rows(self) -> int:
        """Rows of the largest group of experts that are computed together."""
        s = self.sizes
        if s.grouped:
            return s.expert_rows
        rows = [s.rows_of_one_expert] * s.local_experts
        return max(
            bucket.experts * bucket.rows for bucket in make_buckets(rows, s.expert, self.threads)
        )

    def embedding(self) -> Unit:
        """Look-up of the tokens. Its gradient is as large as the weight."""
        s, r = self.sizes, self.residual
        saved = (Saved("ids", "8 T", 8 * s.tokens),) if s.tp > 1 else ()
        weight = s.vocab * s.hidden * s.bytes
        forward = (_moment("look-up", "2 T H b", 2 * self.whole),)
        backward = (
            _moment("gradient of the embedding", "r + T H b + W", r + self.whole, logits=weight),
        )
        return Unit("embedding", saved, forward, backward)

    def head(self) -> Unit:
        """Final norm, logits in fp32 and their loss, a chunk of C tokens at a time."""
        s, r, b = self.sizes, self.residual, self.sizes.bytes
        x = self.whole if s.sequence_parallel else r
        norm = self._norm("normalised input of the logits")
        saved = (
            *norm[:-1],
            Saved("normalised input of the logits", "T H b", x),
            Saved("exponentials of the last chunk", "4 C V", 4 * s.logits, "logits"),
            Saved("statistics, target", "24 T", 24 * s.tokens),
        )
        # A GPU multiplies bf16 and rounds the gradient of the logits; a CPU copies to fp32.
        halves = b < 4 and self.device == "cuda"
        copies = 0 if halves or b == 4 else 4 * (s.vocab + s.logits_rows) * s.hidden
        rounded = b * s.logits if halves else 0
        rows = 4 * s.logits_rows * s.hidden
        forward = (_moment("logits", "fp32 copies", 0, logits=copies),)
        backward = (
            _moment(
                "gradient of the logits",
                "T H b + 4 C H + b C V" if halves else "T H b + 4 C H + fp32 copies",
                0,
                logits=self.whole + copies + rounded + rows,
            ),
            _moment(
                "gradient of the logits matrix",
                "T H b + V H b",
                0,
                logits=self.whole + s.vocab * s.hidden * b,
            ),
        )
        return Unit("logits and loss", saved, forward, backward)


def _moment(name: str, formula: str, activations: int, **others: int) -> Moment:
    return Moment(name, formula, MemoryByCategory(activations=activations, **others))
