"""Schemes of quantisation in plain PyTorch: those that pages have give what pages give."""

from pathlib import Path

import pytest
import torch
from helpers import held_keys
from hf_paged_kernels.attention.reference import quantize, write_pages_reference

from eval import kv_schemes

ASSETS = Path(__file__).parent.parent / "assets"


@pytest.mark.parametrize(
    ("scheme", "dtype"), [("int8, keys rotated", torch.int8), ("fp8", torch.float8_e4m3fn)], ids=["int8", "fp8"]
)
def test_what_pages_hold(scheme, dtype):
    key, value = torch.randn(9, 2, 64), torch.randn(9, 2, 64)
    key[..., 5] *= 50
    pages, scales = [torch.zeros(2, 2, 8, 64).to(dtype) for _ in "kv"], [torch.zeros(2, 2, 8) for _ in "kv"]
    write_pages_reference(key, value, *pages, torch.arange(9), *scales)
    held = held_keys(pages[0], scales[0]), pages[1].double() * scales[1].double()[..., None]
    for change, x, stored in zip(kv_schemes.SCHEMES[scheme], (key, value), held):
        assert change is not None
        assert torch.allclose(change(x).double(), stored.transpose(1, 2).flatten(0, 1)[:9], atol=1e-4, rtol=1e-5)


def test_scales_of_groups_and_channels():
    x = torch.randn(1, 2, 5, 64)
    found = kv_schemes.in_groups(x, torch.int8, 32)
    for part in (slice(0, 32), slice(32, 64)):
        codes, scale = quantize(x[..., part], torch.int8)
        assert torch.allclose(found[..., part], codes * scale[..., None], atol=1e-6)
    codes, scale = quantize(x.transpose(-1, -2), torch.int8)
    expected = (codes * scale[..., None]).transpose(-1, -2)
    assert torch.allclose(kv_schemes.per_row(x, torch.int8, -2), expected, atol=1e-6)
    with pytest.raises(ValueError, match="no whole groups of 48 channels"):
        kv_schemes.in_groups(x, torch.int8, 48)


def test_the_command(capsys):
    kv_schemes.main([
        "--model", str(ASSETS / "small_model"), "--data", str(ASSETS / "heldout.txt"), "--max-tokens", "300",
        "--window", "64", "--schemes", "unquantised", "int8", "int8, keys rotated",
    ])  # fmt: skip
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["unquantised", "int8", "int8, keys rotated"]
    assert rows[0][2].startswith("+0.00000")
    assert 0 < float(rows[2][3]) < 1
    assert float(rows[2][4]) > 0.9
