"""The small tokenizer, trained from prompts. openpi's wording is in test_openpi_parity.py."""

import numpy as np
import pytest

from demo2eval.errors import UserError
from demo2eval.pi0.tokenizer import Tokenizer

PROMPT = "push the blue cube into the red and white target region"


def test_a_small_tokenizer_is_the_same_each_time_and_loses_nothing(tmp_path):
    tokenizer = Tokenizer.train([PROMPT], with_state=True)
    tokenizer.save(tmp_path / "tokenizer.model")
    again = Tokenizer.train([PROMPT], with_state=True)
    again.save(tmp_path / "again.model")
    assert (tmp_path / "tokenizer.model").read_bytes() == (tmp_path / "again.model").read_bytes()
    length = tokenizer.needed_length([PROMPT], 9)
    states = np.random.default_rng(0).uniform(-1.2, 1.2, (200, 9))
    different = set()
    for state in states:
        tokens, mask = tokenizer.tokenize(PROMPT, state, length + 5)
        assert mask.sum() <= length
        different.add(tuple(tokens))
    assert len(different) == len(states)
    tokens, mask = tokenizer.tokenize(PROMPT, None, 6)
    assert mask.all()
    assert tokens[0] == 2
    assert tokenizer.vocab_size < 1000


def test_a_missing_and_another_file_are_a_sentence(tmp_path):
    file = tmp_path / "tokenizer.model"
    with pytest.raises(
        UserError, match=f"^the tokenizer {file} does not exist; set model.tokenizer"
    ):
        Tokenizer.from_file(file)
    file.write_text("{}")
    with pytest.raises(
        UserError, match=r"^this is not a SentencePiece model .*set model.tokenizer"
    ):
        Tokenizer.from_file(file)
