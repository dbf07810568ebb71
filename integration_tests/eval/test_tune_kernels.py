"""Without a GPU there is nothing to time: the command says so."""

import pytest
import torch

from eval import tune_kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the command times kernels")
def test_no_gpu(capsys):
    assert tune_kernels.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_unknown_head_dim(capsys):
    with pytest.raises(SystemExit):
        tune_kernels.main(["--head-dims", "96"])
    assert "invalid choice: 96" in capsys.readouterr().err
