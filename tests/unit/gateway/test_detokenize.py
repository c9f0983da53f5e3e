"""Tokens to text: whatever the pieces, together they are the whole, and no piece shows half of anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from epdctl.gateway.detokenize import CUT_AFTER, Detokenizer, StopFinder, TextStream
from tests.unit.gateway.model_files import byte_tokenizer

BYTES = byte_tokenizer("déjà vu 日本語 🙂🙃 naïve coöperation 🙂🙂 日本 日本", vocab=330)


def spaced_tokenizer() -> Tokenizer:
    """A decoder that drops the space before the first word: what comes later must not be taken for a first."""
    words = ["<unk>", "▁", "▁the", "▁cat", "s", "a", "▁a", "<0xE6>", "<0x97>", "<0xA5>"]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


SPACED = spaced_tokenizer()


def decoding(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    return lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=True)


def tokens_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=80)


def token(tokenizer: Tokenizer, word: str) -> int:
    found = tokenizer.token_to_id(word)
    assert found is not None
    return found


def pieces(decode: Callable[[Sequence[int]], str], tokens: Sequence[int], step: int) -> list[str]:
    detokenizer = Detokenizer(decode)
    found = [detokenizer.push(tokens[start : start + step]) for start in range(0, len(tokens), step)]
    return [*found, detokenizer.flush()]


@given(tokens_of(BYTES), st.integers(1, 5))
@settings(max_examples=300, deadline=None)
def test_pieces_of_any_tokens_are_the_whole(tokens: list[int], step: int) -> None:
    assert "".join(pieces(decoding(BYTES), tokens, step)) == decoding(BYTES)(tokens)


SPACED_WORDS = st.sampled_from([[0], [1], [2], [3], [4], [5], [6], [10], [7, 8, 9], [7, 8, 8]])  # bytes make characters


@given(
    st.lists(SPACED_WORDS, max_size=60).map(lambda words: [number for word in words for number in word]),
    st.integers(1, 5),
)
@settings(max_examples=300, deadline=None)
def test_pieces_with_a_decoder_that_strips(tokens: list[int], step: int) -> None:
    assert "".join(pieces(decoding(SPACED), tokens, step)) == decoding(SPACED)(tokens)


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_piece_of_a_real_text_shows_half_a_character(text: str) -> None:
    text = text.replace("\ufffd", "").replace("<|", "")  # special tokens are skipped, as they should be
    tokens = BYTES.encode(text).ids
    found = pieces(decoding(BYTES), tokens, 1)
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


def test_a_picture_of_a_smile_comes_whole() -> None:
    plain = byte_tokenizer("x", vocab=257)
    tokens = plain.encode("a🙂b").ids
    assert len(tokens) == 6
    assert [piece for piece in pieces(decoding(plain), tokens, 1) if piece] == ["a", "🙂", "b"]


def test_endless_broken_bytes_do_not_make_the_window_grow() -> None:
    plain = byte_tokenizer("x", vocab=257)
    broken = token(plain, "æ")  # the byte 0xE6, the first of three
    sizes: list[int] = []

    def decode(tokens: Sequence[int]) -> str:
        sizes.append(len(tokens))
        return decoding(plain)(tokens)

    detokenizer = Detokenizer(decode)
    text = "".join(detokenizer.push([broken]) for _ in range(2000)) + detokenizer.flush()
    assert text == decoding(plain)([broken] * 2000)
    assert max(sizes) <= 4 * CUT_AFTER


def test_endless_special_tokens_are_nothing() -> None:
    end = token(BYTES, "<|im_end|>")
    assert "".join(pieces(decoding(BYTES), [end] * 200, 1)) == ""


# -- stop strings --

ALPHABET = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


def cut(text: str, stops: Sequence[str], exempt: int = 0) -> tuple[str, bool]:
    """By definition: read letter by letter; the first stop string that is complete ends it, the longest of several."""
    for end in range(exempt + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(ALPHABET, STOPS, st.integers(1, 7))
@settings(max_examples=500, deadline=None)
def test_stop_strings_cut_the_same_however_the_text_comes(text: str, stops: list[str], step: int) -> None:
    finder = StopFinder(stops)
    out = [finder.push(text[start : start + step]) for start in range(0, len(text), step)] + [finder.flush()]
    assert ("".join(out), finder.found) == cut(text, stops)


@given(ALPHABET, STOPS, st.integers(1, 7), st.integers(0, 4))
@settings(max_examples=500, deadline=None)
def test_no_stop_string_ends_in_what_is_exempt(text: str, stops: list[str], step: int, exempt: int) -> None:
    finder = StopFinder(stops)
    starts = range(0, len(text), step)
    out = [finder.push(text[start : start + step], exempt=start < exempt * step) for start in starts]
    assert ("".join([*out, finder.flush()]), finder.found) == cut(text, stops, exempt * step)


@given(ALPHABET, STOPS)
@settings(max_examples=300, deadline=None)
def test_nothing_is_held_back_without_need(text: str, stops: list[str]) -> None:
    """What is out plus what is held is the text, and what is held could still become a stop string."""
    finder = StopFinder(stops)
    out = finder.push(text)
    if not finder.found:
        held = text[len(out) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


@pytest.mark.parametrize(
    ("stop", "text"), [(" fox", "the quick brown"), ("k brown f", "the quic"), ("zzz", "the quick brown fox")]
)
def test_stop_strings_reach_over_tokens(stop: str, text: str) -> None:
    stream = TextStream(decoding(BYTES), [stop])
    said = "".join(stream.push([number]) for number in BYTES.encode("the quick brown fox").ids) + stream.flush()
    assert said == text
    assert stream.stopped == (stop != "zzz")


@pytest.mark.parametrize(("min_tokens", "text"), [(0, "ab"), (3, "ab"), (4, "abcab"), (6, "abcab"), (7, "abcabcab")])
def test_the_first_tokens_are_not_searched_for_stop_strings(min_tokens: int, text: str) -> None:
    """One that ends behind them counts, even where it begins among them."""
    plain = byte_tokenizer("x", vocab=257)
    stream = TextStream(decoding(plain), ["ca", "c"], min_tokens)
    assert stream.push(plain.encode("abcabcab").ids) + stream.flush() == text


def test_used_counts_the_tokens_up_to_the_stop() -> None:
    tokens = BYTES.encode("ab").ids + BYTES.encode("cd").ids
    stream = TextStream(decoding(BYTES), ["c"])
    assert stream.push(tokens) + stream.flush() == "ab"
    assert stream.used == 3


def test_a_stop_in_the_last_held_text_is_found() -> None:
    plain = byte_tokenizer("x", vocab=257)
    stream = TextStream(decoding(plain), ["\ufffd"])
    assert stream.push([token(plain, "a"), token(plain, "æ")]) == "a"
    assert (stream.flush(), stream.stopped) == ("", True)
