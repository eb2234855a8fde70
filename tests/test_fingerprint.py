"""Digests of tensors depend on their values alone, and every difference between two records has a name."""

import pytest
import torch

from hf_transcoders.fingerprint import differences, digest_of, new_hash, tensor_digest


def test_a_digest_does_not_depend_on_where_or_how_a_tensor_lies():
    values = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    expected = tensor_digest(values)
    assert tensor_digest(values.clone()) == expected
    assert tensor_digest(values.T.contiguous().T) == expected  # Strides.
    assert tensor_digest(torch.cat([values, values])[6:]) == expected  # An offset.
    assert tensor_digest(torch.nn.Parameter(values)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool])
def test_every_bit_counts(dtype):
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    expected = tensor_digest(values)
    for place in (0, 17, 34):
        changed = values.clone()
        bits = changed.flatten().view(torch.uint8)
        bits[place * values.element_size()] ^= 1
        assert tensor_digest(bits.view(dtype).reshape(5, 7)) != expected


def test_type_shape_and_order_count():
    values = torch.arange(6.0)
    others = [
        values.double(),
        values.reshape(2, 3),
        values.reshape(3, 2),
        values.flip(0),
        values[:5],
        values.bfloat16(),
    ]
    digests = [tensor_digest(other) for other in (values, *others)]
    assert len(set(digests)) == len(digests)
    assert tensor_digest(torch.zeros(0, 2)) != tensor_digest(torch.zeros(0, 3))


def test_a_hash_does_not_depend_on_its_portions():
    whole, parts = new_hash(), new_hash()
    whole.update(b"one two")
    parts.update(b"one ")
    parts.update(b"two")
    assert digest_of(whole) == digest_of(parts) != digest_of({"one": "two"})


def test_every_difference_is_named():
    saved = {"a": 1, "b": {"c": [1, 2], "d": None}, "same": 1.0, "weights": digest_of(1), "gone": 3}
    now = {"a": 2, "b": {"c": [1, 3], "d": None, "new": "x"}, "same": 1, "weights": digest_of(2), "unused": None}
    assert differences(saved, now) == [
        "a 1 and this run has 2",
        "b.c [1, 2] and this run has [1, 3]",
        "no b.new and this run has x",
        "other weights",
        "gone 3 and this run has none",
    ]
    assert differences(saved, saved) == []


def test_a_number_is_no_truth_value():
    assert differences({"a": 1}, {"a": True}) == ["a 1 and this run has True"]
    assert differences({"a": "1"}, {"a": 1}) == ["other a"]
