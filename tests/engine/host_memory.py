"""The worker's half of vLLM's OffloadingConnector over a cache of labels, as late and as early as copies may be.

What is real is the scheduler's half. On a GPU each copy runs on a stream of its own, behind what the compute stream was
given before, so between the end of a step and the step whose output reports it a copy may happen at any time. Here the
target is spoilt at the earliest moment and filled at the latest, and the source must be the same at both.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
    TransferJob,
)
from vllm.v1.kv_offload.base import GPULoadStoreSpec
from vllm.v1.outputs import KVConnectorOutput

PAGE = 4096  # bytes that a chunk takes at least


def transfer_config(num_chunks: int, blocks_per_chunk: int) -> KVTransferConfig:
    """Of a host memory that holds so many chunks of so many blocks, each smaller than a page."""
    options = {"cpu_bytes_to_use": num_chunks * PAGE, "blocks_per_chunk": blocks_per_chunk}
    return KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=options)


@dataclass
class Copy:
    """One job under way."""

    job_id: int
    req_id: str
    is_store: bool
    blocks: list[int]
    places: list[tuple[int, int]]  # chunk, block within it
    first_read: Tensor | None = None


class HostMemory:
    def __init__(self, keys: Tensor, values: Tensor, blocks_per_chunk: int, seed: int) -> None:
        """keys, values: [num_blocks, ...], which hold the same"""
        self.keys, self.values, self.per_chunk = keys, values, blocks_per_chunk
        self.chunks: dict[tuple[int, int], Tensor] = {}
        self.queues: dict[bool, list[Copy]] = {True: [], False: []}  # by is_store; each runs in order
        self.num_copied = {True: 0, False: 0}  # blocks
        self.unsubmitted: list[Copy] = []
        self.done = OffloadingWorkerMetadata()
        self.received: set[str] = set()
        self.random = random.Random(seed)

    def _copy(self, job_id: int, job: TransferJob, is_store: bool) -> Copy:
        gpu, host = (job.src_spec, job.dst_spec) if is_store else (job.dst_spec, job.src_spec)
        assert isinstance(gpu, GPULoadStoreSpec)
        first = gpu.block_indices[0] % self.per_chunk
        chunks: Any = host.block_ids  # type: ignore[attr-defined]
        places = [divmod(first + i, self.per_chunk) for i in range(len(gpu.block_ids))]
        named = [(int(chunks[chunk]), place) for chunk, place in places]
        return Copy(job_id, job.req_id, is_store, [int(b) for b in gpu.block_ids], named)

    def _source(self, copy: Copy) -> Tensor:
        if copy.is_store:
            return self.keys[copy.blocks].clone()
        return torch.stack([self.chunks[place] for place in copy.places])

    def _submit(self, copy: Copy) -> None:
        copy.first_read = self._source(copy)
        assert not copy.first_read.isnan().any()
        spoilt = torch.full_like(copy.first_read, torch.nan)
        self._write(copy, spoilt)
        self.queues[copy.is_store].append(copy)

    def _write(self, copy: Copy, data: Tensor) -> None:
        if copy.is_store:
            self.chunks.update(zip(copy.places, data, strict=True))
        else:
            self.keys[copy.blocks] = self.values[copy.blocks] = data

    def _finish(self, is_store: bool) -> None:
        copy = self.queues[is_store].pop(0)
        data = self._source(copy)
        assert copy.first_read is not None and torch.equal(data, copy.first_read), "overwritten while it was copied"
        self._write(copy, data)
        self.done.mark_completed(copy.job_id)
        self.num_copied[is_store] += len(copy.blocks)
        if not is_store:
            self.received.add(copy.req_id)

    def before_forward(self, meta: OffloadingConnectorMetadata) -> None:
        """Stores of the step before begin, and those whose blocks this step gives away end."""
        flushed = meta.jobs_to_flush or set()
        for job_id in flushed & meta.store_jobs.keys():
            self.unsubmitted.append(self._copy(job_id, meta.store_jobs.pop(job_id), True))
        for copy in self.unsubmitted:
            self._submit(copy)
        self.unsubmitted = []
        for is_store, queue in self.queues.items():
            while any(copy.job_id in flushed for copy in queue):
                self._finish(is_store)

    def after_forward(self, meta: OffloadingConnectorMetadata) -> KVConnectorOutput:
        """Loads begin, some copies end, and what has ended is reported."""
        for job_id, job in meta.load_jobs.items():
            self._submit(self._copy(job_id, job, False))
        self.unsubmitted += [self._copy(job_id, job, True) for job_id, job in meta.store_jobs.items()]
        for is_store, queue in self.queues.items():
            for _ in range(self.random.randrange(len(queue) + 1)):
                self._finish(is_store)
        output = KVConnectorOutput(
            finished_recving=self.received or None,
            kv_connector_worker_meta=self.done if self.done.completed_jobs else None,
        )
        self.received, self.done = set(), OffloadingWorkerMetadata()
        return output
