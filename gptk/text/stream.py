"""Tokens in, text out as it comes: whole characters only, and never any part of a stop string."""

from collections.abc import Sequence

from gptk.text.tokenizer import Tokenizer


class StreamDecoder:
    """The text of a growing list of tokens, in pieces.

    Joined pieces and flush() are the text of all tokens, up to the first stop string. What may
    still become a character or a stop string waits until it is decided.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.stops = [stop for stop in stops if stop]
        self.stopped = False
        self._tokenizer = tokenizer
        self._bytes = b""  # the start of a character
        self._text = ""  # the start of a stop string

    def push(self, token: int) -> str:
        """The text that this token completes; "" after a stop string."""
        return self.push_bytes(self._tokenizer.decode_bytes([token]))

    def push_bytes(self, token: bytes) -> str:
        """As push, for a token given as its bytes."""
        if self.stopped:
            return ""
        self._bytes += token
        cut = len(self._bytes) - _incomplete(self._bytes)
        self._text += self._bytes[:cut].decode("utf-8", "replace")
        self._bytes = self._bytes[cut:]
        found = [at for at in map(self._text.find, self.stops) if at >= 0]
        if found:
            self.stopped = True
            end = min(found)
        else:
            end = len(self._text) - max(map(self._started, self.stops), default=0)
        piece, self._text = self._text[:end], self._text[end:]
        return piece

    def flush(self) -> str:
        """What still waits, once no further token comes; "" after a stop string."""
        rest = "" if self.stopped else self._text + self._bytes.decode("utf-8", "replace")
        self._bytes, self._text = b"", ""
        return rest

    def _started(self, stop: str) -> int:
        """Length of the longest proper start of the stop string that the text ends with."""
        longest = min(len(stop) - 1, len(self._text))
        return next((n for n in range(longest, 0, -1) if self._text.endswith(stop[:n])), 0)


def _incomplete(raw: bytes) -> int:
    """Bytes at the end that begin a character of UTF-8 and lack its end."""
    for back in range(1, min(3, len(raw)) + 1):
        lead = raw[-back]
        if lead < 0x80:
            return 0
        if 0xC0 <= lead < 0xF8:
            size = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return back if size > back else 0
    return 0
