"""Variants of the model and what may be overridden in them."""

import pytest

from demo2eval.errors import UserError
from demo2eval.pi0.config import make_config, without_lora


def test_overrides_name_the_nearest_key():
    assert make_config("pi05_tiny", **{"siglip.width": 128}).siglip.width == 128
    with pytest.raises(UserError, match="Did you mean 'action_horizon'"):
        make_config("pi05", action_horizont=3)
    with pytest.raises(UserError, match=r"no model variant 'pi5'.*Did you mean 'pi05'"):
        make_config("pi5")


def test_without_lora_is_the_plain_variant():
    assert without_lora(make_config("pi05_lora")) == make_config("pi05")
