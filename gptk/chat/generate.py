"""Text from a GPT: temperature, top-k and top-p, with a KV cache, streamed.

Past the model's context the last block_size tokens are kept and, since positions are absolute,
computed anew for every further token: the cache helps up to block_size tokens and the result is
that of the uncached model at every length.
"""

import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptk.model import GPT
from gptk.text.stream import StreamDecoder
from gptk.text.tokenizer import Tokenizer
from gptk.train.evaluate import evaluating


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the filters apply in this order.

    Raises:
        ValueError: a value outside its range, NaN included.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy: the largest logit, of equals the smallest id."""
    top_k: int = 0
    """Keep the k most probable tokens, of equals the smallest ids; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose mass reaches p; 1 keeps all."""

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0.0 <= self.temperature < math.inf):
            raise ValueError(
                f"temperature {self.temperature}: must be a finite number, at least 0 (0 is greedy)"
            )
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: must be an integer, at least 0 (0 is off)")
        if not (_is_number(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise ValueError(f"top_p {self.top_p}: must be more than 0 and at most 1 (1 is off)")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The filtered distribution of the next token, on the CPU in float64.

    Args:
        logits (..., V): any float dtype; -inf excludes a token.

    Returns:
        (..., V) float64; rows sum to 1, filtered tokens are exactly 0.

    Raises:
        ValueError: a logit is NaN or +inf, or a whole row is -inf: the model is broken.
    """
    z = logits.detach().to("cpu", torch.float64)
    top = z.amax(-1, keepdim=True)
    _check_usable(top)
    if sampling.temperature == 0.0:  # argmax: of equals the first
        return torch.zeros_like(z).scatter_(-1, z.argmax(-1, keepdim=True), 1.0)
    # log-probabilities up to a constant, at most 0, so that no temperature can overflow
    scaled = (z - top) / sampling.temperature
    V = z.shape[-1]
    k = min(sampling.top_k or V, V)
    if sampling.top_p >= 1.0:  # no ranks needed, unless equals compete for the last place
        if k == V:
            return scaled.softmax(-1)
        kept = scaled >= scaled.topk(k).values[..., -1:]
        if (kept.sum(-1) == k).all():
            return scaled.masked_fill(~kept, -math.inf).softmax(-1)
    order = z.sort(dim=-1, descending=True, stable=True).indices  # equals: smallest id first
    ranked = scaled.gather(-1, order)
    ranked[..., k:] = -math.inf
    p = ranked.softmax(-1)
    if sampling.top_p < 1.0:
        # a token goes when those before it reach the mass; 1e-12 forgives the sum's rounding
        p[..., 1:][p.cumsum(-1)[..., :-1] >= sampling.top_p - 1e-12] = 0.0
        p = p / p.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter_(-1, order, p)


def _check_usable(top: Tensor) -> None:
    """ValueError unless the largest logits of all rows are finite."""
    if not torch.isfinite(top).all():
        raise ValueError("the logits hold NaN or infinity: the model's weights are not usable")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next ids (B, 1) on the CPU: drawn from probabilities(logits, sampling) (B, V)."""
    if sampling.temperature > 0.0:
        return draw(probabilities(logits, sampling), generator)
    z = logits.detach().to("cpu")
    ids = z.argmax(-1, keepdim=True)  # of equals the first
    _check_usable(z.gather(-1, ids))
    return ids


def draw(p: Tensor, generator: torch.Generator) -> Tensor:
    """A column index (B, 1) of each row of p (B, V), with p's probabilities; never one of 0.

    One uniform number per row, sought in the cumulative sums: torch.multinomial draws V of them.
    """
    cumulative = p.cumsum(-1)
    u = torch.rand(len(p), 1, dtype=p.dtype, generator=generator)  # [0, 1)
    total = cumulative[:, -1:].contiguous()
    last = torch.searchsorted(cumulative, total)  # u * total may round up to total
    return torch.searchsorted(cumulative, u * total, right=True).minimum(last)


def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
    prefill_chunk: int | None = None,
) -> Iterator[Tensor]:
    """Yield the next token ids, (B,) int64 on the CPU, max_new_tokens times.

    Args:
        model: its mode and its default generators are left as they are.
        idx (B, T): the prompt, T >= 1; of a longer one than block_size the last tokens count.
        seed: of this call's own generator; None draws one from the operating system.
        vocab_size: the tokenizer's; ids from here on (padding) are never drawn.
        use_cache: False computes everything anew for each token; the logits are the same.
        prefill_chunk: prompt tokens per forward pass; None takes all at once.

    Raises:
        ValueError: an empty prompt, or arguments out of range.
    """
    sampling = sampling or Sampling()
    block_size, V = model.config.block_size, model.config.vocab_size
    if idx.dim() != 2 or idx.shape[1] == 0:
        raise ValueError(f"the prompt must be (B, T) with T >= 1, got {tuple(idx.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens}: must be at least 0")
    if vocab_size is not None and not 1 <= vocab_size <= V:
        raise ValueError(f"vocab_size {vocab_size}: must be from 1 to the model's {V}")
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    device = next(model.parameters()).device
    context = idx.to(device)[:, -block_size:]
    cache = model.new_cache(len(idx)) if use_cache else None
    new = context  # the tokens that the cache does not hold yet
    modules = list(model.modules())
    for _ in range(max_new_tokens):
        with evaluating(model, modules):
            if cache is not None and cache.length + new.shape[1] <= block_size:
                *parts, last = new.split(prefill_chunk or block_size, dim=1)
                for part in parts:
                    model(part, cache=cache)
                logits = model(last, cache=cache)  # (B, t, V)
            else:
                logits = model(context)
        ids = choose(logits[:, -1, :vocab_size], sampling, generator)  # (B, 1)
        yield ids[:, 0]
        new = ids.to(device)
        context = torch.cat([context, new], dim=1)[:, -block_size:]


def start_text(tokenizer: Tokenizer) -> str:
    """What stands for no prompt: a new line, or the first character that the tokenizer knows."""
    try:
        tokenizer.encode("\n")
    except ValueError:
        return tokenizer.decode([0])
    return "\n"


def for_display(text: str) -> str:
    """The text, on a terminal with its control characters written out: a model that draws bytes
    draws escape sequences, too."""
    if not sys.stdout.isatty():
        return text
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int | None = None,
    stops: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the continuation of `prompt` in pieces of whole characters, as they are drawn.

    Tokens are bytes: an incomplete character waits for the tokens that complete it. The joined
    pieces are the text of all tokens, up to the first of the `stops`, of which no part is yielded.
    An empty prompt stands for start_text().

    Raises:
        ValueError: the prompt holds a character that the tokenizer does not know.
    """
    ids = torch.tensor([tokenizer.encode(prompt or start_text(tokenizer))])
    text = StreamDecoder(tokenizer, stops)
    for new in generate(
        model, ids, max_new_tokens, sampling, seed=seed, vocab_size=tokenizer.vocab_size
    ):
        piece = text.push(int(new))
        if piece:
            yield piece
        if text.stopped:
            return
    rest = text.flush()
    if rest:
        yield rest
