"""The page table on a device: equal to the host's after every change, sending only what changed."""

import pytest
import torch

from hf_paged.paging import DeviceTable

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("device", ["meta-like", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_mirror_follows(device, monkeypatch):
    copies: list[torch.Tensor] = []
    table = DeviceTable(torch.device("cuda" if device == "cuda" else "cpu"))
    if device != "cuda":
        # The logic of a device on CPU tensors: only the short cut for CPU is off.
        monkeypatch.setattr(table, "device", type("Device", (), {"type": "other"})())
        to = torch.Tensor.to

        def counted(x, *args, **keywords):
            if not args or args[0] is not table.device:
                return to(x, *args, **keywords)
            copies.append(x)
            return x

        monkeypatch.setattr(torch.Tensor, "to", counted)
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k))
    generator = torch.Generator().manual_seed(0)
    host = torch.randint(0, 1000, (3, 5), dtype=torch.int32, generator=generator)
    for step in range(60):
        before = table.num_sent
        changes = 0
        if step % 7 == 0:
            more = torch.randint(1, 1000, (host.shape[0], 3), dtype=torch.int32, generator=generator)
            host = torch.cat([host, more], 1)
        elif step % 11 == 0:
            host = host[torch.tensor([2, 0, 0, 1])[: 2 + step % 3]] if host.shape[0] >= 3 else host.repeat(2, 1)
        elif step % 2:
            row, column = step % host.shape[0], step % host.shape[1]
            changes = 1
            host = host.clone()
            host[row, column] += 1
        copies.clear()
        sent = table.update(host)
        assert torch.equal(sent.cpu(), host)
        if device != "cuda":
            assert len(copies) == (table.num_sent > before)
        if step % 7 and step % 11:
            assert table.num_sent - before == changes


def test_on_cpu_it_is_the_table_itself():
    host = torch.ones(2, 3, dtype=torch.int32)
    assert DeviceTable(torch.device("cpu")).update(host) is host
