"""Joining: how an engine finds the ranks of its group, and what must be alike before any of them loads.

Ranks that one launcher or supervisor of vLLM's starts meet at a Unix socket of this host and have a secret from it;
ranks that are started apart meet at a TCP address and have the secret that the user gives, if any.
"""

import json
import math
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import vllm
from vllm import envs
from vllm.config import ParallelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

import vllm_dwdp
from vllm_dwdp import checkpoint, config
from vllm_dwdp.channel import TOGETHER, TOKEN, Address, name, parse, private, together
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.kernels.device import Device
from vllm_dwdp.manifests import Hello
from vllm_dwdp.rendezvous import Group, agree, demand_alike

logger = init_logger("vllm.dwdp.joining")


def give_token() -> None:
    """A new secret for the engines that this process is about to start, unless one for all servers came from above."""
    if not are_together():
        os.environ[TOKEN] = secrets.token_hex(32)


def bring_together() -> None:
    """Let the servers that this process is about to start, which have all ranks of the group, meet without an address.

    By their environment: vLLM hashes additional_config into the key of its compile cache.
    """
    os.environ.update(together())


def are_together() -> bool:
    """Whether one process above this one has started the servers of all ranks."""
    return os.environ.get(TOGETHER) == "1"


def connect(vllm_config: VllmConfig, options: config.Options, rank: int, size: int) -> Group:
    """Join the group: at `rendezvous` if given, else where the launcher's secret says, else at vLLM's DP master."""
    parallel, secret = vllm_config.parallel_config, os.environ.get(TOKEN, "").encode()
    address: Address
    if options.rendezvous is not None:
        address = parse(options.rendezvous)
    elif parallel._coord_store_port or are_together():  # one launcher has started every rank
        if not secret:
            raise DWDPError(f"{TOKEN} did not reach this engine from the launcher: let engines inherit its environment")
        address = private(secret, b"rendezvous")
    else:
        address = (parallel.data_parallel_master_ip, parallel.data_parallel_master_port)
    if not secret:
        logger.warning(
            "DWDP rank %d has no %s: until the group runs, whoever reaches %s can read what its ranks say there, end "
            "the start and pose as a rank; give all ranks the same random one", rank, TOKEN, name(address),
        )
    return Group.connect(
        rank=rank, size=size, address=address, secret=secret, timeout_s=options.startup_timeout_s,
        until_s=vllm_gives_up_at(parallel),
    )


def vllm_gives_up_at(parallel: ParallelConfig) -> float:
    """When several API servers stop waiting for engines, less a margin, on the monotonic clock; a single one does not.

    They start beside the engines and name nobody.
    """
    if parallel._api_process_count < 2:
        return math.inf
    age_s, timeout_s = time.time() - psutil.Process().create_time(), envs.VLLM_ENGINE_READY_TIMEOUT_S
    return time.monotonic() + timeout_s - age_s - min(10, timeout_s / 4)


def meet(group: Group, vllm_config: VllmConfig, options: config.Options, device: Device) -> None:
    """Agree on models, settings, versions and checkpoints, and on how memory is handed over.

    Raises DWDPError on every rank, naming what differs.
    """
    mine = introduce(vllm_config, options, group, device)
    everyone = agree(group, "hello", mine, own=Hello.OWN)
    choose_handles(device, everyone)
    warn_of_hidden_peers(device, mine, everyone)
    agree_on_checkpoint(group, vllm_config)


def introduce(vllm_config: VllmConfig, options: config.Options, group: Group, device: Device) -> Hello:
    model = vllm_config.model_config
    said = json.loads(model.hf_config.to_json_string()) | {
        "dtype": str(model.dtype), "quantization": str(model.quantization),
        "load_format": str(vllm_config.load_config.load_format),
    }
    return Hello(
        rank=group.rank,
        size=group.size,
        plugin=vllm_dwdp.__version__,
        vllm=vllm.__version__,
        model=said,
        options=options.shared(),
        device=current_platform.device_type,
        host=socket.gethostname(),
        boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        network=os.stat("/proc/self/ns/net").st_ino,
        user=os.geteuid(),
        device_name=device.name,
        handles=device.handle_kind,
    )


def reads_checkpoint(vllm_config: VllmConfig) -> bool:
    return vllm_config.load_config.load_format != "dummy"


def agree_on_checkpoint(group: Group, vllm_config: VllmConfig) -> None:
    """Of a folder, files are compared, and then the tensors of one that differs; of a model of the hub, its revision."""
    model = vllm_config.model_config
    folder = Path(model.model)
    tensors = checkpoint.describe(folder) if reads_checkpoint(vllm_config) and folder.is_dir() else {}
    mine: dict[str, Any] = {file: checkpoint.summary(found) for file, found in tensors.items()}
    if reads_checkpoint(vllm_config) and not folder.is_dir():
        mine["revision"] = getattr(model.hf_config, "_commit_hash", None)
    everyone = group.gather("checkpoint", mine)
    differ = [file for file in tensors if any(said.get(file) not in (None, mine[file]) for said in everyone)]
    common = min((file for file in differ if all(file in said for said in everyone)), default=None)
    if common is not None:
        agree(group, f"checkpoint file {common}", tensors[common])
    demand_alike("checkpoint", everyone)


def choose_handles(device: Device, group: list[Hello]) -> None:
    """File descriptors where one host's ranks can pass them, as rounds are agreed there, else FABRIC handles if all ranks export them."""
    hosts, sockets = ", ".join(sorted({said.host for said in group})), "ranks hand memory over by Unix sockets of one"
    for ranks_have, fault in (
        ({said.boot for said in group},
         f"ranks on {hosts} cannot share memory: across hosts every GPU must export FABRIC handles (multi-node NVLink with IMEX); "
         f"keep a DWDP group within one host"),
        ({said.network for said in group},
         f"containers {hosts} of one host have a network each: {sockets} network; start them with the host's (--network host) or one "
         f"that they share (one pod)"),
        ({said.user for said in group},
         f"ranks on {hosts} run as several users: {sockets} user; start all of them as the same"),
    ):
        if len(ranks_have) > 1:
            if any(said.handles != "fabric" for said in group):
                raise DWDPError(fault)
            return
    device.use_handles("fd")


def warn_of_hidden_peers(device: Device, mine: Hello, group: list[Hello]) -> None:
    """The driver takes memory of a GPU that the process cannot see for its own, and copies it on the SMs."""
    hidden = [str(s.rank) for s in group if s.boot == mine.boot and s.device_name not in device.visible]
    if hidden:
        logger.warning(
            "DWDP rank %d does not see the GPU of rank %s: copies from there take the SMs, not a copy engine, and slow "
            "computing by a fifth; let every rank see all GPUs of the group, its own first (CUDA_VISIBLE_DEVICES=1,0)",
            mine.rank, ", ".join(hidden),
        )
