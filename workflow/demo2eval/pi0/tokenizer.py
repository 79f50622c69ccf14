"""Prompts as tokens, in openpi's wording.

The tokenizer is PaliGemma's SentencePiece model, or a small one trained from the tasks' prompts.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from demo2eval.errors import UserError

STATE_BINS = 256
SMALL_VOCABULARY = 400


def clean(prompt: str) -> str:
    """Return a prompt stripped, with underscores and line breaks as spaces."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


def discretize(state: Float[np.ndarray, "*b s"]) -> Int[np.ndarray, "*b s"]:
    """Return the bin of each normalized state value: 0..255 over [-1, 1], -1 below, 255 above."""
    return np.digitize(state, np.linspace(-1, 1, STATE_BINS + 1)[:-1]) - 1


class Tokenizer:
    """A SentencePiece model with openpi's way of writing a prompt."""

    def __init__(self, model: bytes):
        """Load a SentencePiece model from its bytes.

        Raises:
            UserError: if they are no such model.
        """
        import sentencepiece

        self._model = model
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(
                f"this is not a SentencePiece model ({error}); "
                "set model.tokenizer to paligemma_tokenizer.model."
            ) from error

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Read a SentencePiece model, such as paligemma_tokenizer.model."""
        try:
            return cls(Path(path).read_bytes())
        except FileNotFoundError:
            raise UserError(
                f"the tokenizer {path} does not exist; "
                "set model.tokenizer to PaliGemma's SentencePiece model."
            ) from None

    @classmethod
    def train(cls, prompts: Sequence[str], with_state: bool) -> "Tokenizer":
        """Train a small model that knows the prompts' words; the same prompts give the same model.

        Args:
            with_state: whether it also knows every number that a discretized state can hold.
        """
        import sentencepiece

        words = sorted({word for prompt in prompts for word in clean(prompt).split()})
        symbols = [f"\u2581{word}" for word in words]
        if with_state:
            symbols += ["Task:", "\u2581State:", "\u2581Action:", ";", ","]
            symbols += [f"\u2581{value}" for value in range(-1, STATE_BINS)]
        model = io.BytesIO()
        characters = sorted(
            {character for prompt in prompts for character in clean(prompt)}
            | set("0123456789-:;,.abcdefghijklmnopqrstuvwxyz")
        )
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*[clean(prompt) for prompt in prompts], " ".join(characters)]),
            model_writer=model,
            model_type="bpe",
            vocab_size=SMALL_VOCABULARY + len(symbols),
            hard_vocab_limit=False,
            character_coverage=1.0,
            user_defined_symbols=[*symbols, "\n"],
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            byte_fallback=True,
            num_threads=1,
            minloglevel=2,
        )
        return cls(model.getvalue())

    def save(self, path: Path) -> None:
        """Write the SentencePiece model."""
        Path(path).write_bytes(self._model)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self._pieces.vocab_size()

    def _tokens(self, prompt: str, state: np.ndarray | None) -> list[int]:
        if state is None:
            # The line break that starts the answer is a token of its own.
            return [
                self._pieces.bos_id(),
                *self._pieces.encode(clean(prompt)),
                *self._pieces.encode("\n"),
            ]
        numbers = " ".join(str(int(value)) for value in discretize(np.asarray(state)))
        return [
            self._pieces.bos_id(),
            *self._pieces.encode(f"Task: {clean(prompt)}, State: {numbers};\nAction: "),
        ]

    def tokenize(
        self, prompt: str, state: Float[np.ndarray, " s"] | None, max_len: int
    ) -> tuple[Int32[np.ndarray, " {max_len}"], Bool[np.ndarray, " {max_len}"]]:
        """Tokenize a prompt.

        Args:
            state: normalized and unpadded, to be written into the prompt; None: the prompt alone.
            max_len: length to pad to with 0; what is longer is cut at its tail.

        Returns:
            (tokens, mask, which is False for padding).
        """
        tokens = self._tokens(prompt, state)[:max_len]
        padded = np.zeros(max_len, np.int32)
        padded[: len(tokens)] = tokens
        return padded, np.arange(max_len) < len(tokens)

    def needed_length(self, prompts: Sequence[str], state_dim: int | None) -> int:
        """Return the length that suffices for the prompts.

        Args:
            state_dim: dim of the state that is written into the prompt; None: no state is.
        """
        if state_dim is None:
            return max(len(self._tokens(prompt, None)) for prompt in prompts)
        longest = max(
            range(-1, STATE_BINS), key=lambda value: len(self._pieces.encode(f" {value}"))
        )
        # The middle of the bin, so that rounding cannot leave it.
        value = -2.0 if longest < 0 else (longest + 0.5) / STATE_BINS * 2 - 1
        return max(len(self._tokens(prompt, np.full(state_dim, value))) for prompt in prompts)


def padding_mask(mask: np.ndarray, with_state: bool) -> np.ndarray | None:
    """Return the mask of a batch of prompts, or None if prompts of this kind are never padded.

    With the state in it, a prompt's length changes from sample to sample.

    Args:
        mask: bool [b, l], False for padding.
        with_state: whether the state is written into the prompt.
    """
    return mask if with_state or not mask.all() else None
