"""One process of two that train a student data parallel: `python -m … OUT_DIR RANK`."""

from __future__ import annotations

import faulthandler
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from tests.tiny_models import VOCAB_SIZE, build_tiny_model, tiny_plan
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

from echoatt_exporter import EchoAttForCausalLM, share_attention


def model() -> EchoAttForCausalLM:
    """The student that both processes start from, in training mode."""
    student = share_attention(build_tiny_model("llama"), tiny_plan("llama"))
    student.train()
    return student


def rows(rank: int) -> torch.Tensor:
    """The token ids [2, 17] of process `rank`."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(3, VOCAB_SIZE, (2, 17), generator=generator)


def main() -> None:
    """Run one step and save this process's gradients as `OUT_DIR/RANK.pt`."""
    out, rank = Path(sys.argv[1]), int(sys.argv[2])
    # A worker that hangs ends and says where
    faulthandler.dump_traceback_later(150, exit=True)
    # Both run here, so nothing but the loopback device needs to be looked at
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    init_process_group(
        "gloo",
        init_method=f"file://{out / 'rendezvous'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    student = DistributedDataParallel(model())
    student(rows(rank), labels=rows(rank)).loss.backward()
    gradients = {name: p.grad for name, p in student.module.named_parameters()}
    torch.save(gradients, out / f"{rank}.pt")
    destroy_process_group()
    # Taking the wrapper apart behind its group deadlocks now and then, and is not what is tested
    os._exit(0)


if __name__ == "__main__":
    main()
